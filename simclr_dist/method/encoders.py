"""Build the network that `model.encoder` names. It is a ResNet of ours, or timm's or torchvision's; no weights are loaded."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from simclr_dist.method.batch_norm import frozen_running_statistics
from simclr_dist.method.dropout import TRIAL_IMAGES, UnfitError, key_random_layers, tried
from simclr_dist.method.model import Encoder, ResNet, SimCLR, build_projector
from simclr_dist.system.errors import ConfigError, reason_of


def build_encoder(
    name: str,
    *,
    width: int = 1,
    stem: str = "imagenet",
    channels: int = 3,
    image_size: int = 224,
    drop_path: float | None = None,
) -> Encoder:
    """Build an encoder with random weights. Forward: float [n, channels, s, s] to h [n, feature_size]; s is `image_size`.

    `name` is `resnet10` to `resnet152`, which alone have `width` and `stem`; `timm/NAME`; or `torchvision/NAME`. The latter two
    are the libraries' own modules without classifier, so their state dicts have the libraries' names. `drop_path` is the rate
    of their last block; None leaves the network's own. Raises ConfigError for a library that is not installed, a name that
    it does not know, and a network that does not take such images, gives no h, or draws at random what cannot be keyed.
    """
    library, slash, network = name.partition("/")
    if not slash:
        if drop_path is not None:
            raise _idle(drop_path, name)
        return ResNet(name, width=width, stem=stem, channels=channels)
    build = {"timm": _from_timm, "torchvision": _from_torchvision}[library]
    try:
        encoder = build(network, channels, image_size, drop_path)
        encoder.keys = key_random_layers(encoder)
        encoder.feature_size = _feature_size(encoder, channels, image_size)
        if drop_path and encoder.keys.columns == 0:
            raise _idle(drop_path, name)
    except ModuleNotFoundError:
        raise ConfigError(f"model.encoder: {name!r} needs timm, which is not installed: pip install timm") from None
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:  # theirs, of any kind
        if drop_path is not None and "drop_path_rate" in str(error):
            raise _idle(drop_path, name) from None
        given = f"{channels} x {image_size} x {image_size}"
        side = image_size if isinstance(error, UnfitError) else _own_size(library, network)
        cure = f"; set views.image_size to {side}, for which it is made" if side != image_size else ""
        raise ConfigError(f"model.encoder: {name!r} does not train on images of {given} ({reason_of(error)}){cure}") from None
    return encoder


def _idle(drop_path: float, name: str) -> ConfigError:
    return ConfigError(f"model.drop_path: {drop_path} has no effect on {name}, which has none; leave it out")


def build_simclr(
    encoder: str,
    *,
    width: int = 1,
    stem: str = "imagenet",
    channels: int = 3,
    image_size: int = 224,
    drop_path: float | None = None,
    projector_depth: int = 2,
    projector_hidden: int = 2048,
    projector_dim: int = 128,
    projector_batch_norm: bool = True,
) -> SimCLR:
    """Build the model by the names of the settings."""
    how: dict[str, Any] = {"channels": channels, "image_size": image_size, "drop_path": drop_path}
    network = build_encoder(encoder, width=width, stem=stem, **how)
    size, norm = network.feature_size, projector_batch_norm
    projector = build_projector(size, depth=projector_depth, hidden=projector_hidden, dim=projector_dim, batch_norm=norm)
    return SimCLR(network, projector)


def _from_timm(name: str, channels: int, image_size: int, drop_path: float | None) -> Encoder:
    """Build timm's network."""
    import timm

    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "img_size": image_size}
    training: dict[str, Any] = {"drop_rate": 0.0} | ({} if drop_path is None else {"drop_path_rate": drop_path})
    while True:
        try:
            encoder = cast(Encoder, timm.create_model(name, pretrained=False, **arguments, **training))
            break
        except TypeError as error:  # those without img_size take images of many sizes, those without drop_rate have no dropout
            strange = re.findall(r"'(img_size|drop_rate)'", str(error)) if "unexpected keyword argument" in str(error) else []
            if not strange:
                raise
            for key in strange:
                arguments.pop(key, None)
                training.pop(key, None)
    encoder.arguments = arguments
    for module in encoder.modules():
        patch = getattr(module, "patch_size", None)
        if isinstance(patch, tuple) and "img_size" in arguments and any(image_size % side for side in patch):
            fitting = sorted({max(image_size // patch[0], 1) * patch[0], -(-image_size // patch[0]) * patch[0]})
            raise UnfitError(f"it cuts them into patches of {patch[0]}: {' or '.join(map(str, fitting))} pixels would fit")
    return encoder


def _own_size(library: str, name: str) -> int:
    """Return the side of the images that a network is made for."""
    if library == "torchvision":
        return 224
    import timm

    name = name.partition(".")[0]
    about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return about.input_size[-1] if about else 224


_SIZED = {"vit": "image_size", "maxvit": "input_size"}  # torchvision's networks for images of one size alone


def _from_torchvision(name: str, channels: int, image_size: int, drop_path: float | None) -> Encoder:
    """Build torchvision's network without its last linear layer. Dropout beside that layer goes, too."""
    if channels != 3:
        raise UnfitError("torchvision's networks take 3 channels, timm/NAME any number")
    key = _SIZED.get(name.split("_")[0])
    arguments: dict[str, Any] = {key: image_size if key == "image_size" else [image_size] * 2} if key else {}
    encoder = cast(Encoder, torchvision.models.get_model(name, weights=None, **arguments))
    encoder.arguments = arguments
    heads = [key for key, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not heads or encoder.get_submodule(heads[-1]).out_features != 1000:
        raise UnfitError("it does not end in a linear layer")
    head = encoder.get_submodule(heads[-1].rpartition(".")[0])
    for key, module in head.named_children() if head is not encoder else ():
        if isinstance(module, nn.Dropout):
            head.set_submodule(key, nn.Identity())
    encoder.set_submodule(heads[-1], nn.Identity())
    paths = [module for module in encoder.modules() if isinstance(module, StochasticDepth)]
    for place, module in enumerate(paths if drop_path is not None else ()):
        module.p = cast(float, drop_path) * place / max(len(paths) - 1, 1)  # as all of theirs: 0 at first, the rate at last
    return encoder


def _feature_size(encoder: Encoder, channels: int, image_size: int) -> int:
    """Return the size of h by a forward on shapes alone. Raises UnfitError where there is no h."""
    images = torch.empty(TRIAL_IMAGES, channels, image_size, image_size, device="meta")
    with torch.no_grad(), _shapes_alone(encoder):
        h = tried(encoder, encoder.keys, lambda: encoder(images))
    if not isinstance(h, Tensor) or h.dim() != 2 or len(h) != TRIAL_IMAGES:
        shape = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise UnfitError(f"it does not give one row of numbers an image, but {shape} for {TRIAL_IMAGES}")
    return h.shape[1]


@contextlib.contextmanager
def _shapes_alone(network: nn.Module) -> Iterator[None]:
    """Replace all tensors of a network by their shapes. It gets them back."""
    owners: list[dict[str, Any]] = [held for module in network.modules() for held in (module._parameters, module._buffers)]
    places = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if tensor is not None]
    # torch.func.functional_call loses the tensors of a module that has two parents, as in CoaT.
    for owner, name, tensor in places:
        owner[name] = torch.empty_like(tensor, device="meta")
    try:
        yield
    finally:
        for owner, name, tensor in places:
            owner[name] = tensor


_BLOCKS = {  # torchvision's, of which ours are built
    "BasicBlock", "Bottleneck", "CNBlock", "EncoderBlock", "FusedMBConv", "InvertedResidual", "MBConv",
    "PartitionAttentionLayer", "ResBottleneckBlock", "SwinTransformerBlock", "SwinTransformerBlockV2", "_InvertedResidual",
}  # fmt: skip


def checkpoint_blocks(encoder: Encoder) -> None:
    """Keep only the inputs of blocks, and compute the rest again. BatchNorm's running statistics move once.

    Raises ConfigError for a network whose blocks are not known.
    """
    blocks: list[nn.Module] = []
    if hasattr(encoder, "set_grad_checkpointing"):  # timm's
        with contextlib.suppress(AssertionError):  # which says that it is not supported
            encoder.set_grad_checkpointing(True)  # type: ignore[operator]  # torch types attributes as tensors or modules
            blocks = [encoder]
    else:
        blocks = [module for module in encoder.modules() if type(module).__name__ in _BLOCKS]
        for block in blocks:
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": encoder.keys.columns > 0}
            block.forward = functools.partial(_checkpointed, block.forward, how)
    if not blocks:
        why = f"the blocks of a {type(encoder).__name__} are not known; set it to false"
        raise ConfigError(f"activation_checkpointing: true: {why}")
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_hold_statistics)
            module.register_forward_hook(_release_statistics, always_call=True)  # a recomputation may stop early


def _checkpointed(forward: Callable[..., Any], how: dict[str, Any], *arguments: Any, **named: Any) -> Any:
    return checkpoint(forward, *arguments, **how, **named) if torch.is_grad_enabled() else forward(*arguments, **named)


def _hold_statistics(norm: nn.Module, _: Any) -> None:
    if torch._C._current_graph_task_id() >= 0:  # in a backward: it computes the forward again
        held = contextlib.ExitStack()
        held.enter_context(frozen_running_statistics(norm))
        norm.__dict__["held"] = held


def _release_statistics(norm: nn.Module, *_: Any) -> None:
    if held := norm.__dict__.pop("held", None):
        held.close()
