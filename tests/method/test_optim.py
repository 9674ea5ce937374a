"""LARS against its published formula, what is left out of it, the schedule, and steps that can be skipped."""

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_optimizer
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from host_sync import no_host_sync
from simclr_dist.config.together import CONTIGUOUS_OPTIMIZERS, REFUSED_OPTIMIZERS, optimizer_names
from simclr_dist.method.encoders import build_encoder
from simclr_dist.method.lars import LARS
from simclr_dist.method.optim import build_optimizer, learning_rate, parameter_groups, step_unless


def _parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (5, 4), (5,), (5,), (6, 5)]
    found = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    with torch.no_grad():
        found[-1].zero_()  # a weight norm of 0: the trust ratio is 1
    return found


def _gradient(step: int, index: int, shape: torch.Size) -> Tensor:
    """A few of them are zero: of single elements, and of whole tensors."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index), dtype=torch.float64)
    return torch.zeros_like(gradient) if (step + index) % 7 == 0 else gradient


def _official_lars(weights: list[Tensor], groups: list[tuple[slice, float, bool]], rates: list[float]) -> list[Tensor]:
    """A transcription of google-research/simclr's `lars_optimizer.py` (classic momentum), one tensor at a time."""
    weights = [weight.clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step, rate in enumerate(rates):
        for members, decay, adapt in groups:
            for i in range(*members.indices(len(weights))):
                grad = _gradient(step, i, weights[i].shape)
                if decay:
                    grad = grad + decay * weights[i]
                trust_ratio = 1.0
                if adapt:
                    w_norm, g_norm = float(weights[i].norm()), float(grad.norm())
                    trust_ratio = (0.001 * w_norm / g_norm if g_norm > 0 else 1.0) if w_norm > 0 else 1.0
                momenta[i] = 0.9 * momenta[i] + rate * trust_ratio * grad
                weights[i] = weights[i] - momenta[i]
    return weights


@pytest.mark.parametrize("decay", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("skippable", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_lars_is_the_official_one(monkeypatch: pytest.MonkeyPatch, decay: float, skippable: bool, foreach: bool) -> None:
    monkeypatch.setattr("simclr_dist.method.lars._CACHE_BYTES", 300)
    weights = _parameters()
    start = [weight.detach().clone() for weight in weights]
    rates = [learning_rate(step, peak=4.8, warmup_steps=10, total_steps=50) for step in range(50)]
    split = [(slice(0, 2), decay, True), (slice(2, 4), 0.0, False), (slice(4, 5), decay, True)]
    groups = [{"params": weights[members], "weight_decay": wd, "adapt": adapt} for members, wd, adapt in split]
    optimizer = LARS(groups, lr=0.0, foreach=foreach)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for i, weight in enumerate(weights):
            weight.grad = _gradient(step, i, weight.shape)
        if skippable:
            step_unless(optimizer, torch.tensor(False))
        else:
            optimizer.step()
    for weight, expected in zip(weights, _official_lars(start, split, rates), strict=True):
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_equals_torch_optimizers_at_constant_rate() -> None:
    """With its two cures: momentum outside the rate is the same while the rate stands still."""
    ours, theirs = _parameters()[:4], _parameters()[:4]
    groups = [
        [{"params": p[:2], "weight_decay": 1e-6, "adapt": True}, {"params": p[2:], "weight_decay": 0.0, "adapt": False}]
        for p in (ours, theirs)
    ]
    lars = build_optimizer("lars", groups[0], lr=0.5)
    oracle = build_optimizer("torch_optimizer.lars", groups[1], lr=0.5)
    assert type(oracle) is torch_optimizer.LARS
    for step in range(50):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            for weight in pair:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(99 * step + i)).double()
        lars.step()
        oracle.step()
    for weight, expected, start in zip(ours, theirs, _parameters(), strict=False):
        assert (weight - start).norm() > 0.01 * start.norm()
        assert (weight - expected).norm() < 1e-5 * (expected - start).norm()


def test_lars_runs_a_closure_and_ignores_missing_gradients() -> None:
    weights = _parameters()
    optimizer = LARS(weights, lr=0.1)
    before = [weight.detach().clone() for weight in weights]

    def closure() -> float:
        loss = weights[0].square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(float(before[0].square().sum()))
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [False, True, True, True, True]


def test_parameter_groups_of_a_resnet() -> None:
    model = torchvision.models.resnet50()
    weights, excluded = parameter_groups(model, 1e-6)
    assert (weights["weight_decay"], weights["adapt"]) == (1e-6, True)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)
    found = [id(p) for group in (weights, excluded) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert len(excluded["params"]) == 106 + 1  # 53 BatchNorms, four of them named downsample.*.1, and fc.bias
    # In a ResNet everything with one dimension is BatchNorm or bias: a rule without module types agrees.
    assert {id(p) for p in excluded["params"]} == {id(p) for p in model.parameters() if p.dim() == 1}
    assert sum(p.numel() for p in excluded["params"]) == 53_120 + 1000


def test_learning_rate() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=4.8, warmup_steps=10, total_steps=110)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.48, 2.4, 4.8])
    assert [rate(step) for step in (10, 35, 60, 85)] == pytest.approx(
        [4.8, 2.4 * (1 + math.sqrt(0.5)), 2.4, 2.4 * (1 - math.sqrt(0.5))]
    )
    assert rate(109) == pytest.approx(4.8 * math.sin(math.pi / 200) ** 2, rel=1e-9)
    assert rate(110) == rate(500) == pytest.approx(0, abs=1e-15)
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=5) == 2.0
    assert learning_rate(3, peak=2.0, warmup_steps=4, total_steps=4) == 2.0


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_rates_that_are_none(name: str) -> None:
    for value in (-0.1, math.nan, math.inf, *([1.0] if name == "momentum" else [])):
        for everywhere in (False, True):
            settings = {"lr": 0.1, **({name: value} if everywhere else {})}
            group = {"params": [torch.zeros(2, requires_grad=True)], **({} if everywhere else {name: value})}
            with pytest.raises(ValueError, match=rf"^LARS: {name}: {value} must be at least 0 and below (1|inf)$"):
                LARS([group], **settings)
    with pytest.raises(ValueError, match=r"^learning_rate: step -1, "):
        learning_rate(-1, peak=1.0, warmup_steps=0, total_steps=5)
    for changes in ({"peak": -1.0}, {"peak": math.nan}, {"warmup_steps": -1}, {"warmup_steps": 6}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} {next(iter(changes.values()))}"):
            learning_rate(0, **{"peak": 1.0, "warmup_steps": 0, "total_steps": 5} | changes)


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))


def _backward(model: nn.Module, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = None
    loss = (model(torch.randn(8, 3, 6, 6, generator=generator)) - 1).square().mean()
    loss.backward()
    return loss.item()


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        tensors += [value.clone() for _, value in sorted(optimizer.state[p].items()) if isinstance(value, Tensor)]
    return tensors


@pytest.mark.parametrize("name", ["lars", "muon", "sgd", "adamw", "torch_optimizer.yogi"])
@pytest.mark.parametrize("first", [0, 3], ids=["at once", "after three steps"])
def test_a_skipped_step_changes_nothing(name: str, first: int) -> None:
    """Two runs, one of which meets non-finite gradients on the way: they stay equal, bit for bit."""
    ends = []
    for bad in (False, True):
        model = _model()
        optimizer = build_optimizer(name, parameter_groups(model, 1e-4), lr=0.01)
        for step in range(6):
            if bad and step == first:
                before = _snapshot(model, optimizer) if first else [p.detach().clone() for p in model.parameters()]
                for value in (torch.nan, torch.inf):
                    for p in model.parameters():
                        p.grad = torch.full_like(p, value)
                    step_unless(optimizer, torch.tensor(True))
                after = _snapshot(model, optimizer)
                assert all(map(torch.equal, before, after))
            _backward(model, step)
            step_unless(optimizer, torch.tensor(False))
        ends.append(_snapshot(model, optimizer))
    assert len(ends[0]) == len(ends[1])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("name", ["lars", "muon", "sgd", "adamw"])
def test_skipping_is_decided_on_the_device(name: str) -> None:
    """No read of the flag by the host, for those that can do without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model().to(device)
    optimizer = build_optimizer(name, parameter_groups(model, 1e-4), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    skip = torch.zeros((), dtype=torch.bool, device=device)
    step_unless(optimizer, skip)
    with no_host_sync():
        step_unless(optimizer, skip)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_lars_step_of_a_resnet50_is_a_few_operations() -> None:
    model = torchvision.models.resnet50()
    optimizer = LARS(parameter_groups(model, 1e-6), lr=0.1, foreach=True)  # as on CUDA
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    skip = torch.tensor(False)
    step_unless(optimizer, skip)
    with _Count() as count:
        step_unless(optimizer, skip)
    assert len(count.names) <= 25, count.names


def test_lars_takes_a_gradient_that_lies_in_another_order() -> None:
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.arange(1.0, 37.0).view(2, 3, 3, 2).contiguous(memory_format=torch.channels_last))
        optimizer = LARS([weight], lr=0.5)
        for step in range(3):
            weight.grad = torch.linspace(-1, 1 + step, 36).view(2, 3, 3, 2).contiguous(memory_format=order)
            optimizer.step()
        found.append(weight.detach().contiguous())
    assert torch.equal(*found)


def test_trust_ratios_are_there_for_the_log() -> None:
    weights = _parameters()
    optimizer = LARS([{"params": weights[:2]}, {"params": weights[2:4], "adapt": False}, {"params": weights[4:]}], lr=0.1)
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    expected = [0.001 * float(weight.detach().norm()) / float((2 * torch.ones_like(weight)).norm()) for weight in weights[:2]]
    optimizer.step()
    assert [ratios.tolist() for ratios in optimizer.trust_ratios] == [pytest.approx(expected), [1.0]]
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}


def test_lars_takes_a_checkpoint_in_another_order() -> None:
    plain = nn.Parameter(torch.arange(1.0, 37.0).view(2, 2, 3, 3))
    last = nn.Parameter(plain.detach().clone(memory_format=torch.preserve_format).contiguous(memory_format=torch.channels_last))
    first, second = LARS([plain], lr=0.5), LARS([last], lr=0.5)
    for step in range(2):
        for weight in (plain, last):
            weight.grad = torch.linspace(-1, 1 + step, 36).view(2, 2, 3, 3).clone()
        first.step()
        if step == 0:
            with torch.no_grad():
                last.copy_(plain)
            second.load_state_dict(copy.deepcopy(first.state_dict()))  # or they share the tensors
        else:
            second.step()
    assert torch.equal(plain, last)


def test_lars_refuses_a_view_with_gaps() -> None:
    weight = nn.Parameter(torch.ones(4, 6)[:, ::2])
    weight.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"shape \[4, 3\] is a view with gaps"):
        LARS([weight], lr=0.1).step()


@pytest.mark.parametrize("skip", [False, True])
def test_lars_without_momentum(skip: bool) -> None:
    weights = _parameters()[:2]
    before = [weight.detach().clone() for weight in weights]
    optimizer = build_optimizer("lars", [{"params": weights, "weight_decay": 0.0, "adapt": False}], lr=0.5, momentum=0.0)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        step_unless(optimizer, torch.tensor(skip))
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old if skip else old - 1.0)


@pytest.mark.parametrize("adapt", [False, True])
def test_lars_under_torchs_grad_scaler(adapt: bool) -> None:
    ends = []
    for scaled in (False, True):
        weights = _parameters(torch.float32)[:4]
        optimizer = LARS([{"params": weights, "weight_decay": 0.01, "adapt": adapt}], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for _ in range(3):
            loss = sum(weight.square().sum() for weight in weights)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append([weight.detach() for weight in weights])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_lars_at_rate_0_only_remembers() -> None:
    weights = _parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = LARS(weights, lr=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(map(torch.equal, weights, before))
    assert not any(optimizer.state[weight]["momentum_buffer"].any() for weight in weights)


@pytest.fixture
def every_warning() -> Iterator[None]:
    """torch tells of deprecated calls once a process: without this, of the first optimizer alone."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_steps_and_is_saved(name: str) -> None:
    model = _model()
    contiguous = name.removeprefix("torch_optimizer.") in CONTIGUOUS_OPTIMIZERS
    order = torch.contiguous_format if contiguous else torch.channels_last
    model.to(memory_format=order)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(name, parameter_groups(model, 1e-4), lr=1e-3)
    for step in range(5):
        _backward(model, step)
        step_unless(optimizer, torch.tensor(False))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, start, model.parameters()))

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = _model().to(memory_format=order)
    resumed.load_state_dict(state["model"])
    other = build_optimizer(name, parameter_groups(resumed, 1e-4), lr=1e-3)
    other.load_state_dict(state["optimizer"])
    for step in range(5, 8):
        for each, its in ((model, optimizer), (resumed, other)):
            _backward(each, step)
            step_unless(its, torch.tensor(False))
    assert all(map(torch.equal, model.parameters(), resumed.parameters())), "a resumed run differs"


def test_every_name_of_torch_optimizer_is_offered_or_refused() -> None:
    offered = {name.removeprefix("torch_optimizer.") for name in optimizer_names()} - {"muon", "sgd", "adamw"}
    assert not offered & set(REFUSED_OPTIMIZERS)
    assert offered | set(REFUSED_OPTIMIZERS) == set(torch_optimizer._NAME_OPTIM_MAP)


def test_groups_are_left_as_they_are() -> None:
    groups = parameter_groups(_model(), 1e-4)
    before = copy.copy(groups[0])
    build_optimizer("sgd", groups, lr=0.1)
    assert groups[0].keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "size", "excluded"),
    [
        ("timm/test_vit", 32, {"cls_token", "pos_embed", "LayerNorm.weight", "bias"}),
        ("timm/test_convnext", 32, {"ConvNeXtBlock.gamma", "LayerNorm2d.weight", "LayerNorm.weight", "bias"}),
        ("timm/test_efficientnet", 32, {"BatchNormAct2d.weight", "bias"}),
        ("timm/swinv2_tiny_window8_256", 256, {"WindowAttention.logit_scale", "q_bias", "v_bias", "LayerNorm.weight", "bias"}),
        ("torchvision/swin_t", 64, {"ShiftedWindowAttention.relative_position_bias_table", "LayerNorm.weight", "bias"}),
        ("torchvision/vit_b_32", 64, {"class_token", "pos_embedding", "LayerNorm.weight", "bias", "in_proj_bias"}),
    ],
)
def test_parameter_groups_of_others(name: str, size: int, excluded: set[str]) -> None:
    """All that is neither decayed nor adapted is there for a reason; the weights are of layers that multiply."""
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=size)
    weights, others = ({id(p) for p in group["params"]} for group in parameter_groups(encoder, 0.1))
    found, kinds = set(), set()
    for module in encoder.modules():
        for key, parameter in module.named_parameters(recurse=False):
            kind = type(module).__name__
            if id(parameter) in others:
                found.add(key if key.endswith("bias") or module is encoder or key in excluded else f"{kind}.{key}")
            else:
                kinds.add(kind)
    assert found == excluded
    assert kinds <= {"Linear", "Conv2d", "Conv2dSame", "MultiheadAttention", "NonDynamicallyQuantizableLinear"}
    assert len(weights) + len(others) == len(list(encoder.parameters()))


def test_betas_are_adamws() -> None:
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    assert build_optimizer("adamw", groups, lr=0.1, betas=(0.8, 0.95)).param_groups[0]["betas"] == (0.8, 0.95)
