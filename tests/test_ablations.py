"""Ablations of SimCLR, without their trainings: settings, what is run in which order, tables; and the loss of few negatives."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import spell
from simclr_dist.config.together import check_fits
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.run.status import write_status

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPES = {"adamw": "", "lars": "optim.name=lars optim.momentum=0.8 optim.lr_rule=sqrt optim.base_lr=0.1 micro_batches=2"}
Program = Callable[..., str]


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations

    return ablations


@pytest.fixture(params=list(RECIPES))
def base(request: pytest.FixtureRequest, ablations: ModuleType) -> Config:
    """The recipe, and one with another optimizer and rule."""
    of_other = [text for pair in RECIPES[request.param].split() for text in f"--{pair}".split("=")]
    return load_config(ablations.RECIPE, of_other)


def test_all_settings_are_accepted(ablations: ModuleType, base: Config, tmp_path: Path) -> None:
    rows = [row for of in ablations.factors(base).values() for row in of]
    tried = {run.name: {"knn": rate} for rate in range(2) for run in ablations.runs_tried(base, rows)}
    settled = [ablations.settled(base, row, tried) for row in rows]
    runs = [*ablations.runs_tried(base, rows), *(ablations.Run(ablations.named(base, each), each, seed=1) for each in settled)]
    assert len({run.folder for run in runs}) > 35
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(base.to_dict()))
    for run in runs:
        whole = ablations.complete(base, run, images=115_200)
        local = whole.pop(ablations.LOCAL, 1)
        config = load_config(file, [text for key, value in whole.items() for text in (f"--{key}", spell(value))])
        check_fits(config, 45_000, 1)
        assert config.global_batch_size % local == 0
        assert abs(config.steps * config.global_batch_size - 115_200) < config.global_batch_size
        group = config.global_batch_size // config.micro_batches
        assert "micro_batches" in run.name or group == base.global_batch_size // base.micro_batches or group < 512


def test_one_recipe_is_one_run(ablations: ModuleType, base: Config) -> None:
    """The recipe's line in each table, and its own rate among those that are tried for its batch and its optimizer."""
    rows = ablations.factors(base)
    assert all(sum("the recipe" in row.name for row in of) == 1 for of in rows.values())
    for of in rows.values():
        assert {ablations.named(base, row.settings) for row in of if "the recipe" in row.name} == {"recipe"}
    own = [row for row in rows["batch size"][1:] if row.name.split()[0] == str(base.global_batch_size)]
    tried = [run.name for run in ablations.runs_tried(base, own)]
    assert tried[1] == "recipe"
    assert len(tried) == 3
    others = [row.settings for row in rows["optimizer"][1:]]
    assert [ablations.named(base, of) for of in others if of["optim.name"] == base.optim.name] == ["recipe"]
    assert all(of["optim.momentum"] == (0.95 if of["optim.name"] == "muon" else 0.9) for of in others if len(of) > 1)


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Options that name images."""
    for name, count in (("train", 50), ("test", 20)):
        pq.write_table(pa.table({"label": np.arange(count)}), tmp_path / f"{name}.parquet")
    return [f"--{name}={tmp_path / name}.parquet" for name in ("train", "test")]


@pytest.fixture
def program(
    ablations: ModuleType, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Program:
    """The program; its results are in `results.json`. It prints what it prints."""
    monkeypatch.setattr(ablations.small_runs, "write_parts", lambda *_: None)

    def main(*options: str, again: bool = False) -> str:
        measured = [] if again else [*sets, f"--folder={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", ["ablations.py", f"--results={tmp_path / 'results.json'}", *measured, *options])
        ablations.main()
        return capsys.readouterr().out

    return main


def test_rates_are_chosen_before_the_test_images_are_seen(
    ablations: ModuleType, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def measure(base: Config, run: Any, images: int, folder: Path) -> dict[str, float]:
        if len(begun) == 5:
            raise KeyboardInterrupt
        begun.append(run)
        return {"knn": 40 - abs(run.settings.get("optim.base_lr", 0) - 4), "linear": 50, "cpu_seconds": 1}

    monkeypatch.setattr(ablations, "measure", measure)
    options = ["--only", "optimizer", "--seeds", "2", "--at-once", "1", "--images", "1000"]
    with pytest.raises(KeyboardInterrupt):
        program(*options)
    begun.append(None)
    program(*options)
    done = len(begun)
    program(*options)
    assert len(begun) == done, "nothing is left to do"
    first, second = begun[:5], begun[6:]
    runs = first + second
    tried = 3 * len(ablations.USUAL)
    assert [run.tried for run in runs] == [True] * tried + [False] * (len(runs) - tried)
    assert len({run.folder for run in runs}) == len(runs), "each once"
    assert [run.seed for run in runs[tried:]] == sorted(run.seed for run in runs[tried:])
    lars = [run for run in runs[tried:] if run.settings.get("optim.name") == "lars"]
    assert {run.settings["optim.base_lr"] for run in lars} == {2.0}, "the nearest to the best of .5, 1 and 2"
    with pytest.raises(SystemExit, match=r"results\.json: was measured with other images; name another file with --results"):
        program("--images", "2000")


def test_tables_say_what_the_file_holds(ablations: ModuleType, program: Program, tmp_path: Path) -> None:
    recipe = ablations.read_yaml(ablations.RECIPE.read_text(), "recipe")
    recipe |= {"global_batch_size": 512, "loss": {"temperature": 0.2}}
    recipe["optim"] = {"name": "adamw", "base_lr": 5e-3, "lr_rule": "constant", "weight_decay": 1e-4, "clip_norm": 10.0}
    lars = "optim.name=lars optim.weight_decay=1e-06"

    def run(knn: float, linear: float) -> dict[str, float]:
        return {"knn": knn, "linear": linear, "cpu_seconds": 100 + knn}

    results = {
        "recipe": recipe,
        "images": 115_200,
        "sets": {"train": 50_000, "test": 10_000},
        "hardware": "A CPU",
        "tried": {
            f"optim.base_lr=1.0 {lars}": run(40.04, 1),
            f"optim.base_lr=2.0 {lars}": {"diverged": True},
            f"optim.base_lr=4.0 {lars}": run(40.06, 0),
        },
        "runs": {
            "recipe": {"0": run(50, 60), "1": run(51.04, 61), "2": run(49, 62)},
            "loss.temperature=0.5": {"0": run(45, 55)},
            f"optim.base_lr=4.0 {lars}": {"0": run(30, 40), "1": {"diverged": True}},
            f"optim.base_lr=4.0 optim.clip_norm=0.0 {lars}": {"0": run(31, 41)},
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    printed = program(again=True).splitlines()
    cells = "50.0 (49.0 to 51.0) | 61.0 (60.0 to 62.0) | 150 |"
    assert printed[:3] == [
        "A run sees 115200 images (225 steps of the recipe), of 50000; 10000 test images.",
        "Top-1 in percent: the mean over n seeds, and their range.",
        "A CPU.",
    ]
    rows = [line for line in printed if line.startswith("| ")]
    assert [line for line in rows if cells not in line] == [
        "| batch size | rate chosen | n | kNN | linear probe | CPU s |",
        "| negatives alone | rate chosen | n | kNN | linear probe | CPU s |",
        "| BatchNorm group | rate chosen | n | kNN | linear probe | CPU s |",
        "| temperature | rate chosen | n | kNN | linear probe | CPU s |",
        "| 0.5 |  | 1 | 45.0 | 55.0 | 145 |",
        "| optimizer | rate chosen | n | kNN | linear probe | CPU s |",
        "| lars | 4 | 1, 1 diverged | 30.0 | 40.0 | 130 |",
        "| clipping | rate chosen | n | kNN | linear probe | CPU s |",
        "| lars, 0 | 4 | 1 | 31.0 | 41.0 | 131 |",
        "| lars, 10 | 4 | 1, 1 diverged | 30.0 | 40.0 | 130 |",
        "| decoupled | rate chosen | n | kNN | linear probe | CPU s |",
        "| peak rates tried, kNN on held-back training images | half | middle | double | chosen |",
        "| optimizer lars | 1: 40.0 | 2: diverged | 4: 40.1 | 4 (at the edge) |",
    ]
    assert [line.removesuffix(f" |  | 3 | {cells}") for line in rows if cells in line] == [
        "| 512, the recipe",
        "| 1022, the recipe",
        "| 512 images, the recipe",
        "| 0.2, the recipe",
        "| adamw at 0.005, the recipe",
        "| 10, the recipe",
        "| false, the recipe",
    ]


def test_loss_of_local_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of the whole batch is the product's loss; smaller groups give the mean of theirs; the gradient follows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from local_negatives import LocalNegatives

    views = torch.randn(2, 24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    product = NTXentLoss(0.2, decoupled=True)
    for images in (24, 8, 1):
        wanted = torch.stack([product(*views[:, first : first + images]) for first in range(0, 24, images)]).mean()
        found = LocalNegatives(images, temperature=0.2, decoupled=True)(*views)
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
        gradients = (torch.autograd.grad(loss, views)[0] for loss in (found, wanted))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert LocalNegatives(24, temperature=0.2, decoupled=True)(*views) == product(*views)
    with pytest.raises(RuntimeError, match="unflatten"):
        LocalNegatives(7, temperature=0.2)(*views)


@pytest.mark.parametrize("state", ["diverged", "crashed"])
def test_a_run_that_diverges_is_a_result(
    ablations: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    def train(settings: dict[str, Any], program: list[str]) -> float:
        (run := Path(settings["run_folder"])).mkdir(parents=True)
        write_status(run, state, 3)
        raise subprocess.CalledProcessError(3, program)

    monkeypatch.setattr(ablations.small_runs, "train", train)
    base, tried = load_config(ablations.RECIPE), ablations.Run("recipe", {})
    (left := tmp_path / tried.folder / "of an interrupted one").mkdir(parents=True)
    with nullcontext() if state == "diverged" else pytest.raises(subprocess.CalledProcessError):
        assert ablations.measure(base, tried, 1000, tmp_path) == {"diverged": True}
    assert not left.exists()


def test_python_in_a_process_of_one_thread(ablations: ModuleType) -> None:
    printed, seconds = ablations.small_runs.python("-c", "import os; print(os.environ['OMP_NUM_THREADS'])")
    assert printed == "1\n"
    assert seconds > 0
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        ablations.small_runs.python("-c", "raise SystemExit(3)")
