"""One gradient for others' networks too: with drop path, any cut, and timm's BatchNorm with an activation in it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ranks
import training_runs as runs
from simclr_dist.config.settings import Config, LossConfig, ModelConfig, ViewsConfig
from simclr_dist.data.order import Plan
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import nt_xent_reference
from simclr_dist.train.learner import Learner, backward, build_learner, cut, keyed

ALONE = World(0, 1, 0, torch.device("cpu"))
SHARDS = np.array([20, 31, 49])
STEP = 2
DROPPING = [("timm/test_vit", 0.3), ("timm/test_convnext", 0.3)]
SOME = Config(
    seed=3,
    global_batch_size=24,
    steps=30,
    precision="fp64",
    model=ModelConfig("timm/test_vit", projector_hidden=32, projector_dim=16, projector_batch_norm=False),
    views=ViewsConfig(image_size=32),
    loss=LossConfig(temperature=0.2),
)


def _config(encoder: str, drop_path: float | None, micro_batches: int) -> Config:
    norm = drop_path is None  # of the networks here, those with BatchNorm have no drop path
    model = dataclasses.replace(SOME.model, encoder=encoder, drop_path=drop_path, projector_batch_norm=norm)
    return dataclasses.replace(SOME, model=model, micro_batches=micro_batches, activation_checkpointing=micro_batches == 2)


def _learner(config: Config, world: World) -> Learner:
    """No parameter has a special value: a scale of 1e-6 would hide what is dropped."""
    learner = build_learner(config, world)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return learner


def _mine(config: Config, world: World) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's two views, and the rows of each micro-batch."""
    batch, pieces = config.global_batch_size, config.micro_batches
    plan = Plan(SHARDS, config.seed, batch, pieces, rank=world.rank, world_size=world.size)
    rows = torch.from_numpy(plan[STEP][1].astype(np.int64))
    pixels = torch.randn(100, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pixels[:, 1] += pixels[:, 0]
    view_a, view_b = pixels[rows].unbind(1)
    return view_a, view_b, list(rows.chunk(pieces))


def _gradient(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


CASES = [
    *[(name, rate, pieces) for name, rate in DROPPING for pieces in (1, 2, 4)],
    ("timm/test_efficientnet", None, 1),
    ("timm/test_efficientnet", None, 2),
]


def _gradients(world: World) -> list[Tensor]:
    found = []
    for case in CASES:
        config = _config(*case)
        learner = _learner(config, world)
        view_a, view_b, rows = _mine(config, world)
        backward(learner, cut(view_a, view_b, config.micro_batches), rows=rows, step=STEP)
        found.append(_gradient(learner))
    return found


def _without_keys(world: World) -> Tensor:
    learner, (view_a, view_b, _) = _learner(_config(*CASES[0]), world), _mine(_config(*CASES[0]), world)
    backward(learner, cut(view_a, view_b, 1))
    return _gradient(learner)


@pytest.fixture(scope="module")
def truth() -> list[Tensor]:
    """By the definition: one process, torch's BatchNorm, the whole matrix, and no cut where there is no BatchNorm."""
    found: list[Tensor] = []
    for name, rate, pieces in CASES:
        config = _config(name, rate, 1 if rate else pieces)
        learner = _learner(dataclasses.replace(config, activation_checkpointing=False), ALONE)
        view_a, view_b, rows = _mine(config, ALONE)
        halves = []
        for (a, b), row in zip(cut(view_a, view_b, config.micro_batches), rows, strict=True):
            with keyed(learner.model, config.seed, STEP, row):
                halves.append(learner.model(torch.cat([a, b])).chunk(2))
        z_a, z_b = (torch.cat(view) for view in zip(*halves, strict=True))
        nt_xent_reference(z_a, z_b, config.loss.temperature).backward()
        found.append(_gradient(learner))
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradient_is_that_of_one_process_and_one_piece(truth: list[Tensor], size: int) -> None:
    for of_rank in ranks.run(_gradients, size):
        for case, found, expected in zip(CASES, of_rank, truth, strict=True):
            print(f"{size} processes, {case}: relative error {_error(found, expected):.2e}")
            assert _error(found, expected) < 1e-12


def test_without_keys_ranks_would_drop_alike(truth: list[Tensor]) -> None:
    assert _error(ranks.run(_without_keys, 2)[0], truth[0]) > 0.1


@pytest.mark.slow
def test_killed_and_started_again_a_vit_ends_with_the_same_bits(tmp_path: Path) -> None:
    shards = runs.make_shards(tmp_path / "images")
    model = {"encoder": "timm/test_vit", "stem": "imagenet", "drop_path": 0.3}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        optim = {"name": "adamw", "base_lr": 1e-3, "lr_rule": "constant", "betas": [0.9, 0.95]}
        changes = {"model": model, "optim": optim, "views": {"image_size": 32}, "micro_batches": 2}
        runs.write_config(folder, shards, steps=12, **changes)
    runs.train(straight, 2)
    runs.killed_after(killed, 2, 8)
    assert "resumed at step" in runs.train(killed, 2)
    runs.assert_same_bits(runs.checkpoint(killed / "run", 12), runs.checkpoint(straight / "run", 12))
    assert runs.metrics(killed / "run") == runs.metrics(straight / "run")
