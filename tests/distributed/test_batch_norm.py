"""BatchNorm over all ranks on the CPU, against torch's own over the whole batch in one process."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import ranks
from simclr_dist.method import batch_norm
from simclr_dist.method.batch_norm import frozen_running_statistics, use_global_batch_norm
from simclr_dist.method.distributed import World, rank, world_size
from simclr_dist.system.errors import ConfigError

SHAPES = {"4-d": (12, 5, 4, 3), "2-d": (12, 5)}
CASES = [
    (shape, order, offset, dtype)
    for shape, order in (("2-d", "plain"), ("4-d", "plain"), ("4-d", "channels_last"))
    for offset in (0.0, 100.0)
    for dtype in (torch.float64, torch.float32)
]


def _case(shape: str, order: str, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, nn.Module]:
    """Input and upstream gradient of the whole batch, and torch's own BatchNorm with no trivial parameter."""
    generator = torch.Generator().manual_seed(7)
    x, upstream = (torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64) for _ in range(2))
    deviation = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 5, *[1] * (x.dim() - 2))
    x = (x + offset) * deviation
    norm = nn.BatchNorm1d(5) if x.dim() == 2 else nn.BatchNorm2d(5)
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 1.5, 2.0, 0.0]))
        norm.bias.copy_(torch.arange(5.0))
    x, upstream = x.to(dtype), upstream.to(dtype)
    if order == "channels_last":
        x, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    return x, upstream, norm.to(dtype)


def _my_rows(rows: int, here_rank: int, size: int) -> slice:
    """Uneven: rank 0 has 2 rows, the last rank what the others leave."""
    edges = [0, 2, 7, rows] if size == 3 else [0, 2, rows]
    return slice(edges[here_rank], edges[here_rank + 1])


def _pass(norm: nn.Module, x: Tensor, upstream: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    y.backward(upstream)
    return {
        "output": y.detach().to(dtype),
        "input gradient": x.grad.to(dtype),  # type: ignore[union-attr]
        "weight gradient": norm.weight.grad.to(dtype),
        "bias gradient": norm.bias.grad.to(dtype),
        "running mean": norm.running_mean.to(dtype),
        "running variance": norm.running_var.to(dtype),
        "batches": norm.num_batches_tracked.to(dtype),
    }


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return y.mean(1), (y.var(1, correction=0) + eps).rsqrt()


def _gather_stats(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    counts, total = counts[:, None], counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((invstds**-2 - eps + (means - mean) ** 2) * counts).sum(0) / total
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def _by_channel(x: Tensor, *numbers: Tensor) -> list[Tensor]:
    return [value.view(1, -1, *[1] * (x.dim() - 2)) for value in numbers]


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    mean, scale, bias = _by_channel(x, mean, invstd * weight, bias)
    return ((x - mean) * scale + bias).to(x.dtype)


def _reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    dims = [0, *range(2, x.dim())]
    sum_dy = grad.to(mean.dtype).sum(dims)
    sum_dy_xmu = (grad.to(mean.dtype) * (x - _by_channel(x, mean)[0])).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def _backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor, counts: Tensor
) -> Tensor:
    assert counts.dtype == torch.int32
    total = counts.sum()
    mean, of_dy, of_xmu, scale = _by_channel(x, mean, sum_dy / total, invstd**2 * sum_dy_xmu / total, invstd * weight)
    return ((grad - of_dy - (x - mean) * of_xmu) * scale).to(x.dtype)


# The operations that torch has for CUDA alone, by their definition.
_CUDA = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}


def _of_cuda(eps: float, count: int, *tensors: Tensor) -> Any:
    return batch_norm._CudaGlobalNorm.apply(eps, *tensors)


def _on_ranks(world: World, form: str) -> list[dict[str, Tensor]]:
    with contextlib.ExitStack() as stack:
        if form == "CUDA's":
            stack.enter_context(_cuda_operations())
            stack.enter_context(mock.patch.object(batch_norm._GlobalNorm, "apply", _of_cuda))
        return _of_cases(world)


@contextlib.contextmanager
def _cuda_operations() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, function in _CUDA.items():
            stack.enter_context(mock.patch.object(torch, name, function))
        yield


def test_the_form_for_cuda_alone() -> None:
    """On a GPU by torch's operations, elsewhere by their definition."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in CASES:
        x, upstream, norm = _case(*case)
        truth = _pass(norm.double(), x.double(), upstream.double(), torch.float64)
        x, upstream, norm = _case(*case)
        norm, moved = norm.to(device), x.detach().to(device).requires_grad_()
        with contextlib.nullcontext() if device.type == "cuda" else _cuda_operations():
            _, _, y = batch_norm._CudaGlobalNorm.apply(norm.eps, moved, norm.weight, norm.bias)
            y.backward(upstream.to(device, y.dtype))
        assert moved.grad is not None
        assert norm.weight.grad is not None
        found = {"output": y, "input gradient": moved.grad, "weight gradient": norm.weight.grad}
        for name, value in found.items():
            error = float((value.detach().cpu().double() - truth[name]).norm() / truth[name].norm())
            assert error < (1e-11 if case[3] == torch.float64 else 1e-4), f"{case}, {name}: relative error {error:.2e}"


def _of_cases(world: World) -> list[dict[str, Tensor]]:
    found = []
    for case in CASES:
        x, upstream, norm = _case(*case)
        wrapped = nn.Sequential(norm)
        use_global_batch_norm(wrapped)
        mine = _my_rows(len(x), world.rank, world.size)
        result = _pass(wrapped[0], x[mine], upstream[mine], torch.float64)
        wrapped.eval()
        result["evaluated"] = wrapped(x[mine]).detach().double()
        found.append(result)
    return found


def _second_derivative(world: World) -> str:
    wrapped = nn.Sequential(nn.BatchNorm1d(5))
    use_global_batch_norm(wrapped)
    x = torch.randn(4, 5, requires_grad=True)
    try:
        torch.autograd.grad(wrapped(x).sum(), x, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_there_is_no_second_derivative() -> None:
    for said in ranks.run(_second_derivative, 2):
        assert said == "there is no second derivative of NT-Xent, global BatchNorm and exact sums; leave create_graph out"


@pytest.mark.parametrize("form", ["the CPU's", "CUDA's"])
@pytest.mark.parametrize("size", [2, 3])
def test_equals_torch_on_the_whole_batch(size: int, form: str) -> None:
    by_rank = ranks.run(_on_ranks, size, form)
    for i, case in enumerate(CASES):
        x, upstream, norm = _case(*case)
        truth = _pass(norm.double(), x.double(), upstream.double(), torch.float64)
        truth["evaluated"] = norm.eval()(x.double()).detach()
        tolerance = 1e-12 if case[3] == torch.float64 else 1e-4
        if case[2] and case[3] == torch.float64:
            tolerance = 1e-11  # 100 deviations away from 0, x itself carries two digits fewer
        for name, expected in truth.items():
            parts = [result[i][name] for result in by_rank]
            if name in ("output", "input gradient", "evaluated"):
                found = [torch.cat(parts)]
            elif "gradient" in name:
                found = [torch.stack(parts).sum(0)]  # each rank's part, which DDP adds up
            else:
                found = parts  # the same on every rank
            for value in found:
                error = float((value - expected).norm() / expected.norm())
                assert error < tolerance, f"{case}, {name}: relative error {error:.2e}"


def _other_uses(world: World) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(6, 3, 8, 8, generator=generator)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))
    use_global_batch_norm(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))

    def statistics() -> list[Tensor]:
        return [buffer.clone() for buffer in model.buffers()]

    start = statistics()
    with frozen_running_statistics(model), torch.no_grad():
        first = model(x)
    frozen = statistics()
    second = model(x)
    after = statistics()
    with torch.autocast("cpu", torch.bfloat16):
        halved = model(x)
    halved.float().square().sum().backward()
    return {
        "kept": all(map(torch.equal, start, frozen)),
        "moved": not any(map(torch.equal, start, after)),
        "batches": int(model[1].num_batches_tracked) - int(start[2]),
        "same": torch.equal(first, second),
        "half": halved.detach().float(),
        "full": second.detach(),
        "gradients": [p.grad for p in model.parameters()],
        "world": (rank(), world_size()),
    }


def test_frozen_statistics_and_bfloat16() -> None:
    for i, result in enumerate(ranks.run(_other_uses, 2)):
        assert result["world"] == (i, 2)
        assert result["kept"], "the pass without a graph moved the running statistics"
        assert result["moved"]
        assert result["batches"] == 2  # one forward in float32, one in bfloat16, none while frozen
        assert result["same"], "both passes must give the same z, bit for bit"
        assert (result["half"] - result["full"]).abs().max() < 0.1
        assert all(gradient.isfinite().all() and gradient.any() for gradient in result["gradients"])


def _naive(x: Tensor) -> Iterator[Tensor]:
    yield x.mean(0)
    yield x.square().mean(0) - x.mean(0).square()


def test_the_offset_case_would_notice_naive_sums() -> None:
    """E[x^2] - E[x]^2 in float32 is far off where the mean is 100 deviations: the tolerance above is not idle."""
    x, _, _ = _case("2-d", "plain", 100.0, torch.float32)
    _, naive = _naive(x)
    assert ((naive - x.double().var(0, unbiased=False)) / x.double().var(0, unbiased=False)).abs().max() > 1e-3


def _kinds() -> list[nn.Module]:
    """Each kind of BatchNorm, with no trivial parameter."""
    kinds = [BatchNormAct2d(5), nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, momentum=None), nn.SyncBatchNorm(5)]
    kinds += [nn.BatchNorm2d(5, track_running_stats=False)]
    for kind in kinds:
        for parameter in kind.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return [kind.double() for kind in kinds]


def _whole_batch() -> Tensor:
    return 3 + torch.randn(SHAPES["4-d"], generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _of_each_kind(world: World) -> list[list[Tensor]]:
    x = _whole_batch()[_my_rows(12, world.rank, world.size)]
    wrapped = nn.Sequential(*_kinds())
    use_global_batch_norm(wrapped)
    return [[norm(x).detach(), *norm.buffers()] for norm in wrapped]


@pytest.mark.parametrize("size", [2, 3])
def test_every_kind_is_global(size: int) -> None:
    """timm's BatchNormAct2d is a subclass with a forward of its own, which ends in an activation."""
    by_rank = ranks.run(_of_each_kind, size)
    for i, norm in enumerate(_kinds()):
        plain = nn.BatchNorm2d(5).double() if isinstance(norm, nn.SyncBatchNorm) else norm
        plain.load_state_dict(norm.state_dict())
        expected = plain(_whole_batch()).detach()
        assert torch.allclose(torch.cat([of_rank[i][0] for of_rank in by_rank]), expected, rtol=1e-12, atol=1e-12)
        for of_rank in by_rank:
            for found, buffer in zip(of_rank[i][1:], plain.buffers(), strict=True):
                assert torch.allclose(found, buffer, rtol=1e-12)


def _without_weights(world: World) -> dict[str, Tensor]:
    x = _whole_batch()[_my_rows(12, world.rank, world.size)]
    only_weight = nn.BatchNorm2d(5)
    only_weight.bias = None  # as `bias=False` leaves it, which not every torch has
    norms = nn.Sequential(nn.BatchNorm2d(5, affine=False), only_weight)
    use_global_batch_norm(norms)
    halved = [norm(x.bfloat16()) for norm in norms]
    sum(y.float().square().sum() for y in halved).backward()
    return {str(i): norm.running_var for i, norm in enumerate(norms)}


def test_statistics_of_bfloat16_are_float32s_without_weights_too() -> None:
    """bfloat16 has 8 bits: a variance in it is off by up to 0.4 %."""
    whole = nn.BatchNorm2d(5, affine=False)
    whole(_whole_batch().bfloat16().float())
    for found in ranks.run(_without_weights, 2):
        for variance in found.values():
            assert torch.allclose(variance, whole.running_var, rtol=1e-5)


def test_statistics_that_would_stay_local_are_refused() -> None:
    for unknown in (EvoNorm2dB0(4), nn.InstanceNorm2d(4, track_running_stats=True)):
        with pytest.raises(ConfigError, match=r"stem\.0 is a \w+Norm\w+, with statistics of its batch"):
            use_global_batch_norm(nn.ModuleDict({"stem": nn.Sequential(unknown)}))
    use_global_batch_norm(nn.Sequential(FrozenBatchNorm2d(4), nn.InstanceNorm2d(4)))
