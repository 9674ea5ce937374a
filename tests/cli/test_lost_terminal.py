"""A terminal that goes, as when ssh is cut off: training saves and stops; under nohup it goes on, whatever was printed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import training_runs as runs
from faults.commands import marked
from simclr_dist.run.checkpoint import saved_steps
from simclr_dist.system.errors import PREEMPTED
from terminal import Terminal, terminal

PROGRAM = str(Path(sys.executable).with_name("simclr-dist"))
STEPS = 20
# As the head of the session; in the foreground of a shell, which is the head and dies; there under nohup; and there with SIGHUP
# ignored, but with all that is printed still on its way to the terminal.
WAYS = {
    "head": [],
    "foreground": ["sh", "-c", '"$@"; true', "sh"],
    "nohup": ["sh", "-c", 'nohup "$@"; true', "sh"],
    "ignored": ["sh", "-c", '(trap "" HUP; "$@"); true', "sh"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


@contextmanager
def lost(folder: Path, *command: str) -> Iterator[Terminal]:
    """`command`, when its terminal has gone in the middle of a run, and nothing of it is left."""
    mark = {"SIMCLR_DIST_TEST": str(folder), "WITHOUT_COMPILER": "1", "STEP_PAUSE": "0.1"}
    with terminal(command, folder, mark) as shell:
        runs.until(lambda: runs.steps_done(folder / "run") >= 3 or shell.process.poll() is not None)
        shell.hang_up()
        runs.until(lambda: not marked(f"SIMCLR_DIST_TEST={folder}"))
        yield shell


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "processes"),
    [("head", 1), ("foreground", 1), ("foreground", 2), ("nohup", 1), ("nohup", 2), ("ignored", 2)],
)
def test_training(shards: Path, tmp_path: Path, way: str, processes: int) -> None:
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint={"every": 1000})
    with lost(tmp_path, *WAYS[way], PROGRAM, "train", "config.yaml", "--processes", str(processes)) as shell:
        code = shell.process.wait()
    run = tmp_path / "run"
    status, (stop,) = runs.status(run), runs.events(run, "stop")
    assert [entry["event"] for entry in runs.events(run, "restart")] == []
    assert saved_steps(run / "checkpoints")[-1] == runs.steps_done(run) == stop["step"], "a step was made that is not saved"
    if way in ("nohup", "ignored"):
        assert (status["state"], status["exit_code"], stop["step"]) == ("done", 0, STEPS)
        return
    assert (status["state"], status["exit_code"], status["reason"]) == ("preempted", PREEMPTED, "SIGHUP")
    assert 3 <= stop["step"] < STEPS
    assert code == (PREEMPTED if way == "head" else -1)
    assert "Traceback" not in shell.shown


@pytest.mark.slow
@pytest.mark.parametrize("way", ["foreground", "nohup"])
def test_a_job_on_this_machine(shards: Path, tmp_path: Path, way: str) -> None:
    """Its tasks are not the command's children, and print into files; the parent shows what they print."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint={"every": 1000})
    with lost(tmp_path, *WAYS[way], PROGRAM, "submit", "config.yaml", "--local"):
        pass
    status = runs.status(tmp_path / "run")
    expected = ("done", 0) if way == "nohup" else ("preempted", PREEMPTED)
    assert (status["state"], status["exit_code"]) == expected
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == runs.steps_done(tmp_path / "run")


@pytest.mark.slow
def test_shards_go_on_from_what_is_there(shards: Path, tmp_path: Path) -> None:
    """Nobody is left, and the same command has nothing to mend."""
    for number in range(40):
        shutil.copytree(shards.parent / "images", tmp_path / "images" / str(number), copy_function=os.link)
    command = [PROGRAM, "shard", "images", "new", "--processes", "2"]
    mark = {"SIMCLR_DIST_TEST": str(tmp_path)}
    with terminal(command, tmp_path, mark) as shell:
        shell.wait_for(r"decoding: +[1-9]")
        shell.hang_up()
        runs.until(lambda: not marked(f"SIMCLR_DIST_TEST={tmp_path}"))
    assert not (tmp_path / "new").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "new.partial").exists()) == (0, False), done.stderr
    assert "shards" in done.stdout
