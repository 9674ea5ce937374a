"""A full and a read-only disk, for real: a save fails with one clear error and harms nothing, and the monitor goes on."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faults.small_disk import PAGE, SmallDisk
from simclr_dist.run.checkpoint import load_newest, save, saved_steps
from simclr_dist.system.errors import SaveError
from simclr_dist.system.files import append, write_atomically
from simclr_dist.train.monitor import Monitor

TIMING = {"speed/images_per_second": 10.0, "speed/data_wait_percent": 1.0, "speed/memory_gib": 0.5, "speed/seconds_left": 9.0}


def state_of(step: int) -> dict[str, Any]:
    """About ten pages."""
    return {"step": step, "weight": torch.arange(9_000.0) + step}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_newest(folder: Path, step: int) -> None:
    state = load_newest(folder, report=pytest.fail)
    assert state is not None
    assert state["step"] == step
    assert torch.equal(state["weight"], state_of(step)["weight"])


# Saves


def test_a_disk_that_fills_at_any_point_of_a_save(small_disk: SmallDisk) -> None:
    """With no page left, one, and so on until the save fits: before the data, in it, between it and its seal."""
    folder = small_disk.path / "checkpoints"
    save(folder, 1, state_of(1))
    before = contents(folder)
    pages = -(-len(before["step-00000001.pt"]) // PAGE)
    for left in range(pages + 1):
        small_disk.fill(leave=left)
        with pytest.raises(SaveError) as caught:
            save(folder, 2, state_of(2), keep_last=1)
        assert str(caught.value) == f"{folder / 'step-00000002.pt'}: cannot be written: No space left on device"
        assert contents(folder) == before
        assert small_disk.free() == left * PAGE, "a part of it still takes room"
    small_disk.fill(leave=pages + 1)
    save(folder, 2, state_of(2), keep_last=1)
    assert saved_steps(folder) == [2]
    assert_newest(folder, 2)
    small_disk.clear()
    save(folder, 3, state_of(3))
    assert_newest(folder, 3)


def test_what_a_killed_save_left_does_not_keep_the_disk_full(small_disk: SmallDisk) -> None:
    folder = small_disk.path / "checkpoints"
    save(folder, 1, state_of(1))
    for name in (".step-00000002.pt.01234567.tmp", "step-00000003.pt"):
        (folder / name).write_bytes(bytes(9 * PAGE))
    small_disk.fill()
    save(folder, 2, state_of(2))
    assert saved_steps(folder) == [1, 2]
    assert_newest(folder, 2)


def test_a_disk_that_is_made_read_only(small_disk: SmallDisk) -> None:
    folder = small_disk.path / "checkpoints"
    save(folder, 1, state_of(1))
    before = contents(folder)
    small_disk.set_read_only(True)
    for step in (2, 3):
        with pytest.raises(SaveError) as caught:
            save(folder, step, state_of(step), keep_last=1)
        assert str(caught.value) == f"{folder / f'step-{step:08d}.pt'}: cannot be written: Read-only file system"
    assert contents(folder) == before
    assert_newest(folder, 1)
    small_disk.set_read_only(False)
    save(folder, 4, state_of(4))
    assert saved_steps(folder) == [1, 4]
    assert_newest(folder, 4)


def test_a_folder_that_cannot_be_made_on_a_read_only_disk(small_disk: SmallDisk) -> None:
    small_disk.set_read_only(True)
    with pytest.raises(SaveError, match=r"step-00000001.pt: cannot be written: Read-only file system$"):
        save(small_disk.path / "run" / "checkpoints", 1, state_of(1))


# Other files


def test_a_file_is_whole_or_not_there(small_disk: SmallDisk) -> None:
    path = small_disk.path / "status.json"
    write_atomically(path, b"old")
    small_disk.fill(leave=1)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, bytes(2 * PAGE))
    assert sorted(contents(small_disk.path)) == ["ballast", "status.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_grows_by_whole_pieces(small_disk: SmallDisk) -> None:
    path = small_disk.path / "lines"
    append(path, b"a" * (PAGE - 5))
    small_disk.fill()
    with pytest.raises(OSError, match="No space left on device"):
        append(path, b"b" * 9)
    append(path, b"c" * 5)
    small_disk.clear()
    append(path, b"d" * 9)
    assert path.read_bytes() == b"a" * (PAGE - 5) + b"c" * 5 + b"d" * 9


# The monitor


def log(monitor: Monitor, steps: range) -> None:
    for step in steps:
        metrics = {
            "loss/nt_xent": float(step),
            "loss/chance": 3.2,
            "similarity/positive": 0.9,
            "retrieval/top1": 0.5,
            "optim/learning_rate": 0.1,
        }
        monitor.log(step, metrics, TIMING)


def logged(run: Path) -> list[int]:
    """Steps in metrics.jsonl, each of whose lines is one."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def shown(run: Path) -> list[int]:
    """Steps that TensorBoard shows."""
    events = EventAccumulator(str(run / "tb")).Reload()
    scalars = events.Scalars("loss/nt_xent")
    assert [scalar.value for scalar in scalars] == [scalar.step for scalar in scalars]
    return [scalar.step for scalar in scalars]


def shown_beside(run: Path) -> list[int]:
    """Steps of the second curve, which has a file of its own."""
    return [scalar.step for scalar in EventAccumulator(str(run / "tb" / "second")).Reload().Scalars("loss/chance")]


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_the_monitor_goes_on(small_disk: SmallDisk, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Nothing half is left in its files, what is lost is said once for each and counted, and later it writes again."""
    run = small_disk.path
    monitor = Monitor(run, active=True, total_steps=90, first_step=0)
    monitor.say("begin")
    log(monitor, range(1, 4))
    assert (monitor.lost.total(), capsys.readouterr().err) == (0, "")
    if kind == "full":
        small_disk.fill()
    else:
        small_disk.set_read_only(True)
    log(monitor, range(4, 61))
    lost = monitor.lost.total()
    warnings = capsys.readouterr().err.splitlines()
    why = {"full": "No space left on device", "read-only": "Read-only file system"}[kind]
    (tb,), (second,) = ((run / folder).glob("events*") for folder in ("tb", "tb/second"))
    for path in monitor.lost:
        assert f"WARNING: {path}: cannot be written: {why}; what it cannot take is lost, and training goes on" in warnings
    assert len(warnings) == len(monitor.lost)
    files = {str(path) for path in (run / "train.log", run / "metrics.jsonl", tb)}
    assert files <= set(monitor.lost) <= {*files, str(second)}
    if kind == "full":
        small_disk.clear()
    else:
        small_disk.set_read_only(False)
    log(monitor, range(61, 64))
    monitor.say("end")
    assert monitor.lost.total() == lost
    monitor.close()
    missing = 0
    for steps in (logged(run), shown(run), shown_beside(run)):
        assert steps == sorted(set(steps))
        assert {1, 2, 3, 61, 62, 63} <= set(steps) <= set(range(1, 64))
        missing += 63 - len(steps)
    lines = (run / "train.log").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("begin", "end")
    assert all(line.startswith("step ") and line.endswith("ETA 0:00:09") for line in lines[1:-1])
    assert all("  partner nearest 50 %  " in line and "  peak memory " in line for line in lines[1:-1]), "as the plan has it"
    assert missing + 65 - len(lines) == lost
    assert {path.name for path in (run / "tb").iterdir()} == {tb.name, "second"}
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{run / 'train.log'}: {65 - len(lines)} times nothing could be written" in said


def test_the_monitor_begins_on_a_full_disk(small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed at step 5; that TensorBoard must forget what came after is not lost with the first steps."""
    run = small_disk.path
    first = Monitor(run, active=True, total_steps=9, first_step=0)
    log(first, range(1, 9))
    first.close()
    assert shown(run) == list(range(1, 9))
    small_disk.fill()
    monitor = Monitor(run, active=True, total_steps=9, first_step=5)
    log(monitor, range(6, 7))
    monitor.images("views", torch.rand(3, 4, 4), 6)
    assert shown(run) == list(range(1, 6))  # to cut a file takes no room
    small_disk.clear()
    log(monitor, range(7, 9))
    monitor.close()
    assert shown(run) == [1, 2, 3, 4, 5, 7, 8]
    assert "No space left on device" in capsys.readouterr().err


@pytest.fixture
def full_file() -> Iterator[TextIO]:
    """Takes nothing, ever."""
    with suppress(OSError), Path("/dev/full").open("w") as file:  # it tries once more when it is closed
        yield file


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_console_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str, full_file: TextIO) -> None:
    """A scheduler's log file on the full disk, or a terminal that is gone."""
    monkeypatch.setattr(f"sys.{stream}", full_file)
    monitor = Monitor(tmp_path, active=True, total_steps=9, first_step=0, tensorboard=False)
    log(monitor, range(1, 4))
    assert monitor.lost.total() == (3 if stream == "stdout" else 0)
    (tmp_path / "train.log").unlink()
    (tmp_path / "train.log").mkdir()
    log(monitor, range(4, 6))  # now there is something to say on stderr
    assert monitor.lost.total() == (7 if stream == "stdout" else 2)
    monitor.close()
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, active=False, total_steps=9, first_step=0)
    log(monitor, range(1, 2))
    monitor.say("x")
    monitor.close()
    assert (monitor.lost.total(), list(tmp_path.iterdir())) == (0, [])
