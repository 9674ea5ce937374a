"""Published checkpoints of others: a ResNet's weights under torchvision's names, wherever in a file they are."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_dist.encoder.file import shape_card, with_card
from simclr_dist.method.model import ResNet
from simclr_dist.system.errors import ConfigError, DataError

ARCHITECTURES = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STEMS = ("imagenet", "small", "small_stride2")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SLOW_COPIES = {"encoder_k", "momentum_encoder"}  # MoCo's running averages; its authors evaluate the other encoder
_DEEPEST = 5  # dictionaries in dictionaries
_PART_OF_A_NETWORK = re.compile(r"(conv|bn|layer|norm|stem|block|stage|downsample|attn)\w*")


def load_foreign(
    arch: str,
    weights: str | Path,
    *,
    width: int = 1,
    stem: str = "imagenet",
    prefix: str | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    image_size: int = 224,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The encoder in a checkpoint that another program wrote, in eval mode, with a card (dict) as `.card`.

    `weights` is a file of torch.save or safetensors: a state dict with torchvision's names, which are timm's too, alone or in
    dictionaries ("state_dict", "model", ...), and behind any prefix ("module.", "backbone.", "module.encoder_q.", ...).
    `prefix` is needed only where the file holds several ResNets. The other tensors, such as classifier, projector or
    optimizer, are left out and counted in card["weights"]["left_out"].

    Forward: as of `load_encoder`, with h alone. `mean`, `std` and `image_size` are what the evaluation will use: a checkpoint
    does not say them.

    Raises ConfigError for a setting out of range, and DataError, which names the first key that does not fit, for a file that
    does not hold such an encoder. Nothing in the file is ever executed.
    """
    _check(arch, width, stem, mean, std, image_size)
    path = Path(weights)
    tensors = dict(_flat(_read(path)))
    prefix = _prefix(path, tensors, prefix)
    with torch.device("meta"):
        encoder = ResNet(arch, width=width, stem=stem)
    encoder.load_state_dict(_fitting(path, encoder, tensors, prefix, f"a {arch} of width {width}, stem {stem},"), assign=True)
    card = {"encoder": arch, "width": width, "stem": stem}
    card |= {
        **shape_card(encoder, card),
        "layer": "h",
        "feature_size": encoder.feature_size,
        "image_size": image_size,
        "mean": list(mean),
        "std": list(std),
        "step": 0,
        "init": f"published weights {path.name} (not known: how they were trained)",
        "data_digest": None,
        "weights": {"file": str(path), "prefix": prefix, "left_out": _left_out(tensors, prefix, encoder)},
    }
    return with_card(encoder, card, device)


def _check(arch: str, width: int, stem: str, mean: Sequence[float], std: Sequence[float], image_size: int) -> None:
    if arch not in ARCHITECTURES:
        raise ConfigError(f"arch: {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    if width not in (1, 2, 4):
        raise ConfigError(f"width: {width}: must be 1, 2 or 4")
    if stem not in STEMS:
        raise ConfigError(f"stem: {stem!r} is not one of {', '.join(STEMS)}")
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise ConfigError(f"mean: {list(mean)}: must be three finite numbers")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise ConfigError(f"std: {list(std)}: must be three numbers above 0, and finite")
    if not 8 <= image_size <= 4096:
        raise ConfigError(f"image_size: {image_size}: must be from 8 to 4096")


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Many published checkpoints carry the arguments that they were trained with, in this plain class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot read the weights: {error.strerror or error}") from None
    except safetensors.SafetensorError:
        raise DataError(f"{path}: is no whole safetensors file") from None
    except Exception as error:  # a file that is not torch's fails in many ways
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise DataError(f"{path}: is no whole file of torch.save ({type(error).__name__})") from None
        raise DataError(
            f"{path}: holds {found[1]}, which is not loaded as it could run code; save its state dict alone in a new file"
        ) from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _flat(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of dictionaries in dictionaries, by their keys joined by dots."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _prefix(path: Path, tensors: Mapping[str, Tensor], wanted: str | None) -> str:
    """What stands before "conv1.weight" of the one ResNet in the file, or of the one that is wanted."""
    stages = {key[: at.start()] for key in tensors for at in re.finditer(r"(?<![^.])layer1\.", key)}
    starts = sorted(stages & {key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")})
    if not starts:
        keys = ", ".join(repr(key) for key in list(tensors)[:3]) or "none"
        raise DataError(
            f"{path}: holds no ResNet with torchvision's names: no conv1.weight with layer1.* beside it; it begins: {keys}"
        )
    listed = ", ".join(map(repr, starts))
    if wanted is not None:
        for start in starts:
            if start in (wanted, f"{wanted}."):
                return start
        raise DataError(f"{path}: no ResNet has the prefix {wanted!r}; there is one behind {listed}")
    if len(starts) > 1:
        starts = [start for start in starts if not _SLOW_COPIES & set(start.split("."))] or starts
    if len(starts) > 1:
        raise DataError(f"{path}: holds several ResNets, behind {listed}; name one by its prefix")
    return starts[0]


def _fitting(path: Path, encoder: nn.Module, tensors: Mapping[str, Tensor], prefix: str, shape: str) -> dict[str, Tensor]:
    """The encoder's state dict; raises DataError naming the first key that is missing, of another shape, or too many."""
    wanted, state = encoder.state_dict(), {}
    for name, parameter in wanted.items():
        key = prefix + name
        if name.endswith("num_batches_tracked"):  # of no use in an evaluation, and absent from old files
            state[name] = torch.zeros((), dtype=torch.int64)
            continue
        if key not in tensors:
            raise DataError(f"{path}: has no {key!r}, which {shape} needs")
        found = tensors[key]
        if found.shape != parameter.shape:
            raise DataError(f"{path}: {key!r} is {list(found.shape)}; {shape} has {list(parameter.shape)} there")
        if not found.is_floating_point() or found.layout != torch.strided:
            raise DataError(f"{path}: {key!r} is {found.dtype}, {found.layout}; weights are dense floating-point tensors")
        # A copy, as safetensors maps its file: the encoder must outlive what happens to that.
        state[name] = found.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for key in tensors:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in wanted and _PART_OF_A_NETWORK.fullmatch(name.split(".")[0]):
            raise DataError(f"{path}: has {key!r}, which {shape} has not: it is another network's")
    return state


def _left_out(tensors: Mapping[str, Tensor], prefix: str, encoder: nn.Module) -> dict[str, int]:
    """How many tensors were not used, by the first part of their key that is not the encoder's prefix."""
    used = {prefix + name for name in encoder.state_dict()}
    parts, counts = prefix.split(".")[:-1], Counter[str]()
    for key in tensors.keys() - used:
        own, shared = key.split("."), 0
        while shared < min(len(parts), len(own) - 1) and own[shared] == parts[shared]:
            shared += 1
        counts[own[shared]] += 1
    return dict(sorted(counts.items()))
