"""The plan against what runs: the CPU allocator's own records, and the collectives of 2 and 4 processes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from faults.small_disk import PAGE, SmallDisk, why_not
from measured import config, loss_peak, step_peak, views, wire
from simclr_dist.config.settings import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.encoder.file import export_encoder, projector_path
from simclr_dist.method.distributed import World
from simclr_dist.preflight.plan.memory import checkpoint_bytes, loss_bytes, rank_memory
from simclr_dist.preflight.plan.report import make_plan, text
from simclr_dist.preflight.plan.trace import footprint
from simclr_dist.preflight.plan.traffic import log_traffic, step_traffic
from simclr_dist.run import checkpoint
from simclr_dist.train.learner import build_learner, cut
from simclr_dist.train.loop import training_step
from simclr_dist.train.state import saved_bytes


def predicted_step(of: Config) -> float:
    """What `step_peak` measures, by the plan."""
    found = footprint(of, of.views.image_size or 0)
    memory = rank_memory(of, found, 1, on_cuda=False)
    peak = max(size for phase, size in memory.phases.items() if phase != "views")
    return peak - memory.weights - (memory.optimizer or 0) - memory.views


OTHERS: list[dict[str, Any]] = [
    {"model": ModelConfig(name, projector_hidden=64), "views": ViewsConfig(preset="small", image_size=64)}
    for name in ("timm/test_vit", "timm/test_convnext")
]

EXACT = {"deterministic": "exact", "exact_piece": 4}


@pytest.mark.parametrize("changes", [{}, {"micro_batches": 4}, {"activation_checkpointing": True}, EXACT, *OTHERS], ids=str)
def test_memory_of_a_step(changes: dict[str, Any]) -> None:
    of = config(global_batch_size=128, **changes)
    (measured,) = ranks.run(_step_peak, 1, of)
    assert predicted_step(of) == pytest.approx(measured, rel=0.1)


def _step_peak(_: World, of: Config) -> int:
    return step_peak(of)


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
        {"micro_batches": 2, "deterministic": "exact", "exact_piece": 2},
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


@pytest.mark.parametrize("name", ["lars", "muon", "sgd", "adamw"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_checkpoints_size(tmp_path: Path, name: str, momentum: float) -> None:
    """As `plan` says it, and as a start looks for its room."""
    of = config(global_batch_size=4, optim=OptimConfig(name, momentum=momentum))
    learner = build_learner(of, World(0, 1, 0, torch.device("cpu")))
    training_step(learner, cut(*views(of, 4), of.micro_batches), of, 0.1)
    state = {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict()}
    path = checkpoint.save(tmp_path, 1, state)
    assert checkpoint_bytes(of, footprint(of, 32)) == pytest.approx(path.stat().st_size, rel=0.02)
    assert saved_bytes(of)[0] == pytest.approx(path.stat().st_size, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_an_encoders_size(tmp_path: Path, precision: str) -> None:
    """It leaves as float32, whatever it was trained in; the last step's is one of those that lie there."""
    of = config(global_batch_size=4, precision=precision, steps=100, run_folder=str(tmp_path))
    of = dataclasses.replace(of, checkpoint=CheckpointConfig(every=50, export_every=50), data=DataConfig(shards="none"))
    model = build_learner(of, World(0, 1, 0, torch.device("cpu"))).model
    path = tmp_path / "step-00000100.safetensors"
    card = {"encoder": of.model.encoder, "width": 1, "stem": of.model.stem, "feature_size": 512, "image_size": 32}
    export_encoder(path, model.encoder, {**card, "mean": [0.5] * 3, "std": [0.5] * 3}, model.projector)
    size = path.stat().st_size + projector_path(path).stat().st_size
    assert saved_bytes(of)[1] == pytest.approx(size, rel=0.002)
    (line,) = [line for line in text(make_plan(of, samples=1000)).splitlines() if line.startswith("disk: encoders")]
    assert line[28:] == f"{2 * size / 2**20:.1f} MiB: 2 of {size / 2**20:.1f} MiB"


# Reads steps as a training does, and holds one while the next is gathered and the workers are as far ahead as they may be.
READING = """
import os, sys, time, numpy as np, torch
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import Sample
from simclr_dist.data.steps import StepDataset, load_steps
from simclr_dist.data.views.draws import ViewSettings

class Pictures:
    def __len__(self): return 10_000
    def __getitem__(self, row): return Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, row)
    def expect(self, *_): pass

batch, pieces, side, workers = map(int, sys.argv[1:])
plan = Plan(np.array([10_000]), 0, batch, micro_batches=pieces)
steps = load_steps(StepDataset(Pictures(), plan, ViewSettings(image_size=side)), range(50), workers=workers)
def taken():
    about = os.statvfs("/dev/shm")
    return (about.f_blocks - about.f_bfree) * about.f_frsize
in_hand, gathered = next(steps), next(steps)
most, since = taken(), time.monotonic()
while time.monotonic() < since + 1:
    if taken() > most:
        most, since = taken(), time.monotonic()
print(most)
"""


@pytest.mark.parametrize("workers", [1, 4])
def test_crops_made_ahead_are_those_of_a_real_reading(workers: int) -> None:
    """A rank's workers share the steps ahead. They do not make one each."""
    if reason := why_not():
        pytest.skip(reason)
    of = config(micro_batches=2, views=ViewsConfig(preset="small", image_size=64), data=DataConfig(workers=workers))
    of = dataclasses.replace(of, global_batch_size=1000)
    with SmallDisk(Path("/dev/shm"), 2**28 // PAGE) as shared:
        numbers = [of.global_batch_size, of.micro_batches, 64, workers]
        command = [*shared.enter, sys.executable, "-W", "ignore", "-c", READING, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = rank_memory(of, footprint(of, 64), 1, on_cuda=False)
    assert memory.host == memory.shared
    assert memory.shared == pytest.approx(int(done.stdout), rel=0.01)
    step = 2 * 3 * 64**2 * 1000
    assert memory.shared < {1: 4.01, 4: 6.01}[workers] * step, "two steps, and two portions of half a step a worker"
