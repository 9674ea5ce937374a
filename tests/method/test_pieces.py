"""Operations by pieces are those on the whole; exact sums have the same bits in any order, and are right."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.method.pieces import Pieces, exact_sums, groups
from simclr_dist.system.errors import ConfigError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exact_sum(parts: Sequence[Tensor]) -> Tensor:
    return exact_sums([parts])[0]


def _pieces(x: Tensor, count: int = 3) -> Pieces:
    return Pieces([part.clone() for part in x.chunk(count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_order_of_an_exact_sum_is_nothing(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(50, dtype=torch.float64) * scale * 10.0 ** (k % 5)).to(DEVICE, dtype) for k in range(12)]
    found = exact_sum(parts)
    assert torch.equal(exact_sum(parts[::-1]), found)
    assert torch.equal(exact_sum(parts[5:] + parts[:5]), found)
    assert found.dtype == dtype
    truth = torch.tensor([float(sum(Fraction(float(part[i])) for part in parts)) for i in range(50)], dtype=torch.float64)
    largest = max(float(part.double().abs().max()) for part in parts)
    rounding = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8}[dtype]
    assert ((found.double().cpu() - truth).abs() <= 2**-50 * largest + rounding * truth.abs()).all()
    if dtype == torch.float32:
        assert not torch.equal(sum(parts[::-1]), sum(parts)), "the sums to beat"


def test_exact_sums_at_the_ends() -> None:
    tiny, huge = torch.full((2,), 1e-45), torch.full((2,), torch.finfo(torch.float32).max)
    assert exact_sum([tiny] * 3).tolist() == [3 * float(tiny[0])] * 2
    assert exact_sum([torch.zeros(2)] * 3).tolist() == [0, 0]
    assert exact_sum([huge, -huge, tiny * 0 + 1]).tolist() == [0, 0], "1 is below 2**-50 of the largest"
    assert exact_sum([huge] * 1).tolist() == huge.tolist()
    assert exact_sum([torch.full((2,), 2.0**-990, dtype=torch.float64)] * 2).tolist() == [2.0**-989] * 2
    for bad in (math.inf, -math.inf, math.nan):
        assert exact_sum([torch.tensor([1.0, bad]), torch.ones(2)]).isnan().all()


def test_a_network_by_pieces_is_the_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2, return_indices=False), nn.Flatten(), nn.Linear(16, 5)
    ).double()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    whole = network(x)
    whole.square().sum().backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    found = network(_pieces(x))
    assert found.shape == (2, 5)
    torch.testing.assert_close(torch.cat(list(found.parts)), whole)
    torch.autograd.backward([part.square().sum() for part in found.parts])
    for p, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_results_of_several_tensors_and_what_is_no_tensor() -> None:
    x = torch.arange(12.0).view(6, 2)
    values, places = _pieces(x).max(dim=1)
    assert [part.tolist() for part in values.parts] == [[1, 3], [5, 7], [9, 11]]
    assert isinstance(places, Pieces)
    left, right = _pieces(x).chunk(2, dim=1)
    both = torch.cat([right, left], dim=1)
    assert isinstance(both, Pieces)
    assert torch.equal(torch.cat(list(both.parts)), x.flip(1))
    assert (len(both), both.dim(), both.is_floating_point()) == (2, 2, True)
    both += 1
    assert both.parts[0].tolist() == [[2, 1], [4, 3]]


def test_a_network_that_looks_at_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="deterministic: exact: this encoder decides by its images' values"):
        bool(_pieces(torch.arange(3.0)).sum() > 1)


def test_a_network_that_writes_into_another_tensor_is_refused() -> None:
    """Each piece would overwrite the one before, and the last be taken for all."""
    x, table = _pieces(torch.arange(6.0).view(6, 1)), torch.zeros(2, 3)
    with pytest.raises(ConfigError, match="deterministic: exact: this encoder collects its images' values in a buffer"):
        table[:, 1:2] = x
    with pytest.raises(ConfigError, match="in a buffer"):
        table.add_(x)
    x[:, 0] = table[0, 0]  # its own are its own
    assert [part.sum() for part in x.parts] == [float(table[0, 0]) * 2] * 3


def test_a_function_of_the_networks_own_is_refused_not_left_without_gradient() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    with pytest.raises(ConfigError, match="this encoder computes without a graph on the way, by a Function of its own"):
        Double.apply(nn.Linear(2, 2)(_pieces(torch.ones(6, 2))))
    with torch.no_grad():
        assert isinstance(nn.Linear(2, 2)(_pieces(torch.ones(6, 2))), Pieces), "the first pass of micro-batches"


def test_sums_of_several_tensors_are_those_of_each() -> None:
    torch.manual_seed(0)
    each = [[torch.randn(shape) * scale for _ in range(4)] for shape, scale in (((3, 2), 1.0), ((5,), 1e-20), ((), 1e20))]
    each[1][2][3] = math.inf
    for found, parts in zip(exact_sums(each), each, strict=True):
        assert torch.equal(found.nan_to_num(7.0), exact_sum(parts).nan_to_num(7.0))
        assert found.shape == parts[0].shape


def test_weights_are_summed_in_groups_that_can_be_held() -> None:
    assert groups([], 4) == []
    assert groups([3, 4, 5], 4) == [slice(0, 3)]
    assert groups([2**20, 2**20, 2**23, 1], 4) == [slice(0, 2), slice(2, 3), slice(3, 4)]
