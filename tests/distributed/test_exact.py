"""`deterministic: exact`: at any number of ranks a run ends with the same bits, also when it changes on the way."""

from pathlib import Path
from typing import Any

import pytest

import training_runs as runs

pytestmark = pytest.mark.slow

_VIT = {"encoder": "timm/test_vit", "stem": "imagenet", "drop_path": 0.2}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"exact_piece": 2},
    "bfloat16": {"exact_piece": 2, "precision": "bf16", "optim": {"name": "adamw", "base_lr": 1e-3}},
    "float32, micro-batches": {"exact_piece": 1, "micro_batches": 2, "optim": {"name": "muon", "base_lr": 1e-2}},
    "float32, a ViT with drop path": {"exact_piece": 2, "model": _VIT, "views": {"image_size": 32}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


def _end(folder: Path, steps: int) -> dict[str, Any]:
    encoder = folder / f"run/encoders/step-{steps:08d}.safetensors"
    return {
        "metrics": runs.metrics(folder / "run"),
        "encoder": encoder.read_bytes(),
        "card": encoder.with_suffix(".json").read_bytes(),
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_same_bits_at_one_to_four_ranks(shards: Path, tmp_path: Path, name: str) -> None:
    steps, numbers = (30, (1, 2, 3, 4)) if name in ("float32", "bfloat16") else (10, (1, 3))
    ends = {}
    for ranks in numbers:
        runs.write_config(tmp_path / str(ranks), shards, steps=steps, deterministic="exact", **RUNS[name])
        runs.train(tmp_path / str(ranks), ranks)
        ends[ranks] = _end(tmp_path / str(ranks), steps)
        runs.assert_same_bits(
            runs.checkpoint(tmp_path / f"{ranks}/run", steps)["model"], runs.checkpoint(tmp_path / "1/run", steps)["model"]
        )
    assert all(ends[ranks] == ends[1] for ranks in ends)
    assert len({line["loss/nt_xent"] for line in ends[1]["metrics"]}) == steps, "something was learnt"


def test_without_it_runs_drift_apart(shards: Path, tmp_path: Path) -> None:
    ends = []
    for ranks in (1, 2):
        runs.write_config(tmp_path / str(ranks), shards, steps=10, deterministic=True)
        runs.train(tmp_path / str(ranks), ranks)
        ends.append(_end(tmp_path / str(ranks), 10))
    assert ends[0]["encoder"] != ends[1]["encoder"]


def test_killed_on_two_ranks_and_resumed_on_three_the_bits_are_those_of_one(shards: Path, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    for folder in (straight, moved):
        runs.write_config(folder, shards, steps=20, deterministic="exact", exact_piece=2)
    runs.train(straight, 1)
    runs.killed_after(moved, 2, 8)
    output = runs.train(moved, 3)
    assert "resumed at step" in output
    assert "world_size was" not in output
    assert _end(moved, 20) == _end(straight, 20)
