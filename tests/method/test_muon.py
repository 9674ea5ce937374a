"""Muon against its definition in float64, against torch's own, and AdamW for what is no weight."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.method.muon import Muon, orthogonal
from simclr_dist.method.optim import build_optimizer, step_unless

SHAPES = [(4, 3, 3, 3), (5, 4), (4, 27), (8, 3)]


def _weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def _give_gradients(weights: list[nn.Parameter], step: int) -> None:
    for i, weight in enumerate(weights):
        draw = torch.Generator().manual_seed(100 * step + i)
        weight.grad = torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)


def _by_singular_values(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 4), (16, 27), (128, 1152)])
@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e9])
def test_orthogonal_moves_singular_values(shape: tuple[int, int], norm: float) -> None:
    matrix = norm * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = _by_singular_values(matrix)
    found = orthogonal(torch.stack([matrix, torch.zeros_like(matrix)]))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    assert not found[1].any()
    assert (orthogonal(matrix.float()[None])[0] - expected).abs().max() < 1e-4
    values = torch.linalg.svdvals(matrix)
    well = values / values.norm() > 0.01
    assert torch.linalg.svdvals(found[0])[well].sub(0.9).abs().max() < 0.25


@pytest.mark.parametrize("norm", [1e-17, 1e-20, 1e-22, 1e-25, 1e-30, 1e-38, 1e-43])
def test_squares_that_are_0_in_float32(norm: float) -> None:
    """So small is the momentum of a weight whose gradient has been 0 for a thousand steps."""
    matrix = norm * torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = orthogonal(matrix.float()[None])[0]
    assert torch.linalg.svdvals(found).max() < 1.2
    torch.testing.assert_close(found.double(), orthogonal(matrix[None])[0], rtol=1e-4, atol=1e-4)


MEMORY = {
    "as it is": lambda x: x,
    "outputs in the middle": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "outputs last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "with gaps": lambda x: torch.stack([x, x], 1)[:, 0],
}


@pytest.mark.parametrize("order", MEMORY)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 1, 3, 3), (6, 4, 1, 1), (4, 6, 3, 2, 2), (0, 4, 3), (5, 0)])
def test_any_shape_in_any_order_of_memory(order: str, shape: tuple[int, ...]) -> None:
    """Kernels of one, two and three dimensions, grouped ones, and none: each is the matrix [outputs, rest]."""
    draw = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, plain = nn.Parameter(MEMORY[order](start.clone())), nn.Parameter(start.flatten(1).clone())
    assert torch.equal(weight, start)
    for one in (weight, plain):
        optimizer = Muon([one], lr=0.1, weight_decay=0.1)
        for step in range(3):
            one.grad = gradient.roll(step).view_as(one)
            step_unless(optimizer, torch.tensor(False))
    assert math.prod(shape) == 0 or not torch.equal(weight, start)
    torch.testing.assert_close(weight.detach().flatten(1), plain.detach())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("skippable", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_muon_is_its_definition(decay: float, skippable: bool, order: torch.memory_format) -> None:
    weights = _weights()
    weights[0].data = weights[0].detach().contiguous(memory_format=order)
    expected = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    optimizer = Muon(weights, lr=0.0, momentum=0.9, weight_decay=decay)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = rate = 0.02 * (step + 1)
        _give_gradients(weights, step)
        for i, weight in enumerate(weights):
            assert weight.grad is not None
            momenta[i] = 0.9 * momenta[i] + 0.1 * weight.grad
            ahead = 0.9 * momenta[i] + 0.1 * weight.grad
            update = _by_singular_values(ahead.flatten(1)).view_as(ahead)
            size = 0.2 * math.sqrt(max(len(ahead), ahead[0].numel()))
            expected[i] = expected[i] - rate * (decay * expected[i] + size * update)
        if skippable:
            step_unless(optimizer, torch.tensor(False))
        else:
            optimizer.step()
    for weight, one in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), one, rtol=1e-10, atol=1e-10)


def test_muon_is_near_torchs() -> None:
    """Torch's own takes matrices alone and works in bfloat16, so its digits are few."""
    ours, theirs = ([w for w in _weights(torch.float32) if w.dim() == 2] for _ in range(2))
    start = [weight.detach().clone() for weight in ours]
    muon = build_optimizer("muon", [{"params": ours, "weight_decay": 0.1, "adapt": True}], lr=0.1, momentum=0.95)
    oracle = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        for weights, optimizer in ((ours, muon), (theirs, oracle)):
            _give_gradients(weights, step)
            optimizer.step()
    for weight, other, before in zip(ours, theirs, start, strict=True):
        assert (weight - before).norm() > 0.05 * before.norm()
        assert (weight - other).norm() < 0.03 * (other - before).norm()


def test_what_is_no_weight_is_adamws() -> None:
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 6)), nn.Parameter(torch.ones(3))] for _ in range(2))
    muon = build_optimizer("muon", [{"params": ours, "weight_decay": 0.0, "adapt": False}], lr=0.01, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(5):
        for parameters, optimizer in ((ours, muon), (theirs, adamw)):
            _give_gradients(parameters, step)
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


def test_missing_gradients_closures_and_memory_orders() -> None:
    weights = _weights(torch.float32)
    before = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, lr=0.1)

    def closure() -> float:
        loss = weights[0].square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(float(before[0].square().sum()))
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [False, True, True, True]

    first = weights[0]
    second = nn.Parameter(first.detach().contiguous(memory_format=torch.channels_last))
    other = Muon([second], lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())  # or they share the tensors
    state["param_groups"][0]["params"] = [0]
    other.load_state_dict(state)
    first.grad = torch.linspace(-1, 1, first.numel()).view_as(first)
    second.grad = first.grad.clone()
    optimizer.step()
    other.step()
    torch.testing.assert_close(first, second)


def test_adamws_part_in_another_order_of_memory() -> None:
    """The fused kernel walks through memory: gradient and what a checkpoint has must lie as the parameter."""
    start, ends = torch.linspace(-1, 1, 24).view(1, 2, 3, 4), []
    for orders in ([torch.contiguous_format] * 2, [torch.contiguous_format, torch.channels_last]):
        state = None
        for order in orders:
            weight = nn.Parameter((ends.pop() if state else start).clone(memory_format=order))
            optimizer = Muon([{"params": [weight], "adapt": False}], lr=0.1)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(3):
                weight.grad = start.roll(step).sin()
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            ends.append(weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_rates_that_are_none(name: str) -> None:
    for value in (-0.1, math.nan, math.inf, *([1.0] if name == "momentum" else [])):
        with pytest.raises(ValueError, match=rf"^Muon: {name}: {value} must be at least 0 and below (1|inf)$"):
            Muon(_weights(), **{"lr": 0.1, name: value})


def test_muon_under_torchs_grad_scaler() -> None:
    ends = []
    for scaled in (False, True):
        weights = [*_weights(torch.float32), nn.Parameter(torch.ones(4))]
        groups = [{"params": weights[:-1], "weight_decay": 0.01}, {"params": weights[-1:], "adapt": False}]
        optimizer = Muon(groups, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10, growth_interval=1)  # another in each step
        for _ in range(3):
            loss = sum(weight.square().sum() for weight in weights)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append([weight.detach() for weight in weights])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
