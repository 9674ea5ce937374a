"""Compute a micro-batch in pieces of one size.

How a processor multiplies, and so how it rounds, depends on the shapes that it is given. Here every operation of a network
takes one piece, so the bits do not depend on how many pieces a rank has. What goes over pieces is gathered and summed in their
order (BatchNorm, the loss), or summed as integers, where no order matters (the gradients of weights).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from simclr_dist.method.distributed import all_gather, first_derivative_only, sum_integers, world_size
from simclr_dist.system.errors import ConfigError

_HELD = 2**23  # numbers of gradients, of all pieces
# While a network runs, by a weight's id: the weights that are summed together, and its copies.
_neighbours: dict[int, Sequence[Tensor]] = {}
_copies: dict[int, Sequence[Tensor]] = {}


class Pieces(Tensor):
    """Some tensors of one shape in place of one. Each operation takes one after another.

    Tensors that go with them, such as weights, go with each; the gradient of these is the exact sum over the pieces of all
    ranks. Raises ConfigError where an operation gives something else than tensors, such as a shape, and not the same of all;
    where it changes a tensor that is none of the pieces, as each would overwrite what the one before has written; and where no
    graph is made of what has one: a Function of the network's own would lose its gradient.
    """

    parts: Sequence[Tensor]

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor]) -> "Pieces":
        self: Pieces = Tensor._make_subclass(cls, torch.empty(0))
        self.parts = parts
        return self

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, shape = tree_flatten((args, kwargs or {}))
        count = next(len(value.parts) for value in given if isinstance(value, Pieces))
        each = [value.parts if isinstance(value, Pieces) else spread(value, count) for value in given]
        others = [value for value in given if isinstance(value, Tensor) and not isinstance(value, Pieces)]
        versions = [other._version for other in others]
        calls = (tree_unflatten(list(values), shape) for values in zip(*each, strict=True))
        results = [tree_flatten(func(*arguments, **named)) for arguments, named in calls]
        if versions != [other._version for other in others]:
            raise _refusal("collects its images' values in a buffer")
        with_graph = any(part.requires_grad for value in given if isinstance(value, Pieces) for part in value.parts)
        if with_graph and not torch.is_grad_enabled() and any(isinstance(value, Tensor) for value in results[0][0]):
            raise _refusal("computes without a graph on the way, by a Function of its own or under no_grad")
        return tree_unflatten([_joined(values) for values in zip(*(flat for flat, _ in results), strict=True)], results[0][1])


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return Pieces(values)
    if any(value != values[0] for value in values):
        raise _refusal("decides by its images' values")
    return values[0]


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"deterministic: exact: this encoder {what}; take another encoder, or true")


def spread(value: Any, count: int) -> Sequence[Any]:
    """Give each of `count` pieces the value. A tensor's gradient is the exact sum over the pieces of all ranks."""
    if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
        return [value] * count
    copies: Sequence[Tensor]
    if (key := id(value)) not in _neighbours:
        copies = _Spread.apply(count, value)
        return copies
    if key not in _copies:  # only now: the backward sums them once it is past this place
        copies = _Spread.apply(count, *_neighbours[key])
        _copies.update({id(weight): copies[count * i : count * (i + 1)] for i, weight in enumerate(_neighbours[key])})
    return _copies[key]


@contextmanager
def summed_in_groups(weights: Sequence[Tensor], count: int) -> Iterator[None]:
    """Sum the gradients of neighbours at once. So ranks are asked seldom."""
    learned = [weight for weight in weights if weight.requires_grad]
    for some in groups([weight.numel() for weight in learned], count):
        _neighbours.update({id(weight): learned[some] for weight in learned[some]})
    try:
        yield
    finally:
        _neighbours.clear()
        _copies.clear()


def groups(sizes: Sequence[int], count: int) -> list[slice]:
    """Cut weights into neighbours whose gradients may be held together. They have `sizes` numbers in each of `count` pieces."""
    starts, held = [0], 0
    for place, size in enumerate(sizes):
        if held and held + count * size > _HELD:
            starts.append(place)
            held = 0
        held += count * size
    return [slice(*ends) for ends in pairwise([*starts, len(sizes)])] if sizes else []


class _Spread(torch.autograd.Function):
    """Makes `count` copies of each tensor, one tensor after another."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count = count
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors for _ in range(count))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        each = [gradients[start : start + ctx.count] for start in range(0, len(gradients), ctx.count)]
        used = [[part for part in parts if part is not None] for parts in each]
        sums = iter(exact_sums([parts for parts in used if parts]))
        return None, *(next(sums) if parts else None for parts in used)


def exact_sums(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sum each of `tensors` over its parts, some on each rank. The bits are the same in any order.

    Each number is rounded to a multiple of a unit, some 2**-50 of the largest in its tensor's parts, and counted in it. A
    number that is not finite makes its tensor's sum NaN. Numbers below 2**-1000 count as 0.
    """
    largest = torch.stack([torch.stack([part.abs().amax() for part in parts]).amax().double() for parts in tensors])
    largest = all_gather(largest).amax(0)
    room = torch.tensor([62 - (len(parts) * world_size()).bit_length() for parts in tensors])  # sums stay below 2**62 units
    shift = (room.to(largest.device) - largest.frexp().exponent.long()).clamp_max(1000)
    units = ((1023 - shift) << 52).view(torch.float64)  # powers of two, made of their bits: exp2 may round
    totals = []
    for parts, unit in zip(tensors, units, strict=True):
        total = torch.zeros_like(parts[0], dtype=torch.int64, memory_format=torch.contiguous_format)
        for part in parts:
            total += (part.double() / unit).round_().long()
        totals.append(total)
    summed = sum_integers(torch.cat([total.flatten() for total in totals])).split([total.numel() for total in totals])
    whole = zip(summed, tensors, units, largest.isfinite(), strict=True)
    return [
        (counts.double() * unit).where(finite, torch.nan).to(parts[0].dtype).view_as(parts[0])
        for counts, parts, unit, finite in whole
    ]
