"""The encoder and its card, out and in: safetensors with the card in its metadata, and beside it as JSON to read.

NAME.safetensors is the encoder alone, NAME.json its card, and NAME.projector (safetensors too) the projector that it was
trained with, for those who want a later layer than h.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import nn
from torchvision.models.resnet import BasicBlock

from simclr_dist.encoder.names import check_is_file
from simclr_dist.method.model import ResNet, build_projector
from simclr_dist.system.errors import ConfigError, DataError, SaveError
from simclr_dist.system.files import write_atomically

Card = dict[str, Any]


def export_encoder(path: Path, encoder: nn.Module, card: Card, projector: nn.Module | None = None) -> None:
    """Write `path` (.safetensors), its card, and `projector_path(path)` when there is a projector.

    The card must say `encoder`, `width` and `stem`; how that shape is built is added (`shape_card`). The projector is bound
    to its encoder by the digest of the encoder's file. The encoder is written last: where it is, the others are. Raises
    SaveError when the disk does not take one of them.
    """
    assert isinstance(encoder, ResNet)
    text = json.dumps({"format": "simclr_dist encoder 1", **card, **shape_card(encoder, card)}, indent=2, sort_keys=True)
    content = save(_weights(encoder), metadata={"card": text})
    written = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(written, text.encode() + b"\n")
        if projector is not None:
            written = projector_path(path)
            shape = {"format": "simclr_dist projector 1", **_projector_shape(projector, encoder.feature_size)}
            shape["encoder_sha256"] = hashlib.sha256(content).hexdigest()
            write_atomically(written, save(_weights(projector), metadata={"card": json.dumps(shape, sort_keys=True)}))
        written = path
        write_atomically(path, content)
    except OSError as error:
        raise SaveError(f"{written}: cannot be written: {error.strerror}") from None


def projector_path(encoder: str | Path) -> Path:
    """Where an encoder's projector is: NAME.projector, a name that no search for encoders (*.safetensors) finds."""
    return Path(encoder).with_suffix(".projector")


def load_encoder(path: str | Path, device: str | torch.device = "cpu", layer: str = "h") -> nn.Module:
    """An exported encoder in eval mode, with its card (dict) as `.card`.

    Forward: float [n, 3, s, s], normalised with card["mean"] and card["std"], to [n, card["feature_size"]]. `layer` says what
    comes out: "h", the representation; "projector.N", the projector after its Nth linear layer with BatchNorm and ReLU
    (h is the 0th, as SimCLR v2, section 2, counts); "z", the projector's last layer. card["layer"] says it as h or
    projector.N.

    Raises ConfigError for a layer of another name; DataError when the file is not an encoder of ours, and when its projector
    is missing, belongs to another encoder, or has fewer layers.
    """
    if not re.fullmatch(r"h|z|projector\.[1-9][0-9]*", layer):
        raise ConfigError(f"layer: {layer!r} is not h, z, or projector.N with N from 1")
    path = Path(path)
    check_is_file(path)
    try:
        card, weights = _read(path)
        encoder = ResNet(card["encoder"], width=card["width"], stem=card["stem"])
    except OSError as error:
        raise DataError(f"{path}: cannot read the encoder: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not an encoder that this program exported ({type(error).__name__})") from None
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{path}: its weights do not fit its card ({card['encoder']}, width {card['width']})") from None
    if layer == "h":
        return with_card(encoder, {**card, "layer": "h"}, device)
    projector, shape = _load_projector(path, encoder.feature_size, layer)
    last = shape["depth"] if layer == "z" else int(layer.removeprefix("projector."))
    if last > shape["depth"]:
        raise DataError(f"{path}: layer {layer}: its projector has {shape['depth']} layers; ask for one of them, h or z")
    return _cut(encoder, projector, {**card, "projector": shape}, last, device)


def untrained_encoder(card: Card, seed: int = 0, device: str | torch.device = "cpu") -> nn.Module:
    """An encoder of the card's shape, up to the card's layer, with fresh weights: what training has to beat."""
    layer, projector = card.get("layer", "h"), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ResNet(card["encoder"], width=card["width"], stem=card["stem"])
        if layer != "h":
            projector = build_projector(encoder.feature_size, **card["projector"])
    card = {**card, "init": "random", "step": 0}
    if projector is None:
        return with_card(encoder, card, device)
    return _cut(encoder, projector, card, int(layer.removeprefix("projector.")), device)


def start_weights(encoder: ResNet, name: str, init: str, path: str = "") -> str:
    """Load an encoder's start weights as `model.init` says; returns what was really loaded, for the card.

    `imagenet` are torchvision's supervised weights, downloaded (or from torch.hub's cache); `imagenet_or_random` takes
    random ones where they cannot be had. Raises ConfigError where they cannot, DataError for a file that does not fit.
    """
    if init == "random":
        return "random"
    if init == "file":
        loaded = load_encoder(path)
        try:
            encoder.load_state_dict(loaded.state_dict())
        except RuntimeError:
            raise DataError(f"model.init_file: {path}: its weights do not fit a {name} of these settings") from None
        return f"file {file_digest(path)}"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        if init == "imagenet_or_random":
            return "random (ImageNet weights could not be downloaded)"
        raise ConfigError(
            f"model.init: 'imagenet': cannot download {weights.url} ({error}); set imagenet_or_random, or random"
        ) from None
    encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return f"imagenet, supervised (torchvision {weights})"


def shape_card(encoder: ResNet, card: Card) -> Card:
    """How the network is built, for those who have torchvision's blocks and not this program.

    {"built": a sentence, "shape": {"torchvision": the function that builds it, or None; "block", "blocks" a stage,
    "channels" of each stage before "expansion", "stem": {"kernel", "stride", "padding", "max_pool"}}}.
    """
    name, width, conv = card["encoder"], card["width"], encoder.conv1
    stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
    block, max_pool = type(stages[0][0]), isinstance(encoder.maxpool, nn.MaxPool2d)
    shape = {
        "torchvision": None,
        "block": block.__name__,
        "blocks": [len(stage) for stage in stages],
        "channels": [conv.out_channels * 2**i for i in range(4)],
        "expansion": 1 if block is BasicBlock else 4,
        "stem": {"kernel": conv.kernel_size[0], "stride": conv.stride[0], "padding": conv.padding[0], "max_pool": max_pool},
    }
    known = hasattr(torchvision.models, name)
    changes = []
    if width > 1:
        changes.append(f"{width} times as many channels in every layer ({conv.out_channels} after the stem)")
    if not max_pool:
        changes.append(f"a stem for small images: conv1 {conv.kernel_size[0]}x{conv.kernel_size[0]} of stride {conv.stride[0]}")
        changes.append("no max pooling")
    if known and not changes:
        shape["torchvision"] = name
    kind = f"torchvision's {name}"
    if not known:
        base = conv.out_channels // width
        kind = f"a ResNet of torchvision's {block.__name__}, {shape['blocks']} in its stages, {base} channels after the stem"
    built = f"{kind}, without fc{'; with ' if changes else ''}{', '.join(changes)}; h is the mean of layer4 over its pixels"
    return {"built": built, "shape": shape}


def file_digest(path: str | Path) -> str:
    """sha256 of a file, hex: what a result names its encoder by."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_card(encoder: nn.Module, card: Card, device: str | torch.device) -> nn.Module:
    """The encoder as it is handed out: on the device, in eval mode, without gradients, its card as `.card`."""
    encoder.card = card  # type: ignore[assignment]
    return encoder.to(device).eval().requires_grad_(False)


def _read(path: Path) -> tuple[Card, dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        card: Card = json.loads((file.metadata() or {})["card"])
    return card, load_file(path)


def _load_projector(encoder: Path, feature_size: int, layer: str) -> tuple[nn.Module, Card]:
    """The projector beside an encoder, and its shape: the arguments of `build_projector`."""
    path = projector_path(encoder)
    if not path.exists():
        raise DataError(
            f"{encoder}: layer {layer}: its projector, {path.name}, is not beside it (old exports have none); ask for layer h"
        )
    try:
        card, weights = _read(path)
        owner, shape = card["encoder_sha256"], {key: card[key] for key in ("depth", "hidden", "dim", "batch_norm")}
        projector = build_projector(feature_size, **shape)
    except OSError as error:
        raise DataError(f"{path}: cannot read the projector: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a projector that this program exported ({type(error).__name__})") from None
    if owner != file_digest(encoder):
        raise DataError(f"{path}: belongs to another encoder than {encoder}; take both from one export")
    try:
        projector.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{path}: its weights do not fit its own description ({shape['depth']} layers)") from None
    return projector, shape


def _projector_shape(projector: nn.Module, feature_size: int) -> Card:
    linear = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    return {
        "depth": len(linear),
        "hidden": linear[0].out_features if linear else feature_size,
        "dim": linear[-1].out_features if linear else feature_size,
        "batch_norm": any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in projector.modules()),
    }


def _cut(encoder: ResNet, projector: nn.Module, card: Card, layers: int, device: str | torch.device) -> nn.Module:
    """The encoder and the projector's first linear layers, each with what follows it."""
    kept: list[nn.Module] = []
    for module in projector.children():
        if isinstance(module, nn.Linear):
            if layers == 0:
                break
            layers -= 1
        kept.append(module)
    count = sum(isinstance(module, nn.Linear) for module in kept)
    size = next((module.out_features for module in reversed(kept) if isinstance(module, nn.Linear)), encoder.feature_size)
    card = {**card, "layer": f"projector.{count}" if count else "h", "feature_size": size}
    return with_card(nn.Sequential(encoder, *kept), card, device)


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """What of a module is written: its state dict, floating-point tensors as float32."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
