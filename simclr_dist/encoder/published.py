"""Load others' published checkpoints. A ResNet's weights have torchvision's names, wherever in a file they are."""

import argparse
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor, nn

from simclr_dist.encoder.file import read_once, shape_card, with_card
from simclr_dist.encoder.names import Foreign
from simclr_dist.encoder.preprocess import preprocess_card
from simclr_dist.method.model import ResNet
from simclr_dist.system.errors import ConfigError, DataError, reason_of

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
    """Load the encoder that another program wrote, in eval mode. Its `.card` and `.digests` are as of `load_encoder`.

    `weights` is a file of torch.save or safetensors: a state dict with torchvision's names, which are timm's too, alone or in
    dictionaries ("state_dict", "model", ...), and behind any prefix ("module.", "backbone.", "module.encoder_q.", ...).
    `prefix` is needed only where the file holds several ResNets. Other tensors (classifier, projector, optimizer) are left out
    and counted in card["weights"]["left_out"]. Forward is that of `load_encoder`, with h alone. A checkpoint does not
    say `mean`, `std` and `image_size`: they are what the evaluation will use.

    Raises ConfigError for a setting out of range. Raises DataError, which names the first key that does not fit, for a file
    without such an encoder. Nothing in the file is ever executed.
    """
    Foreign(arch, str(weights), image_size, width, stem, prefix)  # type: ignore[arg-type]  # its checks
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise ConfigError(f"mean: {list(mean)}: must be three finite numbers")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise ConfigError(f"std: {list(std)}: must be three numbers above 0, and finite")
    path = Path(weights)
    content, digest = _read(path)
    tensors = dict(_flat(content))
    prefix = _prefix(path, tensors, prefix)
    with torch.device("meta"):
        encoder = ResNet(arch, width=width, stem=stem)
    encoder.load_state_dict(_fitting(path, encoder, tensors, prefix, f"a {arch} of width {width}, stem {stem},"), assign=True)
    named = {"encoder": arch, "width": width, "stem": stem}
    card = {
        **named, **shape_card(encoder, named), "layer": "h", "feature_size": encoder.feature_size,
        "image_size": image_size, "mean": list(mean), "std": list(std), "step": 0,
        "init": f"published weights {path.name} (not known: how they were trained)", "data_digest": None,
        "weights": {"file": str(path), "prefix": prefix, "left_out": _left_out(tensors, prefix, encoder)},
    }  # fmt: skip
    return with_card(encoder, {**card, "preprocess": preprocess_card(card)}, device, digest)


def _read(path: Path) -> tuple[Mapping[Any, Any], str]:
    """Read a file's content and digest."""
    try:
        data, digest = read_once(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the weights: {reason_of(error)}") from None
    try:
        if path.suffix == ".safetensors":
            return load(data), digest
        # Many published checkpoints carry the arguments that they were trained with, in this plain class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except safetensors.SafetensorError:
        raise DataError(f"{path}: is no whole safetensors file") from None
    except Exception as error:  # a file that is not torch's fails in many ways
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            cure = "save its state dict alone in a new file"
            raise DataError(f"{path}: holds {code[1]}, which is not loaded as it could run code; {cure}") from None
        raise DataError(f"{path}: is no whole file of torch.save ({type(error).__name__})") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content, digest


def _flat(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of dictionaries in dictionaries. Their keys are joined by dots."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _prefix(path: Path, tensors: Mapping[str, Tensor], wanted: str | None) -> str:
    """Find the prefix of the file's one ResNet, or the wanted one's. It stands before "conv1.weight"."""
    stages = {key[: at.start()] for key in tensors for at in re.finditer(r"(?<![^.])layer1\.", key)}
    starts = sorted(stages & {key.removesuffix("conv1.weight") for key in tensors if key.endswith("conv1.weight")})
    if not starts:
        keys = ", ".join(repr(key) for key in list(tensors)[:3]) or "none"
        lacking = "no ResNet with torchvision's names: no conv1.weight with layer1.* beside it"
        raise DataError(f"{path}: holds {lacking}; it begins: {keys}")
    listed = ", ".join(map(repr, starts))
    if wanted is not None:
        if matches := [start for start in starts if start in (wanted, f"{wanted}.")]:
            return matches[0]
        raise DataError(f"{path}: no ResNet has the prefix {wanted!r}; there is one behind {listed}")
    if len(starts) > 1:
        starts = [start for start in starts if not _SLOW_COPIES & set(start.split("."))] or starts
    if len(starts) > 1:
        raise DataError(f"{path}: holds several ResNets, behind {listed}; name one by its prefix")
    return starts[0]


def _fitting(path: Path, encoder: nn.Module, tensors: Mapping[str, Tensor], prefix: str, shape: str) -> dict[str, Tensor]:
    """Return the encoder's state dict. DataError names the first key that does not fit."""
    wanted, state = encoder.state_dict(), {}
    for name, parameter in wanted.items():
        key = prefix + name
        if name.endswith("num_batches_tracked"):  # of no use in an evaluation, and absent from old files
            state[name] = torch.zeros((), dtype=torch.int64)
            continue
        if key not in tensors:
            raise DataError(f"{path}: has no {key!r}, which {shape} needs")
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise DataError(f"{path}: {key!r} is {list(tensor.shape)}; {shape} has {list(parameter.shape)} there")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise DataError(f"{path}: {key!r} is {tensor.dtype}, {tensor.layout}; weights are dense floating-point tensors")
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {key!r} has numbers that are not finite; take another checkpoint")
        # A copy: tensors that share storage in the file, and a large file's memory, are not the encoder's.
        state[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for key in tensors:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in wanted and _PART_OF_A_NETWORK.fullmatch(name.split(".")[0]):
            raise DataError(f"{path}: has {key!r}, which {shape} has not: it is another network's")
    return state


def _left_out(tensors: Mapping[str, Tensor], prefix: str, encoder: nn.Module) -> dict[str, int]:
    """Count the tensors that were not used, by part of their key. It is the first part that is not the encoder's prefix."""
    used = {prefix + name for name in encoder.state_dict()}
    parts, counts = prefix.split(".")[:-1], Counter[str]()
    for key in tensors.keys() - used:
        words = key.split(".")
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words[:-1], parts, strict=False))
        counts[words[len(list(shared))]] += 1
    return dict(sorted(counts.items()))
