"""What is run on the first GPU, on the CPU: its every part in tiny sizes, and what a cut or a crash leaves."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import spell

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_all_parts_in_tiny_sizes(tmp_path: Path) -> None:
    """That no line of the script fails for a typo; the limits are not tried."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--minutes", "60", "--folder", str(tmp_path)]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"
    }  # it hides the script's folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").glob("gpu-rehearsal-*.json")
    results = json.loads(file.read_text())
    figures = {(row["part"], row["figure"]): row["value"] for row in results["rows"]}
    parts = ["versions", "check", "loss", "lars", "colour", "images", "step", "large", "resume", "kill", "cifar"]
    assert list(dict.fromkeys(part for part, _ in figures)) == parts
    assert {figures[part, "part"] for part in parts} == {"whole"}
    assert figures["check", "check"] == figures["check", "check of a config"] == "passed"
    assert [value for (part, _), value in figures.items() if part == "resume"] == ["the same bits", "whole"]
    assert figures["kill", "steps in the metrics at the end"] == 10
    assert not (BENCHMARKS / "results" / file.name).exists()
    assert {"card", "torch", "driver", "python"} <= results["machine"].keys()
    assert file.with_suffix(".md").read_text().count("\n| ") == 1 + len(results["rows"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.Namespace:
    """The module, with a child of our own in place of the parts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(gpu, "PARTS", tmp_path / "child.py")
    return gpu


ROW = {"part": "loss", "figure": "time", "value": 1.5, "unit": "ms", "n": 5, "target": "", "met": None, "failed": False}


@pytest.mark.parametrize(
    ("ending", "limit", "said"),
    [
        ("", 60, "whole"),
        ("raise SystemExit('no kernel')", 60, "exit code 1: no kernel"),
        ("import time; time.sleep(600)", 0.5, "cut after 0 s"),
    ],
    ids=["whole", "crash", "cut"],
)
def test_what_a_part_has_measured_stays(gpu: argparse.Namespace, tmp_path: Path, ending: str, limit: float, said: str) -> None:
    (tmp_path / "parts" / "loss.jsonl").write_text("of an earlier call\n")
    gpu.PARTS.write_text(
        "import json, pathlib, sys\n"
        "file = pathlib.Path(json.loads(sys.argv[1])['folder'], 'parts', 'loss.jsonl')\n"
        f"file.write_text({json.dumps(ROW)!r} + '\\n' + '{{\"part\": \"lo')\n{ending}\n"
    )
    if limit < 1:  # a child that is cut has had its time
        gpu.PARTS.write_text(ending)
    told = argparse.Namespace(rehearse=True, cifar=None, cifar_test=None)
    *measured, end = gpu.run_part("loss", told, tmp_path, limit, dict(os.environ))
    assert measured == ([] if limit < 1 else [ROW])
    assert (end["value"], end["failed"]) == (said, said != "whole")


def test_parts_of_an_earlier_call_stay_in_the_results(gpu: argparse.Namespace, tmp_path: Path) -> None:
    card = {**ROW, "part": "versions", "figure": "card", "value": "NVIDIA H200"}
    gpu.write_results(tmp_path, [card, ROW, {**ROW, "part": "lars"}], "first", rehearse=False)
    again = {**ROW, "value": 0.0004, "met": False, "target": "at least 1"}
    table = gpu.write_results(tmp_path, [card, again], "second", rehearse=False).read_text().splitlines()
    assert table[0] == "card NVIDIA H200"
    assert table[6:] == [
        "| versions | card | NVIDIA H200 ms | 5 |  |  |",
        "| loss | time | 0.0004 ms | 5 | at least 1 | **missed** |",
        "| lars | time | 1.5 ms | 5 |  |  |",
    ]
    (file,) = tmp_path.glob("gpu-nvidia-h200-*.json")
    assert json.loads(file.read_text())["machine"] == {"card": "NVIDIA H200"}


def test_an_empty_folder_of_wheels_is_refused(gpu: argparse.Namespace, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no wheel"):
        gpu.environment(tmp_path, tmp_path, rehearse=True)


def test_targets_are_judged(gpu: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is twice as fast at a twentieth of the memory, a peer that fails, and one that is too large."""
    import gpu_parts

    def alone(name: str, n: int, exact: str, device: str) -> dict[str, float]:
        if name == "reference":
            raise RuntimeError("CUDA out of memory")
        if name == "lightly":
            raise TypeError("no such argument")
        ours = name == "ours"
        return {
            "seconds": 1e-3 if ours else 2.5e-3,
            "memory": 2**20 * (1 if ours else 15),
            "error": 1e-7 if n == 4096 else 1e-2,
        }

    monkeypatch.setattr(gpu_parts, "alone", alone)
    monkeypatch.setattr(gpu_parts, "save_exact", lambda n, file, device: Path(file).touch())
    task = {"part": "loss", "folder": str(tmp_path), "rehearse": False, "until": 0, "cifar": None, "cifar_test": None}
    told = gpu_parts.Task(task)
    names = ("ours", "reference", "compiled", "lightly")
    told.scale = dataclasses.replace(told.scale, device="cpu", names=names, losses=(4096, 8192))
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: True)
    gpu_parts.loss(told)
    rows = {row["figure"]: row for row in gpu.rows_of(tmp_path, "loss")}
    assert [rows[f"N = 4096, compiled / ours: {what}"]["met"] for what in ("time", "memory")] == [True, False]
    assert rows["N = 8192, compiled / ours: time"]["met"] is None
    assert [rows[f"N = {n}, ours: gradient error"]["met"] for n in (4096, 8192)] == [True, False]
    assert rows["N = 4096, reference"]["value"] == "out of memory"
    assert rows["N = 4096, lightly"]["value"] == "failed: TypeError: no such argument"
    assert not any(row["failed"] for row in rows.values()), "a peer's fault is no fault"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The learning curves' module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import curves

    return curves


def test_equal_settings_are_equal(curves: argparse.Namespace, tmp_path: Path) -> None:
    """A recipe that changes later changes its own curve alone, but for the network."""
    own, equal = (
        curves.config_for("a run", tmp_path, curves.SETS["cifar"], tmp_path, 115_200, choice=c) for c in (None, (2e-3, 0.2))
    )
    assert own.global_batch_size * own.steps == pytest.approx(115_200, abs=own.global_batch_size)
    assert (equal.global_batch_size, equal.steps, equal.peak_lr, equal.loss.temperature) == (256, 450, 2e-3, 0.2)
    assert (equal.optim.name, equal.optim.clip_norm, equal.precision) == ("adamw", 0, "fp32")
    assert dataclasses.replace(equal.model, projector_dim=own.model.projector_dim) == own.model
    assert [curves.stops(steps) for steps in (450, 4, 1)] == [[56, 112, 224, 450], [1, 2, 4], [1]]


def test_curves_of_a_result(curves: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record(knn: list[float], cpu: float) -> dict[str, list[float]]:
        return {"images": [256, 512], "cpu": [cpu, 2 * cpu], "asked": [100], "knn": knn, "linear": [50, 50]}

    results = {"about": {}, "cifar ours 0": record([40, 60], 10), "cifar ours 1": record([44, 60], 10)}
    results |= {"cifar lightly 0": record([30, 50], 100), "tuning lightly 0.001 0.2": record([1, 1], 1)}
    first, last = curves.curve(results, "cifar", "ours")
    assert first.knn == pytest.approx((42, 1.96 * (8 / 2 + 42 * 58 / 100) ** 0.5))
    assert last.knn == pytest.approx((60, 1.96 * 24**0.5))
    assert curves.work_to_reach([first, last], "knn", 51) == "15"
    assert curves.work_to_reach([first, last], "knn", 61) == "never"
    curves.report(results, tmp_path / "curves.png")
    assert "| lightly, knn 50.0 | 14 | 200 |" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_settings_are_chosen_by_both_accuracies(curves: argparse.Namespace, tmp_path: Path) -> None:
    told = argparse.Namespace(folder=tmp_path, images=115_200)
    jobs = curves.tuning_jobs(told)
    assert len(jobs) == 24
    results = {job.name: {"knn": [1.0], "linear": [2.0]} for job in jobs.values()}
    for system, rate, temperature in (("ours", 5e-3, 0.1), ("lightly", 1e-3, 0.5), ("stable", 2e-3, 0.2)):
        results[jobs[system, rate, temperature].name] = {"knn": [0.0], "linear": [9.0]}
    assert curves.choose(results, jobs) == {"ours": (5e-3, 0.1), "lightly": (1e-3, 0.5), "stable": (2e-3, 0.2)}


def test_a_curve_of_another_choice_is_measured_again(
    curves: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when rates are added: of the others nothing is."""
    monkeypatch.setattr(curves, "make_shards", lambda _: None)
    monkeypatch.setattr(curves, "plain", lambda *_: None)
    measured: list[str] = []

    def measure(job: Any, *_: object) -> dict[str, list[float]]:
        measured.append(job.name)
        return {"knn": [float("lightly 0.001" in job.name)], "linear": [0.0]}

    monkeypatch.setattr(curves, "measure", measure)
    told = argparse.Namespace(
        folder=tmp_path, images=115_200, photos=25_600, seeds=1, at_once=1, animals=None, peers="", results=tmp_path / "r.json"
    )
    results = {"about": {"chosen": {"ours": [0.001, 0.2], "lightly": [0.005, 0.2], "stable": [0.001, 0.2]}}}
    results |= {f"cifar {name} 0": {"knn": [2.0], "linear": [2.0]} for name in curves.NAMES}
    curves.run(told, results)
    assert [name for name in measured if name.startswith("cifar")] == ["cifar lightly 0"]
    assert json.loads(told.results.read_text())["about"]["chosen"]["lightly"] == [0.001, 0.2]


def test_missing_libraries_are_one_line(curves: argparse.Namespace, tmp_path: Path) -> None:
    found, line = curves.versions(str(tmp_path / "python"))
    assert not found
    assert line.startswith(f"--peers {tmp_path}/python: No such file or directory; make one")
    assert "\n" not in line
    assert "pip install lightly==" in line


def test_recipes_are_accepted_and_each_seed_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recipe

    for changes in recipe.RECIPES.values():
        settings = {**recipe.QUIET, **changes}
        config = load_config(recipe.small_runs.RECIPE, [w for key, v in settings.items() for w in (f"--{key}", spell(v))])
        assert config.optim.name == ("adamw" if changes is recipe.BEFORE else "muon")
    done: list[tuple[str, int]] = []

    def measure(run: tuple[str, int], _: object) -> dict[str, float]:
        done.append(run)
        if len(done) == 4:
            raise KeyboardInterrupt
        return {"knn": 50 + run[1], "linear": 60, "cpu_seconds": 100}

    monkeypatch.setattr(recipe, "measure", measure)
    monkeypatch.setattr(recipe.small_runs, "write_parts", lambda *_: None)
    for name in ("train", "test"):
        pq.write_table(pa.table({"image": [b""]}), tmp_path / f"{name}.parquet")
    told = [f"--train={tmp_path / 'train.parquet'}", f"--test={tmp_path / 'test.parquet'}", f"--folder={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *told, f"--results={tmp_path / 'results.json'}", "--at-once=1"])
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    recipe.main()
    assert sorted({*done}) == sorted((name, seed) for name in recipe.RECIPES for seed in range(3))
    assert [done.count(run) for run in done[:3]] == [1, 1, 1], "what the file holds is not measured again"
    lines = list(recipe.table(json.loads((tmp_path / "results.json").read_text())))
    assert lines[-1] == "| the recipe | 3 | 100 (100 to 100) | 51.0 (50.0 to 52.0) | 60.0 (60.0 to 60.0) |"
    results = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "recipe": {**results["recipe"], "steps": 1}}))
    with pytest.raises(SystemExit):
        recipe.main()
    assert "results.json: was measured with another recipe; name another file" in capsys.readouterr().err


def test_readmes_table_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    plain = {"raw_pixels": 20.94, "untrained": 30}
    of = [{by: {**plain, "trained": trained} for by in ("knn", "linear")} for trained in (70, 80)]
    published = {by: {"results": {name: {"top1": value} for name, value in plain.items()}} for by in ("knn", "linear")}
    run = {"0": {"knn": 60, "linear": 65, "cpu_seconds": 280.6}}
    curve = {"images": [256, 512], "cpu": [10, 20], "asked": [100], "knn": [40, 50], "linear": [50, 60]}
    others = {
        "about": {"images": 512, "versions": {"lightly": "1.6"}},
        **{f"cifar {name} 0": curve for name in tables.curves.NAMES},
    }
    for file, what in {
        "curves": others,
        "demo": {"runs": {"seed 0": of[0], "seed 1": of[1], "control, seed 0": of[0]}},
        "recipe": {"runs": {"the recipe": run, "half of the steps": run}},
        "cifar10_cpu/eval": {"protocols": published},
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.json").write_text(json.dumps(what))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.README.read_text(encoding="utf-8")
    written = tables.written(text)
    assert (
        "2 seeds, mean (lowest to highest) | 20.9 / 20.9 | 30.0 / 30.0 | 75.0 (70.0 to 80.0) / 75.0 (70.0 to 80.0) |" in written
    )
    assert "| CIFAR-10, small ResNet, 281 CPU seconds, 1 seeds | 20.9 / 20.9 | 30.0 / 30.0 | 60.0 (60.0 to 60.0) /" in written
    assert "| lightly 1.6 | 50.0 ± 9.8 | 60.0 ± 9.6 | 20 | 20 | 20 |" in written
    assert tables.written(written) == written
    assert (written.split(tables.BEGIN)[0], written.split(tables.END)[1]) == (
        text.split(tables.BEGIN)[0],
        text.split(tables.END)[1],
    )
    with pytest.raises(AssertionError, match="has no place for the table"):
        tables.written(text.replace(tables.END, ""))


def test_readmes_table_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    text = tables.README.read_text(encoding="utf-8")
    assert tables.written(text) == text, "python benchmarks/tables.py writes it"
