"""What a model takes, found by running it on fake tensors: they have shapes and sizes and no memory.

Every storage that comes and goes in forward and backward is noted. Each is either of a fixed size or of one in proportion to
the views, so that the whole course, and its peak, is known for any number of them.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from simclr_dist.config.settings import Config
from simclr_dist.method.model import SimCLR, build_simclr

# Half of the views that are traced: a storage whose size is divided by such a prime has a part for each view, unless the
# model itself has such a dimension; then another is taken.
_PRIMES = (1009, 1013, 1019, 1021)


@dataclass(frozen=True)
class Course:
    """Bytes that appear (> 0) and go (< 0), in order: fixed + each_view * views. `forward` of them before the backward."""

    fixed: NDArray[np.float64]
    each_view: NDArray[np.float64]
    forward: int
    flops_each_view: float

    def peak(self, views: int) -> float:
        """Most bytes at a time."""
        return float(np.cumsum(self.fixed + views * self.each_view).max(initial=0.0))

    def kept(self, views: int) -> float:
        """Bytes that forward leaves for the backward."""
        return float((self.fixed + views * self.each_view)[: self.forward].sum())

    def flops(self, views: int) -> float:
        """Floating-point operations, a multiplication and an addition being two."""
        return views * self.flops_each_view


@dataclass(frozen=True)
class Footprint:
    """A model as it goes through a step: sizes in numbers, and the courses of a piece.

    `without_graph` is the gradient cache's first pass; `first` a piece's forward and backward while there are no gradients,
    `later` the same where there are (they are not counted in it).
    """

    encoder_parameters: int
    projector_parameters: int
    decayed_parameters: int  # of convolutions and linear layers: what LARS adapts
    buffers: int  # bytes
    feature_size: int
    block_norms: tuple[int, ...]  # channels of each BatchNorm in residual blocks, ...
    other_norms: tuple[int, ...]  # ... and elsewhere
    without_graph: Course
    first: Course
    later: Course

    @property
    def parameters(self) -> int:
        """Of encoder and projector."""
        return self.encoder_parameters + self.projector_parameters


def footprint(config: Config, side: int) -> Footprint:
    """Trace the config's model on views of `side` pixels; a second or so, and no memory to speak of."""
    with FakeTensorMode(allow_fallback_kernels=False):  # which would run an operation for real
        model = _model(config)
        sizes = [p.numel() for p in model.parameters()]
        prime = next(prime for prime in _PRIMES if all(size % prime for size in sizes))
        half = torch.empty(prime, 3, side, side)
        without_graph, first = (_record(model, half, with_graph=with_graph) for with_graph in (False, True))
        return Footprint(
            sum(p.numel() for p in model.encoder.parameters()),
            sum(p.numel() for p in model.projector.parameters()),
            sum(p.numel() for p in model.parameters() if p.dim() > 1),
            sum(b.numel() * b.element_size() for b in model.buffers()),
            model.encoder.feature_size,
            _norms(model, in_blocks=True),
            _norms(model, in_blocks=False),
            _course(without_graph, prime),
            _course(first, prime),
            _course(_accumulated(first), prime),
        )


def _model(config: Config) -> SimCLR:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.precision == "fp64" else torch.float32)
    try:
        model = build_simclr(**config.model.shape)
    finally:
        torch.set_default_dtype(before)
    model.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    model.encoder.checkpointing = config.activation_checkpointing
    model.channels_last = config.channels_last
    return model


def _norms(model: SimCLR, *, in_blocks: bool) -> tuple[int, ...]:
    return tuple(
        module.num_features
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name.startswith("encoder.layer") == in_blocks
    )


@dataclass(frozen=True)
class _Recording:
    events: list[tuple[int, int]]  # (number of a storage, its bytes), the bytes < 0 at its end
    forward: int
    flops: int


class _Recorder(TorchDispatchMode):
    """Notes each storage that an operation makes, and its end; and the operations' FLOPs."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.flops = 0
        self._count = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return

        self._count += 1
        number = self._count

        def end(_: object) -> None:
            del self._alive[key]
            self.events.append((number, -size))

        self.events.append((number, size))
        self._alive[key] = weakref.ref(storage, end)


def _record(model: SimCLR, half: Tensor, *, with_graph: bool) -> _Recording:
    known = [*model.parameters(), *model.buffers(), half, *(p.grad for p in model.parameters() if p.grad is not None)]
    with _without_collector(), _Recorder(known) as recorder:
        with torch.set_grad_enabled(with_graph):
            z = model(torch.cat([half, half]))
        forward = len(recorder.events)
        if with_graph:
            z.backward(torch.ones_like(z))
        del z
    return _Recording(list(recorder.events), forward, recorder.flops)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Else the collector decides when storages in cycles end, differently each time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _accumulated(recording: _Recording) -> _Recording:
    """The same where there are gradients already: what stays to the end is a parameter's gradient, and is added to its own."""
    ended = {number for number, size in recording.events if size < 0}
    events = []
    for number, size in recording.events:
        events.append((number, size))
        if number not in ended:
            events.append((number, -size))
    return _Recording(events, recording.forward, recording.flops)


def _course(recording: _Recording, prime: int) -> Course:
    sizes = np.array([size for _, size in recording.events], np.float64)
    in_proportion = sizes % prime == 0
    fixed = np.where(in_proportion, 0, sizes)
    each_view = np.where(in_proportion, sizes / (2 * prime), 0)
    return Course(fixed, each_view, recording.forward, recording.flops / (2 * prime))
