"""CUDA tensors without memory or a GPU: torch's fake tensors say where each operation's result would lie, and of which type.

What cannot be faked has a stand-in here:
- the autograd engine, which asks the driver for a context even where nothing is computed: nodes are run in Python, and each
  gradient's device, type and shape are compared with what the node before it wants, as the engine does;
- the trial of an encoder when it is built, which reads numbers: the model is made on the host;
- `nn.Module.to`, which swaps parameters in place: it makes new ones;
- fused SGD and what a BatchNorm is made of, which have no kernel for tensors without memory: their tensors are compared;
- Triton's kernels: a launch only compares its tensors (tests/method/loss/test_tiles.py and
  tests/data/test_colour_kernels.py run the kernels in the interpreter);
- pinned memory, events, the generators' states, and what CUDA is asked about the card: a Hopper with bfloat16.
Not to be had in this way: values, speed, memory, what `torch.compile` makes, DDP and NCCL.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dist.config.settings import Config
from simclr_dist.method.model import SimCLR
from simclr_dist.train.learner import build_model

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda() -> Iterator[list[Any]]:
    """Let `cuda` be a device of fake tensors. Gives the Triton kernels that were launched."""
    launched: list[Any] = []

    def launch(similarities: Any, kernel: Any, *tensors: Tensor) -> None:
        for tensor in (similarities.z, similarities.columns, *tensors):
            assert (tensor.device, tensor.dtype, tensor.is_contiguous()) == (DEVICE, torch.float32, True), kernel
        launched.append(kernel)

    def launch_colour(kernel: Any, programs: int, *arguments: Any, **sizes: int) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert {tensor.device for tensor in tensors} == {DEVICE}, kernel
        assert {tensor.dtype for tensor in tensors} <= {torch.uint8, torch.uint16, torch.float32}, kernel
        launched.extend([kernel] * (programs > 0))

    def built(config: Config) -> SimCLR:
        with unset_fake_temporarily():
            return build_model(config)

    def values(tensor: Tensor) -> Any:
        with unset_fake_temporarily():  # of a host tensor, which is real; of a fake one it is an error
            return numpy(tensor)

    numpy = Tensor.numpy
    stands_in = {
        "torch.Tensor.numpy": values,
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "simclr_dist.train.learner.build_model": built,
        "torch.autograd._engine_run_backward": _backward,
        "torch.nn.Module.to": _module_to,
        "torch.cuda.Event": mock.Mock,
        "torch.cuda.get_rng_state": lambda device: torch.zeros(1, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda state, device: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.is_bf16_supported": lambda: True,
        "simclr_dist.method.loss.fused.Similarities._launch": launch,
        "simclr_dist.data.views.colour_cuda._launch": launch_colour,
    }
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for name, stand_in in stands_in.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(_WithoutMemory())
        yield launched


# Operations of BatchNorm, and how many numbers for each channel they give; 0: a tensor like the first.
_NORMS = {
    "batch_norm_update_stats": 2,
    "batch_norm_stats": 2,
    "batch_norm_gather_stats_with_counts": 2,
    "batch_norm_elemt": 0,
    "batch_norm_backward_reduce": 4,
    "batch_norm_backward_elemt": 0,
}


class _WithoutMemory(TorchDispatchMode):
    """In place of the operations that torch cannot fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _NORMS:
            tensors = [value for value in args if isinstance(value, Tensor)]
            assert {tensor.device for tensor in tensors} == {DEVICE}
            results = _NORMS[func.overloadpacket.__name__]
            if results == 0:
                return torch.empty_like(args[0])
            x = tensors[0]
            kind = torch.promote_types(x.dtype, torch.float32)  # on CUDA float32 also of half precision
            return tuple(torch.empty(x.shape[1], dtype=kind, device=DEVICE) for _ in range(results))
        if func.overloadpacket is not torch.ops.aten._fused_sgd_:
            return func(*args, **kwargs)
        for weight, *others in zip(*(tensors for tensors in args[:3] if tensors), strict=True):
            for other in others:  # it walks through memory
                places = [(tensor.device, tensor.dtype, tensor.shape, tensor.stride()) for tensor in (weight, other)]
                assert places[0] == places[1]
        found_inf = kwargs.get("found_inf")
        assert found_inf is None or (found_inf.device, found_inf.dtype) == (DEVICE, torch.float32)
        return None


class Launches(TorchDispatchMode):
    """Operations that launch something on CUDA, by name; views of memory and questions launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ("device", "empty", "new_empty", "lift_fresh", "pin_memory")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _module_to(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
    device, dtype, _, order = torch._C._nn._parse_to(*arguments, **keywords)
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else None
                    layout = {"memory_format": order} if order is not None and tensor.dim() == 4 else {}
                    moved = tensor.detach().to(device or tensor.device, kind or tensor.dtype, **layout)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module


def _backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    _keep: bool,
    create: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """The nodes behind `outputs`, the last made first. Without `accumulate_grad` the gradients of `inputs` are returned."""
    wanted = [get_gradient_edge(tensor)[:2] for tensor in inputs]
    roots = [get_gradient_edge(tensor)[:2] for tensor in outputs]
    waiting = _dependencies([node for node, _ in roots])
    arrived: dict[Any, list[Tensor | None]] = {}
    order = itertools.count()
    ready: list[tuple[int, int, Any]] = []

    def arrive(node: Any, number: int, gradient: Tensor | None) -> None:
        there = arrived.setdefault(node, [None] * len(node._input_metadata))
        if gradient is not None:
            expected = node._input_metadata[number]
            gradient = gradient.sum_to_size(expected.shape)  # of what was broadcast
            found, wants = (gradient.device, gradient.dtype), (expected.device, expected.dtype)
            assert found == wants, f"{node}: {found}, not {wants}"
            before = there[number]
            there[number] = gradient if before is None else before + gradient

    def make_ready(node: Any) -> None:
        heapq.heappush(ready, (-node._sequence_nr(), next(order), node))

    for (node, number), gradient in zip(roots, gradients, strict=True):
        arrive(node, number, gradient)
    for node in {node for node, _ in roots if not waiting[node]}:
        make_ready(node)
    results: list[Tensor | None] = [None] * len(wanted)
    with torch.set_grad_enabled(create):
        while ready:
            node = heapq.heappop(ready)[2]
            there = arrived.pop(node)
            for place, (of, number) in enumerate(wanted):
                if of == node:
                    results[place] = there[number]
            if not accumulate_grad and node.name().endswith("AccumulateGrad"):
                continue
            made = getattr(node, "apply", node)(*there)
            made = made if isinstance(made, tuple) else (made,)
            more = len(made) - len(node.next_functions)  # a Function in Python says None of what is no tensor, first or last
            made = made[more:] if more > 0 and made[:more] == (None,) * more else made
            for (after, number), gradient in zip(node.next_functions, made, strict=False):
                if after is not None:
                    arrive(after, number, gradient)
                    waiting[after] -= 1
                    if not waiting[after]:
                        make_ready(after)
    return tuple(results)


def _dependencies(roots: Sequence[Any]) -> Counter[Any]:
    """How many gradients each node waits for."""
    count: Counter[Any] = Counter()
    seen, stack = set(roots), list(dict.fromkeys(roots))
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None:
                count[after] += 1
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
    return count
