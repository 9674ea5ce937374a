"""Trace a model's memory and FLOPs, on fake tensors without memory.

The trace notes every storage that comes and goes in forward and backward. Its size is fixed, or in proportion to the number of
views. So one trace gives the whole timeline, and its peak, for any number of views.
"""

import gc
import weakref
from collections.abc import Iterable, Sequence
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
from simclr_dist.method.model import ResNet, SimCLR
from simclr_dist.method.optim import parameter_groups
from simclr_dist.train.learner import build_shapes, embedding_size

# Half of the views that are traced. A storage whose size is a multiple of such a prime has a part for each view. If the
# model itself has such a dimension, another prime is taken.
_PRIMES = (1009, 1013, 1019, 1021)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATTENTION],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}
_Events = list[tuple[int, int]]  # (number of a storage, its bytes), the bytes < 0 at its end


@dataclass(frozen=True)
class Timeline:
    """Bytes that appear (> 0) and go (< 0), in order. fixed + each_view * views; the first `forward` are the forward pass."""

    fixed: NDArray[np.float64]
    each_view: NDArray[np.float64]
    forward: int
    flops_each_view: float

    def peak(self, views: int) -> float:
        """Return the most bytes at one time."""
        return float(np.cumsum(self.fixed + views * self.each_view).max(initial=0.0))

    def kept(self, views: int) -> float:
        """Return the bytes that the forward leaves for the backward."""
        return float((self.fixed + views * self.each_view)[: self.forward].sum())

    def flops(self, views: int) -> float:
        """Count floating-point operations. A multiplication and an addition are two."""
        return views * self.flops_each_view


@dataclass(frozen=True)
class Footprint:
    """Size of a model, and its memory over time in a step.

    `without_graph` is the gradient cache's first pass. `first` is a micro-batch's forward and backward while there are no
    gradients. `later` is the same when gradients exist already; it does not count them.
    """

    side: int
    encoder_parameters: int
    projector_parameters: int
    tensors: tuple[int, ...]  # numbers of each parameter
    decayed_parameters: int  # of convolutions and linear layers: what LARS adapts
    buffers: int  # bytes
    embedding_size: int  # of z
    block_norms: tuple[int, ...]  # channels of each BatchNorm in residual blocks, ...
    other_norms: tuple[int, ...]  # ... and elsewhere
    without_graph: Timeline
    first: Timeline
    later: Timeline

    @property
    def parameters(self) -> int:
        """Count the parameters of encoder and projector."""
        return self.encoder_parameters + self.projector_parameters


def footprint(config: Config, side: int) -> Footprint:
    """Trace the model on views of `side` pixels in about a second."""
    model = _model(config)
    with FakeTensorMode(allow_fallback_kernels=False):  # a fallback would run an operation for real
        # On the CPU attention takes the memory that it takes on a GPU, and not on the meta device.
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))  # type: ignore[no-untyped-call]  # torch leaves it so
        sizes = [p.numel() for p in model.parameters()]
        prime = next(prime for prime in _PRIMES if all(size % prime for size in sizes))
        half = torch.empty(prime, config.data.channels, side, side)
        without_graph = _record(model, half, with_graph=False)
        first, forward, flops = _record(model, half, with_graph=True)
        return Footprint(
            side,
            sum(p.numel() for p in model.encoder.parameters()),
            sum(p.numel() for p in model.projector.parameters()),
            tuple(sizes),
            sum(p.numel() for p in parameter_groups(model, 1.0)[0]["params"]),
            sum(b.numel() * b.element_size() for b in model.buffers()),
            embedding_size(config, model),
            _norms(model, in_blocks=True),
            _norms(model, in_blocks=False),
            _timeline(*without_graph, prime),
            _timeline(first, forward, flops, prime),
            _timeline(_accumulated(first), forward, flops, prime),
        )


def _model(config: Config) -> SimCLR:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.precision == "fp64" else torch.float32)
    try:
        return build_shapes(config)
    finally:
        torch.set_default_dtype(before)


def _norms(model: SimCLR, *, in_blocks: bool) -> tuple[int, ...]:
    blocks = "encoder.layer" if isinstance(model.encoder, ResNet) else "encoder."  # of others' nobody knows which
    return tuple(
        module.num_features
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name.startswith(blocks) == in_blocks
    )


class _Recorder(TorchDispatchMode):
    """Records begin and end of each new storage, and the FLOPs."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.events: _Events = []
        self.flops = 0
        self._count = 0
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._existing or key in self._alive:
            return
        self._count += 1
        number = self._count

        def end(_: object) -> None:
            del self._alive[key]
            self.events.append((number, -size))

        self.events.append((number, size))
        self._alive[key] = weakref.ref(storage, end)


def _record(model: SimCLR, half: Tensor, *, with_graph: bool) -> tuple[_Events, int, int]:
    """Run a forward and backward. Returns (events, how many are the forward's, FLOPs)."""
    existing = [*model.parameters(), *model.buffers(), half, *(p.grad for p in model.parameters() if p.grad is not None)]
    gc.collect()
    gc.disable()  # Python's collector ends storages at another moment each time
    try:
        with _Recorder(existing) as recorder:
            with torch.set_grad_enabled(with_graph):
                z = model(torch.cat([half, half]))
            forward = len(recorder.events)
            if with_graph:
                z.backward(torch.ones_like(z))
            del z
    finally:
        gc.enable()
    return list(recorder.events), forward, recorder.flops


def _accumulated(events: _Events) -> _Events:
    """Add the gradients to existing ones. They stay to the end."""
    ended = {number for number, size in events if size < 0}
    return [
        event
        for number, size in events
        for event in ([(number, size)] if number in ended else [(number, size), (number, -size)])
    ]


def _timeline(events: _Events, forward: int, flops: int, prime: int) -> Timeline:
    sizes = np.array([size for _, size in events], np.float64)
    in_proportion = sizes % prime == 0
    fixed = np.where(in_proportion, 0, sizes)
    each_view = np.where(in_proportion, sizes / (2 * prime), 0)
    return Timeline(fixed, each_view, forward, flops / (2 * prime))
