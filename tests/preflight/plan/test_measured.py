"""The plan against what runs: the CPU allocator's own records, and the collectives of 2 and 4 processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from measured import config, loss_peak, step_peak, views, wire
from simclr_dist.config.settings import Config, ModelConfig
from simclr_dist.method.distributed import World
from simclr_dist.preflight.plan.memory import checkpoint_bytes, loss_bytes, rank_memory
from simclr_dist.preflight.plan.trace import footprint
from simclr_dist.preflight.plan.traffic import log_traffic, step_traffic
from simclr_dist.run import checkpoint
from simclr_dist.train.learner import build_learner, cut
from simclr_dist.train.loop import training_step


def predicted_step(of: Config) -> float:
    """What `step_peak` measures, by the plan."""
    found = footprint(of, of.views.image_size or 0)
    memory = rank_memory(of, found, 1, on_cuda=False)
    peak = max(size for phase, size in memory.phases.items() if phase != "views")
    return peak - memory.weights - (memory.optimizer or 0) - memory.views


@pytest.mark.parametrize("changes", [{}, {"micro_batches": 4}, {"activation_checkpointing": True}], ids=str)
def test_memory_of_a_step(changes: dict[str, Any]) -> None:
    of = config(global_batch_size=128, **changes)
    assert predicted_step(of) == pytest.approx(step_peak(of), rel=0.1)


@pytest.mark.parametrize(("images", "dim"), [(512, 128), (2048, 64), (2048, 128), (4096, 128)])
def test_memory_of_the_loss(images: int, dim: int) -> None:
    assert loss_bytes(2 * images, 2 * images, dim, 4, on_cuda=False) == pytest.approx(loss_peak(images, dim), rel=0.1)


SMALL = ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=64, projector_dim=32)


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_on_the_wire(world_size: int) -> None:
    """Equal, to the byte."""
    several: list[dict[str, Any]] = [
        {},
        {"micro_batches": 2, "activation_checkpointing": True},
        {"micro_batches": 2, "precision": "fp64"},
    ]
    configs = [config(global_batch_size=16, model=SMALL, **changes) for changes in several]
    for of, by_rank in [(of, ranks.run(wire, world_size, of)) for of in configs]:
        found = footprint(of, 32)
        traffic = step_traffic(of, found, world_size, on_cuda=False)
        for measured in by_rank:
            assert sum(part.sent for part in traffic) == measured["bytes"]
            # DDP ends a bucket behind a whole parameter, so there may be one less.
            assert sum(part.calls for part in traffic) == pytest.approx(measured["calls"], abs=2)
            assert log_traffic(of, found, world_size).sent == measured["log"]


def test_a_checkpoints_size(tmp_path: Path) -> None:
    of = config(global_batch_size=4)
    learner = build_learner(of, World(0, 1, 0, torch.device("cpu")))
    training_step(learner, cut(*views(of, 4), of.micro_batches), of, 0.1)
    state = {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict()}
    path = checkpoint.save(tmp_path, 1, state)
    assert checkpoint_bytes(of, footprint(of, 32)) == pytest.approx(path.stat().st_size, rel=0.01)
