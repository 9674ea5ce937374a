"""Find weights in any file, and fit them to a network."""

import argparse
import dataclasses
import io
import itertools
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor, nn

from simclr_dist.encoder.adapt import other_channels, other_grid
from simclr_dist.encoder.file import read_once
from simclr_dist.system.errors import ConfigError, DataError, reason_of

# Two copies that a method trains: the one that its authors evaluate, and the other.
_COPIES = (
    ("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder"), ("encoder", "momentum_encoder"),  # MoCo v1, v2; v3
    ("teacher", "student"), ("teacher_backbone", "student_backbone"),  # DINO; in lightly's examples
    ("backbone", "backbone_momentum"), ("backbone", "momentum_backbone"),  # lightly's, solo-learn's
    ("state_dict_ema", "state_dict"), ("model_ema", "model"),  # timm's, ConvNeXt's average over the steps
)  # fmt: skip
_DEEPEST = 5  # dictionaries in dictionaries
_PART_OF_A_NETWORK = re.compile(r"(conv|bn|layer|norm|stem|block|stage|downsample|attn)\w*")
_CLASSIFIER = re.compile(r"fc|heads?|head_dist|classifier|last_linear")
_COMPUTED = re.compile(r"(.*\.)?(relative_position_index|attn_mask)")  # by the network; old files hold them


@dataclass(frozen=True)
class File:
    """What a file of weights holds. `card` is that of an encoder of ours."""

    path: Path
    tensors: Mapping[str, Tensor]
    sha256: str
    card: dict[str, Any] | None = None


@dataclass
class Fit:
    """A network's whole state dict. Beside it: what became of the file's tensors."""

    prefix: str = ""
    state: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)  # numbers in each tensor that came
    left: dict[str, int] = field(default_factory=dict)  # numbers in each that stays as it was
    adapted: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # tensors of the file, by part of their key

    def describe(self) -> str:
        """Say what came, what did not, and what was adapted."""
        came, stayed = sum(self.loaded.values()), sum(self.left.values())
        tensors = f"{len(self.loaded)} of {len(self.loaded) + len(self.left)} tensors"
        behind = f" behind {self.prefix!r}" if self.prefix else ""
        parts = [f"{tensors}{behind}, {_percent(came, came + stayed)} of the encoder's numbers"]
        parts += [f"adapted: {', '.join(self.adapted)}"] if self.adapted else []
        parts += [f"random: {_counts(Counter(name.split('.')[0] for name in self.left))}"] if self.left else []
        parts += [f"left out: {_counts(self.left_out)}"] if self.left_out else []
        return "; ".join(parts)


def read_weights(path: Path) -> File:
    """Read a file of torch.save or safetensors. Nothing in it is ever executed. Raises DataError where it holds no weights."""
    try:
        data, digest = read_once(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the weights: {reason_of(error)}") from None
    try:
        if path.suffix == ".safetensors":
            return File(path, load(data), digest, _card(data))
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
    return File(path, dict(_flat(content)), digest)


def fit(file: File, network: nn.Module, name: str, *, prefix: str | None = None, leave: Iterable[str] = ()) -> Fit:
    """Fit a file's tensors to a network. All of its state dict is filled, but for what begins with one of `leave`.

    They are found by the network's names, behind any prefix ("module.", "backbone.", "module.encoder_q.", ...), by their
    order, as an nn.Sequential of the network's children has them, or by other names that timm knows. `prefix` is needed only
    where the file holds several. Two things are adapted: the first convolution to another number of channels, and position
    embeddings to another grid, both as timm does. `name` says in errors which network it is. Raises DataError, which names the
    first key that does not fit, and ConfigError for one of `leave` that is no part of the network.
    """
    leave = tuple(leave)
    try:
        return _fit(file, network, name, prefix, leave)
    except DataError:
        for start, tensors, changed in _as_timm_names_them(file.tensors, network, prefix):
            with suppress(DataError):
                fitted = _fit(dataclasses.replace(file, tensors=tensors), network, name, None, leave)
                rest = _left_out((key for key in file.tensors if not key.startswith(start)), start)
                return dataclasses.replace(
                    fitted, prefix=start, adapted=[*changed, *fitted.adapted], left_out=fitted.left_out | rest
                )
        raise


def _fit(file: File, network: nn.Module, name: str, prefix: str | None, leave: Sequence[str]) -> Fit:
    """Do `fit` by the file's own names."""
    wanted = network.state_dict()
    for start in leave:
        if not any(_begins(one, start) for one in wanted):
            raise ConfigError(f"{start!r} is no part of {name}; its parts: {', '.join(dict.fromkeys(map(_first, wanted)))}")
    keys = {key: key for key in file.tensors}
    if not any(".shortcut." in one for one in wanted):  # as CIFAR's ResNets call what torchvision calls downsample
        keys = {key.replace(".shortcut.", ".downsample."): key for key in file.tensors}
    starts = _prefixes(keys, wanted)
    if not starts:
        keys = _named_by_order(keys, wanted)
        starts = _prefixes(keys, wanted)
    result = Fit(_prefix(file, starts, name, prefix))
    for one, parameter in wanted.items():
        key = keys.get(result.prefix + one, result.prefix + one)
        if any(_begins(one, start) for start in leave):
            result.state[one] = parameter
            result.left[one] = parameter.numel()
        elif one.endswith("num_batches_tracked"):  # absent from old files; only an average over all steps needs it
            count, zero = file.tensors.get(key), torch.zeros((), dtype=torch.int64)
            result.state[one] = zero if count is None or count.shape or count.dtype != zero.dtype else count.clone()
        elif not parameter.is_floating_point():  # a table of places, which the network itself computes
            result.state[one] = parameter
        else:
            result.state[one] = _fitting(file, key, one, parameter, name, result.adapted)
            result.loaded[one] = parameter.numel()
    _check_rest(file, keys, result.prefix, wanted, name)
    used = {keys.get(result.prefix + one) for one in wanted}
    result.left_out = _left_out(file.tensors.keys() - used, result.prefix)
    return result


def _card(data: bytes) -> dict[str, Any] | None:
    """Return an encoder's card out of a safetensors file's header."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        card = json.loads(header["__metadata__"]["card"])
        return card if str(card["format"]).startswith("simclr_dist encoder") else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _flat(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of dictionaries in dictionaries. Their keys are joined by dots."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _as_timm_names_them(
    tensors: Mapping[str, Tensor], network: nn.Module, prefix: str | None
) -> Iterator[tuple[str, Mapping[str, Tensor], list[str]]]:
    """Yield a file's tensors by timm's names. Their prefix, and what was changed, come with them.

    timm's own readers of weights know the names of many projects, and earlier ones of its own.
    """
    module = type(network).__module__
    rename = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if rename is None or not module.startswith("timm."):
        return
    counts = Counter(start for key in tensors for start in _starts(key))
    named = (prefix, f"{prefix}.")
    starts = [start for start, count in counts.items() if (4 * count > len(tensors) if prefix is None else start in named)]
    for start in sorted(_evaluated(starts), key=len):
        given = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, about timm's ways
                renamed = rename(dict(given), network)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # it is not in a form that this reader knows
        resized = [name for name, tensor in renamed.items() if name in given and given[name].shape != tensor.shape]
        if all(renamed[name].dim() != 4 for name in resized):  # else it is a network of other patches
            last = Counter(name.rpartition(".")[2] for name in resized)
            changed = [f"{count} {name} resized" for name, count in last.items()]
            yield start, renamed, changed if renamed.keys() <= given.keys() else ["names, as timm changes them", *changed]


def _starts(key: str) -> list[str]:
    """List what may stand before a network's names in a key."""
    return ["", *(key[: dot.end()] for dot in re.finditer(r"\.", key))]


def _prefixes(keys: Iterable[str], wanted: Mapping[str, Tensor]) -> list[str]:
    """List what stands before the network's names. Of several prefixes it lists those with as many of them, nearly."""
    counts = Counter(start for key in keys for start in _starts(key) if key.removeprefix(start) in wanted)
    most = max(counts.values(), default=0)
    return sorted(start for start, count in counts.items() if count > most / 2 and count > len(wanted) / 20)


def _named_by_order(keys: Mapping[str, str], wanted: Iterable[str]) -> dict[str, str]:
    """Name numbered parts as the network's children, in their order. Returns the file's keys by new name.

    An nn.Sequential of a network's children has numbers in place of their names, as lightly's examples save it.
    """
    children, numbered = list(dict.fromkeys(map(_first, wanted))), dict[str, set[int]]()
    for key in keys:
        for at in re.finditer(r"(?<![^.])(\d{1,4})\.", key):
            numbered.setdefault(key[: at.start()], set()).add(int(at[1]))
    named = dict[str, str]()
    for prefix, numbers in numbered.items():
        if len(numbers) == len(children):
            for number, child in zip(sorted(numbers), children, strict=True):
                start = f"{prefix}{number}."
                of_it = [name for name in keys if name.startswith(start)]
                named |= {f"{prefix}{child}.{name.removeprefix(start)}": keys[name] for name in of_it}
    return named


def _prefix(file: File, starts: list[str], name: str, wanted: str | None) -> str:
    """Choose the prefix of the file's network, or the wanted one."""
    if not starts:
        keys = ", ".join(repr(key) for key in list(file.tensors)[:3]) or "none"
        raise DataError(f"{file.path}: holds no {name}: hardly any of its names is there; it begins: {keys}")
    listed = ", ".join(map(repr, starts))
    if wanted is not None:
        if matches := [start for start in starts if start in (wanted, f"{wanted}.")]:
            return matches[0]
        raise DataError(f"{file.path}: no {name} has the prefix {wanted!r}; there is one behind {listed}")
    starts = _evaluated(starts)
    if len(starts) > 1:
        raise DataError(f"{file.path}: holds {name} several times, behind {listed}; name one by its prefix")
    return starts[0]


def _evaluated(starts: list[str]) -> list[str]:
    """Leave out the copies that their authors do not evaluate."""
    for evaluated, other in _COPIES:
        if any(evaluated in start.split(".") for start in starts):
            starts = [start for start in starts if other not in start.split(".")] or starts
    return starts


def _fitting(file: File, key: str, one: str, parameter: Tensor, name: str, adapted: list[str]) -> Tensor:
    """Return the file's tensor as the network wants it. What was changed for it is added to `adapted`."""
    if key not in file.tensors:
        raise DataError(f"{file.path}: has no {key!r}, which {name} needs")
    tensor = file.tensors[key]
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise DataError(f"{file.path}: {key!r} is {tensor.dtype}, {tensor.layout}; weights are dense floating-point tensors")
    if tensor.shape != parameter.shape:
        changed = other_channels(tensor, parameter.shape) or other_grid(one, tensor, parameter.shape)
        if changed is None:
            shapes = f"is {list(tensor.shape)}; {name} has {list(parameter.shape)} there"
            raise DataError(f"{file.path}: {key!r} {shapes}")
        tensor, how = changed
        adapted.append(f"{one} {how}")
    if not tensor.isfinite().all():
        raise DataError(f"{file.path}: {key!r} has numbers that are not finite; take another checkpoint")
    # A copy: tensors that share storage in the file, and a large file's memory, are not the encoder's.
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _check_rest(file: File, keys: Mapping[str, str], prefix: str, wanted: Mapping[str, Tensor], name: str) -> None:
    """Refuse a file with more parts of a network. It is another one's."""
    parts = set(map(_first, wanted))
    for key in keys:
        one = key.removeprefix(prefix)
        if not key.startswith(prefix) or one in wanted or _COMPUTED.fullmatch(one):
            continue
        if (_first(one) in parts and not _CLASSIFIER.fullmatch(_first(one))) or _PART_OF_A_NETWORK.fullmatch(_first(one)):
            raise DataError(f"{file.path}: has {keys[key]!r}, which {name} has not: it is another network's")


def _left_out(keys: Iterable[str], prefix: str) -> dict[str, int]:
    """Count the tensors that were not used, by part of their key. It is the first part that is not the encoder's prefix."""
    parts, counts = prefix.split(".")[:-1], Counter[str]()
    for key in keys:
        words = key.split(".")
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words[:-1], parts, strict=False))
        counts[words[len(list(shared))]] += 1
    return dict(sorted(counts.items()))


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")


def _first(name: str) -> str:
    return name.split(".")[0]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _percent(part: int, whole: int) -> str:
    return "all" if part == whole else f"{min(100 * part / whole, 99.9):.1f} %"
