"""What is run on the first GPU, on the CPU: its every part in tiny sizes, and what a cut or a crash leaves."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
