"""Checkpoints: whole or not there, whatever happens while one is written and whatever becomes of its bytes."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dist.checkpoint import load_newest, save, saved_steps
from simclr_dist.errors import DataError


def state_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "model": {"weight": torch.arange(100.0) + step, "count": torch.tensor(step)},
        "optimizer": {
            "state": {0: {"buffer": torch.ones(3, dtype=torch.float64)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "config": {"seed": 3, "crop": (0.2, 1.0), "nothing": None, "text": "x", "on": True},
    }


def silent(line: str) -> None:
    raise AssertionError(f"nothing to report, but: {line}")


def pt(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def seal(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder: Path, step: int, reports: int | None = 0) -> None:
    """The newest whole checkpoint is that of `step`, after that many reports (None: any number)."""
    lines: list[str] = []
    state = load_newest(folder, report=lines.append)
    assert state is not None
    expected = state_of(step)
    assert state["step"] == step
    assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
    assert reports is None or len(lines) == reports, lines


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none", report=silent) is None
    folder = tmp_path / "run" / "checkpoints"
    path = save(folder, 7, state_of(7))
    assert path == pt(folder, 7)
    assert names(folder) == ["step-00000007.json", "step-00000007.pt"]
    state = load_newest(folder, report=silent)
    assert state is not None
    torch.testing.assert_close(state["model"], state_of(7)["model"], rtol=0, atol=0)
    assert state["config"] == state_of(7)["config"]
    assert state["optimizer"]["param_groups"] == state_of(7)["optimizer"]["param_groups"]
    assert torch.equal(state["optimizer"]["state"][0]["buffer"], torch.ones(3, dtype=torch.float64))
    assert state["optimizer"]["state"][0]["buffer"].dtype == torch.float64


class _Opens:
    """What a hostile file holds: unpickling it calls a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    save(tmp_path, 1, {"step": _Opens(tmp_path / "ran")})
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_newest(tmp_path, report=silent)
    assert not (tmp_path / "ran").exists()


# The order of writing


def record(monkeypatch: pytest.MonkeyPatch, act: Callable[[tuple[str, ...]], None]) -> None:
    """Call `act` before each fsync, rename and removal, with the names of the files."""
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def recording_fsync(descriptor: int) -> None:
        act(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recording_replace(self: Path, target: Path) -> Path:
        act(("rename", self.name, target.name))
        return replace(self, target)

    def recording_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            act(("remove", self.name))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    monkeypatch.setattr(Path, "unlink", recording_unlink)


def test_data_is_safe_before_its_seal_and_both_before_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state_of(1))
    events: list[tuple[str, ...]] = []
    record(monkeypatch, events.append)
    save(tmp_path, 2, state_of(2), keep_last=1)
    data, mark = (f".step-00000002.{kind}.{os.getpid()}.tmp" for kind in ("pt", "json"))
    assert events == [
        ("fsync", data),
        ("rename", data, "step-00000002.pt"),
        ("fsync", tmp_path.name),
        ("fsync", mark),
        ("rename", mark, "step-00000002.json"),
        ("fsync", tmp_path.name),
        ("remove", "step-00000001.json"),
        ("remove", "step-00000001.pt"),
    ]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        (False, [1, 1, 1, 1, 1, 2, 2, 2, 2]),
        (True, [2, 2, 1, 1, 1, 2, 2, 2, 2]),  # other data under the seal of the old ones is no checkpoint
    ],
)
def test_stopped_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, again: bool, expected: list[int]) -> None:
    """Stopped before each of the eight events in turn; `again` writes a step that is there already."""
    outcomes = []
    for done in range(9):
        folder = tmp_path / str(done)
        save(folder, 1, state_of(1))
        if again:
            save(folder, 2, state_of(2) | {"older": True})
        left = iter(range(done))

        def stop(event: tuple[str, ...], left: Iterator[int] = left) -> None:
            tidies = event[0] == "remove" and event[1].startswith(".")
            if not tidies and next(left, None) is None:
                raise _Killed

        with pytest.MonkeyPatch.context() as patch:
            record(patch, stop)
            with pytest.raises(_Killed) if done < 8 else nullcontext():
                save(folder, 2, state_of(2), keep_last=1)
        state = load_newest(folder, report=lambda _: None)
        assert state is not None
        outcomes.append(state["step"])
        save(folder, 3, state_of(3))
        assert_holds(folder, 3)
    assert outcomes == expected


def test_killed_between_data_and_seal_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, state_of(1))
    save(tmp_path, 2, state_of(2))
    seal(tmp_path, 2).unlink()
    assert saved_steps(tmp_path) == [1]
    assert_holds(tmp_path, 1)
    (tmp_path / ".step-00000002.json.77.tmp").write_text("{")
    assert_holds(tmp_path, 1)
    pt(tmp_path, 1).unlink()
    seal(tmp_path, 1).unlink()
    assert load_newest(tmp_path, report=silent) is None, "the first checkpoint of a run was being written"


# Damage


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda folder: truncate(pt(folder, 2)),
    "emptied": lambda folder: pt(folder, 2).write_bytes(b"") and None,
    "grown": lambda folder: pt(folder, 2).write_bytes(pt(folder, 2).read_bytes() + b"\0") and None,
    "missing": lambda folder: pt(folder, 2).unlink(),
    "first bit": lambda folder: flip(pt(folder, 2), 0),
    "middle bit": lambda folder: flip(pt(folder, 2), 0.5),
    "last bit": lambda folder: flip(pt(folder, 2), 1),
    "seal truncated": lambda folder: truncate(seal(folder, 2)),
    "seal emptied": lambda folder: seal(folder, 2).write_text("") and None,
    "seal of another": lambda folder: seal(folder, 2).write_bytes(seal(folder, 1).read_bytes()) and None,
    "seal a list": lambda folder: seal(folder, 2).write_text("[]") and None,
    "seal without a hash": lambda folder: seal(folder, 2).write_text('{"size": 3}') and None,
    "seal not text": lambda folder: seal(folder, 2).write_bytes(b"\xff\xfe") and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_reported(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, state_of(1))
    save(tmp_path, 2, state_of(2))
    DAMAGE[damage](tmp_path)
    lines: list[str] = []
    state = load_newest(tmp_path, report=lines.append)
    assert state is not None
    assert state["step"] == 1
    assert len(lines) == 1
    assert str(pt(tmp_path, 2)) in lines[0]
    save(tmp_path, 2, state_of(2))
    assert_holds(tmp_path, 2)


def test_when_none_is_whole_the_run_is_not_started_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state_of(step))
        flip(pt(tmp_path, step), 0.3)
    lines: list[str] = []
    with pytest.raises(DataError, match="none of its 2 checkpoints is whole") as caught:
        load_newest(tmp_path, report=lines.append)
    assert str(tmp_path) in str(caught.value)
    assert len(lines) == 2


# What is kept


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [70]),
        (3, 0, [50, 60, 70]),
        (100, 0, [10, 20, 30, 40, 50, 60, 70]),
        (1, 30, [30, 60, 70]),
        (2, 20, [20, 40, 60, 70]),
    ],
)
def test_the_newest_and_every_nth_are_kept(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    for step in range(10, 71, 10):
        save(tmp_path, step, state_of(step), keep_last=keep_last, keep_every=keep_every)
    assert saved_steps(tmp_path) == kept
    assert names(tmp_path) == sorted(path.name for step in kept for path in (pt(tmp_path, step), seal(tmp_path, step)))


def test_a_damaged_newer_one_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    """Resumed from 20 since 40 was damaged; the next save is at 30, and it must be the one that stays."""
    for step in (20, 40):
        save(tmp_path, step, state_of(step))
    truncate(pt(tmp_path, 40))
    assert_holds(tmp_path, 20, reports=1)
    save(tmp_path, 30, state_of(30), keep_last=1, keep_every=20)
    assert saved_steps(tmp_path) == [20, 30]
    assert_holds(tmp_path, 30)


def test_what_killed_runs_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.999.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 1, state_of(1))
    assert names(tmp_path) == ["notes.txt", "step-00000001.json", "step-00000001.pt"]


def test_the_seal_says_what_the_file_is(tmp_path: Path) -> None:
    path = save(tmp_path, 5, state_of(5))
    about = json.loads(seal(tmp_path, 5).read_text())
    assert (about["step"], about["size"]) == (5, path.stat().st_size)
