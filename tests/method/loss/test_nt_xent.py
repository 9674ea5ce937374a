"""NT-Xent against the formula of the text that this project began with, against its own definition, and at its edges."""

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ranks
from host_sync import no_host_sync
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import NTXentLoss, nt_xent_reference
from simclr_dist.method.loss.tiles import unit_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Z_A = torch.tensor([[0.8, 0.6], [-0.7, 0.7]], dtype=torch.float64)
Z_B = torch.tensor([[0.9, 0.4], [-0.8, 0.6]], dtype=torch.float64)


def _blog_rows(z_a: Tensor, z_b: Tensor, temperature: float, *, normalise: bool = True) -> Tensor:
    """The blog's formula: each anchor's cross-entropy, with eps 1e-6 and -1e9 on the diagonal."""
    if normalise:
        z_a, z_b = (F.normalize(z, dim=1, eps=1e-6) for z in (z_a, z_b))
    n, z = len(z_a), torch.cat([z_a, z_b])
    similarity = z @ z.T / temperature
    similarity = torch.where(torch.eye(2 * n, dtype=torch.bool), -1e9, similarity)
    targets = torch.cat([torch.arange(n) + n, torch.arange(n)])
    return F.cross_entropy(similarity, targets, reduction="none")


def _pair(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z_b = z_a + 0.7 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z_a.to(dtype).requires_grad_(), z_b.to(dtype).requires_grad_()


def _value_and_gradient(loss: Tensor, *inputs: Tensor) -> tuple[float, Tensor]:
    return loss.item(), torch.cat([g.double() for g in torch.autograd.grad(loss, inputs)])


def _assert_equal(found: tuple[float, Tensor], expected: tuple[float, Tensor], tolerance: float) -> None:
    """To a relative tolerance, or an absolute one where all is next to nothing."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert (found[1] - expected[1]).norm() <= tolerance * max(float(expected[1].norm()), 1e-3)


def test_worked_example() -> None:
    unnormalised = _blog_rows(Z_A, Z_B, 0.5, normalise=False)
    assert unnormalised.tolist() == pytest.approx([0.1778, 0.1625, 0.1213, 0.1261], abs=5e-5)
    assert float(unnormalised.mean()) == pytest.approx(0.1469, abs=5e-5)
    for loss in (_blog_rows(Z_A, Z_B, 0.5).mean(), nt_xent_reference(Z_A, Z_B, 0.5), NTXentLoss(0.5)(Z_A, Z_B)):
        assert loss.item() == pytest.approx(0.142547, abs=5e-7)


@pytest.mark.parametrize(("n", "temperature"), list(itertools.product([2, 7, 300], [0.05, 0.1, 0.5, 5.0])))
def test_equals_the_blogs_formula(n: int, temperature: float) -> None:
    z_a, z_b = _pair(n, 16, seed=n)
    expected = _value_and_gradient(_blog_rows(z_a, z_b, temperature).mean(), z_a, z_b)
    _assert_equal(_value_and_gradient(NTXentLoss(temperature)(z_a, z_b), z_a, z_b), expected, 1e-12)
    low = [z.detach().float().requires_grad_() for z in (z_a, z_b)]
    _assert_equal(_value_and_gradient(NTXentLoss(temperature)(*low), *low), expected, 2e-5)


@pytest.mark.parametrize(("n", "temperature"), list(itertools.product([1, 2, 7, 300], [0.05, 0.5, 5.0])))
def test_equals_the_reference(n: int, temperature: float) -> None:
    z_a, z_b = _pair(n, 24, seed=n + 1)
    expected = _value_and_gradient(nt_xent_reference(z_a, z_b, temperature), z_a, z_b)
    _assert_equal(_value_and_gradient(NTXentLoss(temperature)(z_a, z_b), z_a, z_b), expected, 1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 5000, 2**30])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, tile_bytes: int) -> None:
    z_a, z_b = _pair(37, 8)
    expected = _value_and_gradient(nt_xent_reference(z_a, z_b, 0.2), z_a, z_b)
    monkeypatch.setattr("simclr_dist.method.loss.tiles._CPU_TILE_BYTES", tile_bytes)
    _assert_equal(_value_and_gradient(NTXentLoss(0.2)(z_a, z_b), z_a, z_b), expected, 1e-12)


def test_gradcheck() -> None:
    z_a, z_b = _pair(5, 3)
    assert torch.autograd.gradcheck(lambda a, b: NTXentLoss(0.3)(a, b) * 2.5, (z_a, z_b))


def test_symmetries() -> None:
    z_a, z_b = _pair(40, 8)
    loss = NTXentLoss(0.1)
    value, gradient = _value_and_gradient(loss(z_a, z_b), z_a, z_b)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    _assert_equal((loss(z_a[order], z_b[order]).item(), gradient), (value, gradient), 1e-13)
    swapped = _value_and_gradient(loss(z_b, z_a), z_a, z_b)
    _assert_equal(swapped, (value, gradient), 1e-13)
    a, b = (z_a[order].detach().requires_grad_(), z_b[order].detach().requires_grad_())
    both = torch.cat([order, order + 40])
    _assert_equal(_value_and_gradient(loss(a, b), a, b), (value, gradient[both]), 1e-13)
    scaled = loss(z_a * 7, z_b * torch.rand(40, 1, generator=torch.Generator().manual_seed(2)).double()).item()
    assert scaled == pytest.approx(value, rel=1e-13)


def test_chance_level() -> None:
    """Embeddings that say nothing cost ln(2N - 1)."""
    z_a, z_b = (torch.ones(64, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert NTXentLoss(0.1)(z_a, z_b).item() == pytest.approx(math.log(127), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_image_has_no_negatives(dtype: torch.dtype) -> None:
    z_a, z_b = _pair(1, 8, dtype=dtype)
    value, gradient = _value_and_gradient(NTXentLoss(0.1)(z_a, z_b), z_a, z_b)
    assert value == 0
    assert not gradient.any()


def test_half_precision_inputs() -> None:
    z_a, z_b = _pair(64, 16, dtype=torch.bfloat16)
    exact = [z.detach().double().requires_grad_() for z in (z_a, z_b)]
    expected = _value_and_gradient(nt_xent_reference(*exact, 0.1), *exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = NTXentLoss(0.1)(z_a, z_b)
    assert loss.dtype == torch.float32
    value, gradient = _value_and_gradient(loss, z_a, z_b)
    assert value == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() < 0.01 * expected[1].norm()  # the gradient itself is rounded to bfloat16


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 100.0, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    z_a, z_b = _pair(50, 8)
    expected = _value_and_gradient(nt_xent_reference(z_a, z_b, temperature), z_a, z_b)
    _assert_equal(_value_and_gradient(NTXentLoss(temperature)(z_a, z_b), z_a, z_b), expected, 1e-11)
    low = [z.detach().float().requires_grad_() for z in (z_a, z_b)]
    value, gradient = _value_and_gradient(NTXentLoss(temperature)(*low), *low)
    assert value == pytest.approx(expected[0], rel=1e-3)
    assert gradient.isfinite().all()


def test_small_losses_keep_their_digits() -> None:
    """Once pairs agree the textbook form loses digits in 1 - softmax; sums over negatives alone do not."""
    z_a, z_b = (torch.eye(32, dtype=torch.float64) + 0.01 * torch.randn(32, 32, dtype=torch.float64) for _ in range(2))
    exact = [z.requires_grad_() for z in (z_a, z_b)]
    expected = _value_and_gradient(NTXentLoss(0.06)(*exact), *exact)
    assert expected[0] < 1e-4
    low = [z.detach().float().requires_grad_() for z in exact]
    value, gradient = _value_and_gradient(NTXentLoss(0.06)(*low), *low)
    assert value == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_bad_values_stay_visible() -> None:
    z_a, z_b = _pair(4, 3)
    with torch.no_grad():
        z_a[2, 1] = torch.nan
    assert NTXentLoss(0.1)(z_a, z_b).isnan()


def _on_ranks(world: World, n: int) -> dict[str, Any]:
    z_a, z_b = _pair(n * world.size, 16, seed=n)
    mine = slice(world.rank * n, (world.rank + 1) * n)
    a, b = (z[mine].detach().requires_grad_() for z in (z_a, z_b))
    loss = NTXentLoss(0.2)(a, b)
    gradient = torch.cat(torch.autograd.grad(loss, (a, b)))
    return {"loss": loss.detach(), "gradient": gradient}


@pytest.mark.parametrize(("size", "n"), [(2, 9), (3, 1)])
def test_ranks_share_one_value(size: int, n: int) -> None:
    z_a, z_b = _pair(n * size, 16, seed=n)
    value, gradient = _value_and_gradient(nt_xent_reference(z_a, z_b, 0.2), z_a, z_b)
    found = ranks.run(_on_ranks, size, n)
    for i, result in enumerate(found):
        assert torch.equal(result["loss"], found[0]["loss"])
        mine = torch.arange(n) + i * n
        rows = torch.cat([mine, mine + n * size])
        # A rank's own share carries the factor world_size, so that DDP's mean over ranks is the gradient of the mean.
        _assert_equal((float(result["loss"]), result["gradient"] / size), (value, gradient[rows]), 1e-12)


EMBEDDINGS = {
    "random": lambda n, d: torch.randn(2, n, d),
    "aligned": lambda n, d: torch.randn(1, n, d) + 0.3 * torch.randn(2, n, d),
    "nearly converged": lambda n, d: torch.eye(n, d).roll(1) * 3 + 0.05 * torch.randn(2, n, d) + 0.01 * torch.randn(1, n, d),
}


@pytest.mark.parametrize("temperature", [0.03, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_float32_keeps_its_digits(kind: str, temperature: float) -> None:
    torch.manual_seed(7)
    low = [z.clone().requires_grad_() for z in EMBEDDINGS[kind](300, 128)]
    high = [z.detach().double().requires_grad_() for z in low]
    # The sums over negatives alone, which test_equals_the_reference ties to the definition, and not the reference itself:
    # that one loses digits in float64 too once the loss is small.
    expected = _value_and_gradient(NTXentLoss(temperature)(*high), *high)
    value, gradient = _value_and_gradient(NTXentLoss(temperature)(*low), *low)
    assert value == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() <= 5e-6 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.0249, 0.0251, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("n", [1, 2, 3, 65])
def test_everything_is_finite(dtype: torch.dtype, temperature: float, n: int) -> None:
    for scale in (1e-3, 1.0, 100.0):
        z_a, z_b = ((scale * z.detach()).to(dtype).requires_grad_() for z in _pair(n, 16))
        for decoupled in (False, True):
            value, gradient = _value_and_gradient(NTXentLoss(temperature, decoupled=decoupled)(z_a, z_b), z_a, z_b)
            assert math.isfinite(value)
            assert gradient.isfinite().all()
            assert n > 1 or value == 0


def test_where_exp_would_overflow_another_way_is_taken() -> None:
    """The two ways meet: the loss is continuous in the temperature there."""
    z_a, z_b = _pair(80, 16, dtype=torch.float32)
    found = [_value_and_gradient(NTXentLoss(t)(z_a, z_b), z_a, z_b) for t in (0.024798, 0.024802)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert (found[0][1] - found[1][1]).norm() < 1e-3 * found[0][1].norm()


def test_decoupled_and_scaled() -> None:
    z_a, z_b = _pair(30, 8)
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    logits = z @ z.T / 0.2
    rows = torch.arange(60)
    positive = logits[rows, rows.roll(30)]
    negatives = logits.masked_fill(torch.eye(60, dtype=torch.bool) | torch.eye(60, dtype=torch.bool).roll(30, 1), -torch.inf)
    expected = (negatives.logsumexp(1) - positive).mean()
    found = NTXentLoss(0.2, decoupled=True)(z_a, z_b)
    _assert_equal(_value_and_gradient(found, z_a, z_b), _value_and_gradient(expected, z_a, z_b), 1e-12)
    # SimCLR's official code: the mean over view a's anchors plus that over view b's.
    official = _blog_rows(z_a, z_b, 0.2)
    expected = official[:30].mean() + official[30:].mean()
    found = NTXentLoss(0.2, scale=2.0)(z_a, z_b)
    _assert_equal(_value_and_gradient(found, z_a, z_b), _value_and_gradient(expected, z_a, z_b), 1e-12)


def test_no_host_sync() -> None:
    z_a, z_b = (z.detach().to(DEVICE).requires_grad_() for z in _pair(40, 16, dtype=torch.float32))
    NTXentLoss(0.1)(z_a, z_b).backward()  # compiles the kernels on a GPU
    with no_host_sync():
        NTXentLoss(0.1)(z_a, z_b).backward()
        with torch.no_grad():
            NTXentLoss(0.01)(z_a, z_b)


@pytest.mark.parametrize("way", ["one for all", "by backend"])
def test_less_precise_products_are_not_for_the_loss(way: str) -> None:
    """torch has two ways to allow them, and who has used the newer one may no longer ask by the older."""
    z_a, z_b = _pair(200, 128, dtype=torch.float32)
    expected = NTXentLoss(0.05)(z_a, z_b)
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in products]
    try:
        if way == "one for all":
            torch.set_float32_matmul_precision("medium")
        else:
            products[0].fp32_precision, products[1].fp32_precision = "tf32", "bf16"
        allowed = [backend.fp32_precision for backend in products]
        assert allowed != before
        assert torch.equal(NTXentLoss(0.05)(z_a, z_b), expected)
        assert [backend.fp32_precision for backend in products] == allowed
        if way == "one for all":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(products, before, strict=True):
            backend.fp32_precision = precision
    assert torch.get_float32_matmul_precision() == "highest"


def test_only_the_gradient_is_kept() -> None:
    z_a, z_b = _pair(40, 16, dtype=torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = NTXentLoss(0.1)(z_a, z_b)
    node = loss.grad_fn
    while node is not None and "_NTXent" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None
    assert max(shape.numel() for shape in kept) == 80 * 16


def test_shapes_that_do_not_fit() -> None:
    for shapes in (((3, 4), (2, 4)), ((3, 4), (3, 5)), ((3, 4, 1), (3, 4, 1)), ((0, 4), (0, 4)), ((3, 0), (3, 0))):
        with pytest.raises(ValueError, match=r"z_a and z_b must be float \[n, d\], both the same and not empty, but are"):
            NTXentLoss(0.1)(*map(torch.ones, shapes))
    with pytest.raises(ValueError, match=r"but are \[3, 4\] torch.int64 and \[3, 4\] torch.int64"):
        NTXentLoss(0.1)(*torch.ones(2, 3, 4, dtype=torch.int64))


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "scale"])
def test_settings_that_are_no_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^NTXentLoss: {name}: {value} must be above 0, and finite$"):
        NTXentLoss(**{name: value})


def test_there_is_no_second_derivative() -> None:
    """Without a refusal it would be that of the normalisation alone."""
    z_a, z_b = _pair(5, 3)
    with pytest.raises(RuntimeError, match="no second derivative of NT-Xent"):
        torch.autograd.grad(NTXentLoss(0.3)(z_a, z_b), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative of NT-Xent"):
        (NTXentLoss(0.3, scale=2.0)(z_a, z_b) + z_a.square().sum()).backward(create_graph=True)


@pytest.mark.parametrize("norm", [1e-37, 1e-30, 1e-13, 1e-12, 1.0, 1.8e19, 1e25, 1e37, 3e38])
def test_rows_of_any_norm(norm: float) -> None:
    z_a, z_b = (norm * z.detach() / z.detach().norm(dim=1, keepdim=True) for z in _pair(9, 16))
    for shape in (torch.ones(9, 1), torch.ones(9, 1).scatter_(0, torch.tensor([[4]]), 1 / norm)):
        low = [(z * shape.double()).float().requires_grad_() for z in (z_a, z_b)]
        exact = [z.detach().double().requires_grad_() for z in low]
        rows = torch.cat([z / z.norm(dim=1, keepdim=True) for z in exact])
        expected = _value_and_gradient(nt_xent_reference(*rows.split(9), 0.2), *exact)
        value, gradient = _value_and_gradient(NTXentLoss(0.2)(*low), *low)
        assert value == pytest.approx(expected[0], rel=1e-5)
        errors, sizes = (gradient - expected[1]).norm(dim=1), expected[1].norm(dim=1)
        assert (errors <= 2e-5 * sizes).all()


def test_rows_of_ordinary_norm_keep_their_bits() -> None:
    for dtype in (torch.float32, torch.float64):
        z = (torch.cat(_pair(300, 128, dtype=dtype)) * torch.logspace(-9, 9, 600, dtype=dtype)[:, None]).detach()
        ours, torchs = (z.clone().requires_grad_() for _ in range(2))
        upstream = torch.randn(z.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
        rows, expected = unit_rows(ours), F.normalize(torchs, dim=1)
        assert torch.equal(rows, expected)
        rows.backward(upstream)
        expected.backward(upstream)
        assert torch.equal(ours.grad, torchs.grad)
    assert torch.equal(unit_rows(torch.tensor([[0.0, 0.0], [3e-45, 0.0]])), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def _uneven(world: World) -> list[str]:
    said = []
    loss = NTXentLoss(0.1)
    loss(torch.ones(3, 4), torch.ones(3, 4))
    last = world.rank == 2
    for a, b in (
        (torch.ones(3 + world.rank, 4), torch.ones(3 + world.rank, 4)),
        (torch.ones(3, 4 + last), torch.ones(3, 4 + last)),
        (torch.ones(3, 4), torch.ones(3 + last, 4)),
        (torch.ones(3, 4, dtype=torch.float64 if last else torch.float32),) * 2,
        (torch.ones(3, 4, *[1] * last),) * 2,
    ):
        try:
            loss(a, b)
        except ValueError as error:
            said.append(str(error))
    loss(torch.ones(5, 4), torch.ones(5, 4))
    for change in ({"temperature": 0.5}, {"decoupled": True}, {"scale": 2.0}):
        try:
            NTXentLoss(**change if last else {})(torch.ones(5, 4), torch.ones(5, 4))
        except ValueError as error:
            said.append(str(error))
    return said


def test_ranks_that_pass_something_else_are_refused_on_every_rank() -> None:
    line = "every rank must pass embeddings of one shape and type, but ranks 0, 1, ... pass "
    settings = "temperature, decoupled and scale must be the same, but ranks 0, 1, ... have "
    for said in ranks.run(_uneven, 3):
        assert said == [
            line + "[3, 4], [4, 4], [5, 4]",
            line + "[3, 4], [3, 4], [3, 5]",
            line + "[3, 4], [3, 4], what is none",
            line + "[3, 4], [3, 4], [3, 4] float64",
            line + "[3, 4], [3, 4], what is none",
            settings + "(0.1, False, 1), (0.1, False, 1), (0.5, False, 1)",
            settings + "(0.1, False, 1), (0.1, False, 1), (0.1, True, 1)",
            settings + "(0.1, False, 1), (0.1, False, 1), (0.1, False, 2)",
        ]


def _collectives(world: World) -> list[list[list[int]]]:
    seen: list[list[int]] = []
    plain = torch.distributed.all_gather

    def counted(stacked: list[Tensor], tensor: Tensor) -> None:
        seen.append(list(tensor.shape))
        plain(stacked, tensor)

    z_a, z_b = (z.detach().float().requires_grad_() for z in _pair(6, 4))
    with mock.patch("torch.distributed.all_gather", counted):
        loss = NTXentLoss(0.1)(z_a, z_b)
        forward = list(seen)
        loss.backward()
    return [forward, seen[len(forward) :]]


def test_two_collectives_in_the_forward_and_none_in_the_backward() -> None:
    """The embeddings and two numbers a row; before them shapes and settings."""
    for forward, backward in ranks.run(_collectives, 2):
        assert forward == [[6], [1, 12, 4], [1, 2, 12]]
        assert backward == []
