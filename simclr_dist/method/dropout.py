"""Key dropout and drop path by image. So neither ranks nor micro-batches change what is dropped.

torch's layers draw from one generator, in the order of their calls. A keyed layer makes its mask of numbers that belong to
(image, view, layer), which the training step hands in: both passes of a micro-batch, and a recomputation, get the same ones.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_WORD = 0xFFFFFFFF
# Classes of layers: where they keep their rate, and how many dimensions of the input have a mask of their own (None: all).
_ELEMENTS: dict[type[nn.Module], tuple[str, int | None]] = {
    nn.Dropout: ("p", None), nn.Dropout1d: ("p", 2), nn.Dropout2d: ("p", 2), nn.Dropout3d: ("p", 2)
}  # fmt: skip
_PATHS = {"DropPath": ("drop_prob", 1), "StochasticDepth": ("p", 1)}  # timm's and torchvision's; others' have the same names


class UnfitError(ValueError):
    """A network that is no encoder, whatever the size of the images."""


class Keys:
    """The numbers that a forward's masks are made of. All keyed layers of a network share one.

    `columns` is how many masks a forward makes. Outside of `using` the layers draw from torch's generator.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.of_images: Tensor | None = None
        self.of_layers: Sequence[int] = ()
        self.calls: Counter[_Keyed] | None = None  # while the network is tried

    @contextmanager
    def using(self, of_images: Tensor, of_layers: Sequence[int]) -> Iterator[None]:
        """Make masks of these numbers. They are below 2**32: int64 [n, columns], a row an image of the forward.

        `of_layers`, [columns], are for layers whose input has no images in it, such as a table of positions.
        """
        assert of_images.shape[1] == len(of_layers) == self.columns
        self.of_images, self.of_layers = of_images, of_layers
        try:
            yield
        finally:
            self.of_images = None


class _Keyed(nn.Module):
    """A random layer with keys. Its other base class is the layer's own."""

    keys: Keys
    rate_name: str
    dimensions: int | None
    column: int | None = None  # of its first call in a forward
    call = 0  # counted where there are several
    is_repeated = False
    has_images = True

    def forward(self, x: Tensor) -> Tensor:
        keys, rate = self.keys, float(getattr(self, self.rate_name))
        if not self.training or rate == 0:
            return x
        if keys.calls is not None:
            keys.calls[self] += 1
            self.has_images = len(x) % TRIAL_IMAGES == 0
            if not self.has_images and x.numel() % TRIAL_IMAGES == 0:
                raise UnfitError(f"its dropout has images in another than the first dimension of {list(x.shape)}")
            return x
        if keys.of_images is None:
            y: Tensor = super().forward(x)
            return y
        assert self.column is not None, "its rate was 0 when the network was tried"
        column = self.column + self.call
        self.call += self.is_repeated
        shape = x.shape if self.dimensions is None else (*x.shape[: self.dimensions], *(1,) * (x.dim() - self.dimensions))
        key = keys.of_images[:, column] if self.has_images else torch.full((1,), keys.of_layers[column], device=x.device)
        kept = _words(key, math.prod(shape) // len(key)).view(shape) >= round(rate * 2**32)
        scale = 1 / (1 - rate) if rate < 1 and getattr(self, "scale_by_keep", True) else 1.0
        return x * (kept.to(x.dtype) * scale)


TRIAL_IMAGES = 1009  # a prime: no size inside a network is a multiple of it by chance, as 37 is of 36 patches and a token


def key_random_layers(network: nn.Module) -> Keys:
    """Let dropout and drop path, in place, draw by keys. Returns the keys."""
    keys = Keys()
    for module in network.modules():
        kind = type(module)
        if kind in _ELEMENTS or (kind.__name__ in _PATHS and getattr(module, "mode", "row") == "row"):
            module.__class__ = _keyed_class(kind)  # type: ignore[arg-type]  # nn.Module's __hash__ seems to be an object's
            module.keys = keys  # type: ignore[assignment]  # torch types attributes as tensors or modules
    return keys


@functools.cache
def _keyed_class(kind: type[nn.Module]) -> type[_Keyed]:
    rate_name, dimensions = _ELEMENTS.get(kind) or _PATHS[kind.__name__]
    return type(f"Keyed{kind.__name__}", (_Keyed, kind), {"rate_name": rate_name, "dimensions": dimensions})


def tried(network: nn.Module, keys: Keys, forward: Callable[[], Any]) -> Any:
    """Give each keyed layer that a forward calls its columns. Returns what `forward`, of TRIAL_IMAGES images, returns.

    Raises UnfitError where anything else draws random numbers, which ranks and micro-batches would change.
    """
    keys.calls = Counter()
    with _Randomness() as random:
        result = forward()
    for layer, count in keys.calls.items():
        layer.column, layer.is_repeated = keys.columns, count > 1
        keys.columns += count
    keys.calls = None
    for module in network.modules():
        if any(isinstance(child, _Keyed) and child.is_repeated for child in module.children()):
            module.forward = functools.partial(_counted, module, module.forward)  # a recomputation counts as the forward did
    if random.operations:
        raise UnfitError(f"it draws random numbers by {random.operations[0]}, in no layer that can be keyed by image")
    return result


def _counted(module: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    for child in module.children():
        if isinstance(child, _Keyed):
            child.call = 0
    return forward(*arguments, **named)


def _words(key: Tensor, count: int) -> Tensor:
    """Return `count` words for each key, int64 [n, count] below 2**32. Of integers alone, so alike on every device."""
    return key[:, None] if count == 1 else _mixed(_mixed(torch.arange(count, device=key.device)) ^ key[:, None])


def _mixed(x: Tensor) -> Tensor:
    """Mix 32 bits so that each depends on all. It is C. Wellons's `lowbias32`."""
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    x.mul_(0x846CA68B).bitwise_and_(_WORD)
    x ^= x >> 16
    return x


class _Randomness(TorchDispatchMode):
    """Notes the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))
