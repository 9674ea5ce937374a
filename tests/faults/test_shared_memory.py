"""A /dev/shm that is too small, and reading processes that stand still or die: one line in bounded time, nothing lost."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from faults.commands import running, simclr_dist
from faults.small_disk import PAGE, SmallDisk, why_not
from faults.straight import STEPS
from simclr_dist.system.errors import PREEMPTED

LARGE: dict[str, Any] = {
    "global_batch_size": 40,
    "views": {"image_size": 224},
    "model": {"stem": "imagenet"},
    "data": {"workers": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "changes"),
    [(2**26 // PAGE, LARGE), (2**16 // PAGE, {"data": {"workers": 1}})],
    ids=["64 MB, 4 workers, 224 pixels", "64 KB, 1 worker, 16 pixels"],
)
def test_that_fills_while_a_run_trains_ends_it_in_one_line(
    shards: Path, tmp_path: Path, pages: int, changes: dict[str, Any]
) -> None:
    """For good: the same start would find it full again."""
    if reason := why_not():
        pytest.skip(reason)
    config = runs.write_config(tmp_path, shards, run_folder=str(tmp_path / "run"), steps=1000, **changes)
    with (
        SmallDisk(Path("/dev/shm"), pages) as shared,
        running(tmp_path, [*shared.enter, *simclr_dist("train", str(config))]) as command,
    ):
        assert command.wait() == 2, command.output
        lines = [line for line in command.output.splitlines() if line.startswith("simclr-dist: ")]
        assert "Traceback" not in command.output
        runs.until(lambda: not command.alive(), 30)
    assert lines[0].startswith("simclr-dist: WARNING: data.workers: 1 x "), lines
    assert lines[1:] == [
        "simclr-dist: /dev/shm: the workers can hand nothing over: No space left on device (28); give it more"
        " (docker run --shm-size 16g or --ipc host, shm_size in compose), or take fewer workers"
    ]
    assert runs.status(tmp_path / "run")["exit_code"] == 2
    assert not runs.events(tmp_path / "run", "restart")


def test_that_cannot_hold_a_step_is_refused_before_ranks_start(shards: Path, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    config = runs.write_config(
        tmp_path, shards, run_folder=str(tmp_path / "run"), **(LARGE | {"global_batch_size": 96, "device": "cpu"})
    )
    with (
        SmallDisk(Path("/dev/shm"), 2**22 // PAGE) as shared,
        running(tmp_path, [*shared.enter, *simclr_dist("train", str(config))]) as command,
    ):
        assert command.wait() == 2, command.output
        assert command.output == (
            "simclr-dist: data.workers: 1 x 4 workers share up to 165.4 MiB, 27.6 MiB at least; /dev/shm has 4.0 MiB, 4.0 of"
            " them free; give it more (docker run --shm-size 16g or --ipc host, shm_size in compose), or take fewer workers\n"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stop_while_a_worker_stands_still_saves_every_step(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Its rank makes the images of the step itself; the bits are those of a run to which nothing happens."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint={"every": 1000}, data={"workers": 1, "in_memory": "never"})
    run = tmp_path / "run"
    with runs.started(tmp_path, 2) as ranks:
        ranks.until(lambda: runs.steps_done(run) >= 3)
        (worker,) = ranks.children(1)
        os.kill(worker, signal.SIGSTOP)
        ranks.until(lambda: _stands_still(run))
        ranks.signal(signal.SIGTERM, 0)
        ranks.signal(signal.SIGTERM, 1)
        assert ranks.wait(60) == [PREEMPTED] * 2, ranks.output
        assert not Path(f"/proc/{worker}").exists()
    assert runs.status(run)["state"] == "preempted"
    runs.train(tmp_path, 2)
    assert runs.events(run, "start")[-1]["steps_lost"] == 0
    runs.assert_same_run(run, straight, STEPS)


@pytest.mark.slow
def test_a_worker_that_stands_still_ends_the_run_in_time(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=1000, timeout_minutes=2 / 60, data={"workers": 2})
    with runs.started(tmp_path, 1) as ranks:
        ranks.until(lambda: runs.steps_done(tmp_path / "run") >= 3)
        workers = ranks.children(0)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        assert ranks.wait(60) == [1], ranks.output
        (line,) = (line for line in ranks.output.splitlines() if line.startswith("simclr-dist: "))
        assert "Traceback" not in ranks.output
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert line.startswith("simclr-dist: DataLoader worker "), line
    assert any(f"of 2 (process {worker} on " in line for worker in workers)
    assert "has sent nothing for 0.0" in line
    assert "minutes and is stopped (SIGSTOP); look at the disk" in line
    assert runs.status(tmp_path / "run")["state"] == "crashed"


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_in_one_line(shards: Path, tmp_path: Path) -> None:
    """The launcher starts it again: memory may be there the next time."""
    runs.write_config(tmp_path, shards, steps=1000, data={"workers": 2})
    with runs.started(tmp_path, 1) as ranks:
        ranks.until(lambda: runs.steps_done(tmp_path / "run") >= 3)
        os.kill(ranks.children(0)[0], signal.SIGKILL)
        assert ranks.wait(60) == [1], ranks.output
        (line,) = (line for line in ranks.output.splitlines() if line.startswith("simclr-dist: "))
        assert "Traceback" not in ranks.output
    assert line.startswith("simclr-dist: a DataLoader worker died: "), line
    assert runs.status(tmp_path / "run")["reason"] in line


def _stands_still(run: Path) -> bool:
    """Whether no step comes for a second."""
    before = runs.steps_done(run)
    time.sleep(1)
    return runs.steps_done(run) == before
