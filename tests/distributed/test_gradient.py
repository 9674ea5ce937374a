"""One global batch, one gradient: what W processes compute is what one process with the whole batch computes.

The trainer's own step (order, views, micro-batches, global BatchNorm, loss, DDP) on real ranks, against the plain
definition in one process: torch's BatchNorm, the whole similarity matrix, autograd.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranks
from simclr_dist.config.settings import Config, LossConfig, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.steps import StepDataset, two_views
from simclr_dist.method.distributed import World, all_gather
from simclr_dist.train.describe import view_settings
from simclr_dist.train.learner import Learner, backward, build_learner, cut
from simclr_dist.train.loop import training_step

ALONE = World(0, 1, 0, torch.device("cpu"))
SHARDS = np.array([20, 31, 49])
CONFIG = Config(
    seed=3,
    global_batch_size=48,
    steps=30,
    precision="fp64",
    model=ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=32, projector_dim=16),
    views=ViewsConfig(preset="imagenet", image_size=12),
    loss=LossConfig(temperature=0.2),
    optim=OptimConfig(base_lr=8.0),
)
BREAKS = ("factor W dropped", "gathered gradient dropped", "local statistics")


class _Images(ShardDataset):
    """Generated images of several sizes, each a function of its row."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(shard_sizes=SHARDS)  # type: ignore[assignment]

    def __getitem__(self, row: int) -> Sample:
        generator = torch.Generator().manual_seed(row)
        coarse = torch.rand(1, 3, 3 + row % 2, 4, generator=generator)
        smooth = F.interpolate(coarse, scale_factor=5, mode="bilinear")[0]
        return Sample((smooth * 255).to(torch.uint8), -1, row)


def _views(config: Config, world: World, step: int) -> tuple[Tensor, Tensor]:
    """This rank's two views in a step, as train.py makes them."""
    plan = Plan(SHARDS, config.seed, config.global_batch_size, config.micro_batches, rank=world.rank, world_size=world.size)
    settings = view_settings(config)
    return two_views(StepDataset(_Images(), plan, settings)[step], settings, world.device)


def _learner(config: Config, world: World, *, smooth: bool = False) -> Learner:
    """The trainer's, no parameter at a special value (0, 1) and, if asked, SiLU for ReLU."""
    learner = build_learner(config, world)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    for module in list(learner.model.modules()) if smooth else ():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return learner


def _flat_gradient(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def _detached_loss(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The gather of most peers: right value, and no gradient through the columns."""
    z, n = F.normalize(torch.cat([z_a, z_b])), len(z_a)
    columns = all_gather(z.detach()).flatten(0, 1)
    own = torch.arange(2 * n) + torch.distributed.get_rank() * 2 * n
    logits = (z @ columns.T / CONFIG.loss.temperature).scatter(1, own[:, None], -torch.inf)
    return F.cross_entropy(logits, own.roll(n))


@contextlib.contextmanager
def _broken(fault: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if fault == "factor W dropped":
            stack.enter_context(mock.patch("simclr_dist.method.loss.nt_xent.world_size", return_value=1))
        elif fault == "gathered gradient dropped":
            stack.enter_context(mock.patch("simclr_dist.train.learner.NTXentLoss", return_value=_detached_loss))
        elif fault == "local statistics":
            stack.enter_context(mock.patch("simclr_dist.train.learner.use_global_batch_norm"))
        yield


def _cases() -> Iterator[tuple[str, Config, bool, str]]:
    for micro_batches in (1, 2, 4):
        config = dataclasses.replace(CONFIG, micro_batches=micro_batches)
        yield f"float64, ReLU, {micro_batches} micro-batches", config, False, ""
        yield f"float32, SiLU, {micro_batches} micro-batches", dataclasses.replace(config, precision="fp32"), True, ""
        exact = dataclasses.replace(config, deterministic="exact", exact_piece=4 // micro_batches)
        yield f"float64, exact, {micro_batches} micro-batches", exact, False, ""
        yield f"float32, exact, {micro_batches} micro-batches", dataclasses.replace(exact, precision="fp32"), True, ""
    for fault in BREAKS:
        yield fault, CONFIG, False, fault


def _gradients(world: World) -> dict[str, Tensor]:
    found = {}
    for name, config, smooth, fault in _cases():
        with _broken(fault):
            learner = _learner(config, world, smooth=smooth)
            backward(learner, cut(*_views(config, world, step=1), config.micro_batches))
        found[name] = _flat_gradient(learner)
    return found


def _trajectory(world: World) -> dict[str, Any]:
    """Thirty steps, every fifth of them in two micro-batches."""
    learner = _learner(CONFIG, world)
    for step in range(30):
        config = dataclasses.replace(CONFIG, micro_batches=1 if step % 5 else 2)
        outcome = training_step(learner, cut(*_views(config, world, step), config.micro_batches), config, lr=config.peak_lr)
    state = learner.model.state_dict()
    return {
        "parameters": torch.cat([p.detach().flatten() for p in learner.model.parameters()]),
        "statistics": torch.cat([value.flatten() for name, value in state.items() if "running" in name]),
        "batches": int(state["encoder.bn1.num_batches_tracked"]),
        "loss": outcome["loss"],
        "clipped": int(learner.counters["clipped"]),
    }


def _everything(world: World) -> dict[str, Any]:
    return {"gradients": _gradients(world), "trajectory": _trajectory(world)}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    """By world size, each rank's results."""
    return {size: ranks.run(_everything, size) for size in (1, 2, 3, 4)}


def _definition(learner: Learner, view_a: Tensor, view_b: Tensor, micro_batches: int, temperature: float) -> Tensor:
    """The gradient by equation 1 of the paper, on one process's own torch BatchNorm; a block of anchors at a time."""
    dtype = next(learner.model.parameters()).dtype
    halves = [
        learner.model(torch.cat(micro_batch)).chunk(2)
        for micro_batch in zip(view_a.to(dtype).chunk(micro_batches), view_b.to(dtype).chunk(micro_batches), strict=True)
    ]
    z = torch.cat([torch.cat(view) for view in zip(*halves, strict=True)])
    leaf = z.detach().requires_grad_()
    for anchors in torch.arange(len(z)).split(1024):
        unit = leaf / leaf.norm(dim=1, keepdim=True)
        logits = unit[anchors] @ unit.T / temperature
        logits = logits.masked_fill(anchors[:, None] == torch.arange(len(z)), -torch.inf)
        positive = (anchors + len(z) // 2) % len(z)
        (F.cross_entropy(logits, positive, reduction="sum") / len(z)).backward()
    z.backward(leaf.grad)
    return _flat_gradient(learner)


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def truths() -> dict[str, Tensor]:
    found = {}
    for name, config, smooth, _ in _cases():
        # The float32 gradient is held against float64's: two float32 results could be wrong alike.
        precise = dataclasses.replace(config, precision="fp64", deterministic=False)
        learner = _learner(precise, ALONE, smooth=smooth)
        views = _views(precise, ALONE, step=1)
        found[name] = _definition(learner, *views, config.micro_batches, config.loss.temperature)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("float64, ReLU", 1e-12), ("float32, SiLU", 5e-5), ("float64, exact", 1e-12), ("float32, exact", 5e-5)],
)
def test_gradient_is_that_of_one_process(
    results: dict[int, Any], truths: dict[str, Tensor], kind: str, tolerance: float, micro_batches: int
) -> None:
    name = f"{kind}, {micro_batches} micro-batches"
    for size, by_rank in results.items():
        errors = [_error(result["gradients"][name].double(), truths[name]) for result in by_rank]
        print(f"{name}, {size} processes: relative error {max(errors):.2e}")
        assert max(errors) < tolerance, f"{size} processes"
        same = results[1] if "exact" in kind else by_rank
        assert all(torch.equal(result["gradients"][name], same[0]["gradients"][name]) for result in by_rank)


def test_micro_batches_are_another_objective(truths: dict[str, Tensor]) -> None:
    """Through BatchNorm's statistics: so the test above does compare unlike things."""
    whole, quarters = (truths[f"float64, ReLU, {micro_batches} micro-batches"] for micro_batches in (1, 4))
    assert _error(quarters, whole) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_gradient_is_noticed(results: dict[int, Any], truths: dict[str, Tensor], fault: str) -> None:
    if fault != "gathered gradient dropped":
        assert _error(results[1][0]["gradients"][fault], truths[fault]) < 1e-12  # in one process the others are no faults
    for size in (2, 3, 4):
        found = results[size][0]["gradients"][fault]
        print(f"{fault}, {size} processes: relative error {_error(found, truths[fault]):.3f}")
        assert _error(found, truths[fault]) > 0.01
        if fault == "factor W dropped":
            assert _error(found * size, truths[fault]) < 1e-12


@pytest.mark.slow
def test_thirty_steps_end_alike(results: dict[int, Any]) -> None:
    alone = results[1][0]["trajectory"]
    start = torch.cat([p.detach().flatten() for p in _learner(CONFIG, ALONE).model.parameters()])
    print(f"the parameters changed by {_error(alone['parameters'], start):.3f} of their norm")
    assert _error(alone["parameters"], start) > 0.1, "nothing was learned, so nothing is compared"
    assert alone["clipped"] > 0, "clipping was never at work"
    assert alone["batches"] == 36
    for size, by_rank in results.items():
        for end in (result["trajectory"] for result in by_rank):
            for what in ("parameters", "statistics", "loss"):
                error = _error(end[what], alone[what])
                print(f"{size} processes, {what}: relative error {error:.2e}")
                assert error < 1e-11
            assert (end["batches"], end["clipped"]) == (alone["batches"], alone["clipped"])


class _TinyEncoder(nn.Sequential):
    """What a global batch of 4096 leaves room for in a test: one layer, with BatchNorm or without."""

    feature_size = 24
    batch_norm = True

    def __init__(self, *_: object, **__: object) -> None:
        norm = nn.BatchNorm1d(24) if self.batch_norm else nn.Identity()
        super().__init__(nn.Flatten(), nn.Linear(48, 24, bias=False), norm, nn.SiLU())


class _TinyEncoderWithoutNorm(_TinyEncoder):
    batch_norm = False


def _large(micro_batches: int, *, batch_norm: bool) -> Config:
    model = dataclasses.replace(CONFIG.model, projector_batch_norm=batch_norm)
    return dataclasses.replace(CONFIG, global_batch_size=4096, micro_batches=micro_batches, channels_last=False, model=model)


LARGE_SHARDS = np.array([3000, 2000])
LARGE = [_large(micro_batches, batch_norm=batch_norm) for micro_batches in (64, 16, 4) for batch_norm in (True, False)]


def _large_learner(config: Config, world: World) -> Learner:
    encoder = _TinyEncoder if config.model.projector_batch_norm else _TinyEncoderWithoutNorm
    with mock.patch("simclr_dist.method.encoders.ResNet", encoder):
        return _learner(config, world, smooth=True)


def _large_views(config: Config, world: World) -> Iterator[Tensor]:
    rows = Plan(LARGE_SHARDS, config.seed, 4096, config.micro_batches, rank=world.rank, world_size=world.size)[0][1]
    pixels = torch.randn(5000, 2, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pixels[:, 1] += 2 * pixels[:, 0]
    return iter(pixels[rows].unbind(1))


def _large_gradients(world: World) -> list[Tensor]:
    found = []
    for config in LARGE:
        learner = _large_learner(config, world)
        backward(learner, cut(*_large_views(config, world), config.micro_batches))
        found.append(_flat_gradient(learner))
    return found


@pytest.fixture(scope="module")
def large_truth() -> list[Tensor]:
    """By the definition: the whole batch at once, or where there is BatchNorm in as many micro-batches."""
    found: dict[int, Tensor] = {}
    cuts = [config.micro_batches if config.model.projector_batch_norm else 1 for config in LARGE]
    for config, micro_batches in zip(LARGE, cuts, strict=True):
        if micro_batches not in found:
            learner = _large_learner(config, ALONE)
            views = _large_views(config, ALONE)
            found[micro_batches] = _definition(learner, *views, micro_batches, config.loss.temperature)
    return [found[micro_batches] for micro_batches in cuts]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradient_of_4096_images(large_truth: list[Tensor], size: int) -> None:
    for by_config in ranks.run(_large_gradients, size):
        for config, found, truth in zip(LARGE, by_config, large_truth, strict=True):
            norm = "with" if config.model.projector_batch_norm else "without"
            error = _error(found, truth)
            print(f"4096 images, {config.micro_batches} micro-batches, {size} processes, {norm} BatchNorm: error {error:.2e}")
            assert error < 1e-12
