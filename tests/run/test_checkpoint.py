"""Checkpoints: whole or not there, whatever happens while one is written and whatever becomes of its bytes."""

import errno
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dist.run.checkpoint import FORMAT, load_newest, save, saved_steps
from simclr_dist.system.errors import DataError, SaveError, TakenOverError


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
    with pytest.raises(DataError, match=r"is no checkpoint of simclr-dist \(UnpicklingError\); move it and its"):
        load_newest(tmp_path, report=silent)
    assert not (tmp_path / "ran").exists()


def _sealed(folder: Path, step: int, content: bytes) -> Path:
    """A file with the right seal, whoever has written it."""
    pt(folder, step).write_bytes(content)
    about = {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, step).write_text(json.dumps(about))
    return pt(folder, step)


def _saved(state: object) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"no zip",
        _saved(state_of(2))[:-100],
        _saved([1]),
        _saved(None),
        _saved(torch.ones(2)),
        _saved(state_of(3)),
    ],
)
def test_a_foreign_file_with_a_seal_is_refused(tmp_path: Path, content: bytes) -> None:
    """The one before is whole, but the next save would remove this one."""
    save(tmp_path, 1, state_of(1))
    path = _sealed(tmp_path, 2, content)
    with pytest.raises(DataError) as caught:
        load_newest(tmp_path, report=silent)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


# The order of writing


def record(monkeypatch: pytest.MonkeyPatch, act: Callable[[tuple[str, ...]], None]) -> None:
    """Call `act` before each fsync, rename and removal, with the names of the files; TEMPORARY(NAME) for NAME's."""
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def name(path: Path) -> str:
        return re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"TEMPORARY(\1)", path.name)

    def recording_fsync(descriptor: int) -> None:
        act(("fsync", name(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def recording_replace(self: Path, target: Path) -> Path:
        act(("rename", name(self), name(target)))
        return replace(self, target)

    def recording_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            act(("remove", name(self)))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    monkeypatch.setattr(Path, "unlink", recording_unlink)


def test_data_is_safe_before_its_seal_and_both_before_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, state_of(1))
    events: list[tuple[str, ...]] = []
    record(monkeypatch, events.append)
    save(tmp_path, 2, state_of(2), keep_last=1)
    assert events == [
        ("fsync", "TEMPORARY(step-00000002.pt)"),
        ("rename", "TEMPORARY(step-00000002.pt)", "step-00000002.pt"),
        ("fsync", tmp_path.name),
        ("fsync", "TEMPORARY(step-00000002.json)"),
        ("rename", "TEMPORARY(step-00000002.json)", "step-00000002.json"),
        ("fsync", tmp_path.name),
        ("remove", "step-00000001.json"),
        ("remove", "step-00000001.pt"),
    ]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
def test_stopped_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, again: bool) -> None:
    """Stopped before each of the eight events in turn; `again`: under the seal of a damaged one of the same step."""
    outcomes = []
    for done in range(9):
        folder = tmp_path / str(done)
        save(folder, 1, state_of(1))
        if again:
            save(folder, 2, state_of(2) | {"older": True})
            truncate(pt(folder, 2))
        left = iter(range(done))

        def stop(event: tuple[str, ...], left: Iterator[int] = left) -> None:
            tidies = event[0] == "remove" and event[1].startswith("TEMPORARY")
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
    assert outcomes == [1, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_whole_one_is_not_written_again(tmp_path: Path) -> None:
    """For a moment there would be none: new data under the old seal."""
    path = save(tmp_path, 2, state_of(2), keep_last=1)
    before = path.stat().st_ino, path.read_bytes()
    assert save(tmp_path, 2, state_of(2) | {"more": 1}, keep_last=1) == path
    assert (path.stat().st_ino, path.read_bytes()) == before
    assert_holds(tmp_path, 2)


def test_killed_between_data_and_seal_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, state_of(1))
    save(tmp_path, 2, state_of(2))
    seal(tmp_path, 2).unlink()
    assert saved_steps(tmp_path) == [1]
    assert_holds(tmp_path, 1, reports=1)
    (tmp_path / ".step-00000002.json.77.tmp").write_text("{")
    assert_holds(tmp_path, 1, reports=1)
    pt(tmp_path, 1).unlink()
    seal(tmp_path, 1).unlink()
    lines: list[str] = []
    assert load_newest(tmp_path, report=lines.append) is None, "the first checkpoint of a run was being written"
    assert len(lines) == 1


# A disk that does not take it, and a run that another start has taken over


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("done", range(6))
def test_a_failed_save_leaves_the_others_and_no_part_of_its_own(tmp_path: Path, done: int, number: int) -> None:
    """Each of the six events before the old one goes fails in turn."""
    save(tmp_path, 1, state_of(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    left = iter(range(done))

    def fail(event: tuple[str, ...]) -> None:
        if event[0] != "remove" and next(left, None) is None:
            raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        record(patch, fail)
        with pytest.raises(SaveError) as caught:
            save(tmp_path, 2, state_of(2), keep_last=1)
    assert str(caught.value) == f"{pt(tmp_path, 2)}: cannot be written: {os.strerror(number)}"
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.items() >= before.items()
    sealed = done == 5  # all is there, and only the folder may be behind
    assert set(after) - set(before) == ({pt(tmp_path, 2).name, seal(tmp_path, 2).name} if sealed else set())
    assert_holds(tmp_path, 2 if sealed else 1)
    save(tmp_path, 2, state_of(2), keep_last=1)
    assert saved_steps(tmp_path) == [2]
    assert_holds(tmp_path, 2)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SaveError, match=r"run/checkpoints/step-00000001.pt: cannot be written: Not a directory"):
        save(tmp_path / "run" / "checkpoints", 1, state_of(1))


def taken_over(at: int, do: Callable[[], None]) -> Callable[[], None]:
    """An `allowed` that refuses from its call number `at` on, where it calls `do` first."""
    calls = iter(range(at))

    def allowed() -> None:
        if next(calls, None) is None:
            do()
            raise TakenOverError("by another")

    return allowed


@pytest.mark.parametrize("at", range(4))  # before leftovers go, the data is put in place, its seal is, older ones go
def test_a_start_that_lost_its_run_touches_nothing_of_the_other(tmp_path: Path, at: int) -> None:
    """The other one saves the same step, and is in the middle of the next."""
    for step in (1, 2):
        save(tmp_path, step, state_of(step))

    def other() -> None:
        save(tmp_path, 3, state_of(3) | {"writer": "other"}, keep_last=2)
        pt(tmp_path, 4).write_bytes(b"data of 4")
        (tmp_path / ".step-00000004.json.0.tmp").write_bytes(b"seal of 4")
        theirs.update(
            {path.name: path.read_bytes() for path in tmp_path.iterdir() if "0003" in path.name or "0004" in path.name}
        )

    theirs: dict[str, bytes] = {}
    with pytest.raises(TakenOverError):
        save(tmp_path, 3, state_of(3), keep_last=1, allowed=taken_over(at, other))
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert len(theirs) == 4
    expected = {path.name for step in (2, 3) for path in (pt(tmp_path, step), seal(tmp_path, step))} | set(theirs)
    assert set(names(tmp_path)) == expected


@pytest.mark.parametrize(("at", "left"), [(0, []), (1, []), (2, [3]), (3, [3])])
def test_a_start_that_lost_its_run_leaves_no_temporary_file(tmp_path: Path, at: int, left: list[int]) -> None:
    """Data without a seal stays, as its name may be the other one's by now; the next save removes it."""
    for step in (1, 2):
        save(tmp_path, step, state_of(step))
    before = names(tmp_path)
    with pytest.raises(TakenOverError):
        save(tmp_path, 3, state_of(3), keep_last=1, allowed=taken_over(at, lambda: None))
    sealed = [seal(tmp_path, 3).name] if at == 3 else []
    assert names(tmp_path) == sorted([*before, *(pt(tmp_path, step).name for step in left), *sealed])
    assert_holds(tmp_path, 3 if sealed else 2, reports=None)


def test_what_appears_while_it_asks_is_not_removed(tmp_path: Path) -> None:
    """Another start that takes over after the last question has been answered."""
    save(tmp_path, 1, state_of(1))
    calls = iter(range(4))

    def allowed() -> None:
        if next(calls) == 3:
            pt(tmp_path, 9).write_bytes(b"data of 9")
            save(tmp_path / "other", 8, state_of(8))
            for path in (tmp_path / "other").iterdir():
                path.rename(tmp_path / path.name)

    save(tmp_path, 2, state_of(2), keep_last=1, allowed=allowed)
    assert saved_steps(tmp_path) == [2, 8]
    assert pt(tmp_path, 9).exists()
    assert next(calls, None) is None


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
    "a folder": lambda folder: pt(folder, 2).unlink() or pt(folder, 2).mkdir(),
    "of another": lambda folder: pt(folder, 2).write_bytes(pt(folder, 1).read_bytes()) and None,
    "first bit": lambda folder: flip(pt(folder, 2), 0),
    "middle bit": lambda folder: flip(pt(folder, 2), 0.5),
    "last bit": lambda folder: flip(pt(folder, 2), 1),
    "seal missing": lambda folder: seal(folder, 2).unlink(),
    "seal truncated": lambda folder: truncate(seal(folder, 2)),
    "seal emptied": lambda folder: seal(folder, 2).write_text("") and None,
    "seal of another": lambda folder: seal(folder, 2).write_bytes(seal(folder, 1).read_bytes()) and None,
    "seal a list": lambda folder: seal(folder, 2).write_text("[]") and None,
    "seal without a hash": lambda folder: seal(folder, 2).write_text('{"size": 3}') and None,
    "seal not text": lambda folder: seal(folder, 2).write_bytes(b"\xff\xfe") and None,
    "both of another": lambda folder: [f(folder, 2).write_bytes(f(folder, 1).read_bytes()) for f in (pt, seal)] and None,
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
    assert lines[0].startswith(f"{pt(tmp_path, 2)}: damaged checkpoint: ")
    assert "\n" not in lines[0]
    if damage == "a folder":
        pt(tmp_path, 2).rmdir()
    save(tmp_path, 2, state_of(2))
    assert_holds(tmp_path, 2)


def test_any_single_bit_is_found(tmp_path: Path) -> None:
    """Every bit of the seal; of the data 200, drawn with a seed."""
    for step in (1, 2):
        save(tmp_path, step, state_of(step))
    drawn = random.Random(0).sample(range(8 * pt(tmp_path, 2).stat().st_size), 200)
    for path, bits in ((seal(tmp_path, 2), range(8 * seal(tmp_path, 2).stat().st_size)), (pt(tmp_path, 2), drawn)):
        whole = path.read_bytes()
        for bit in bits:
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            assert_holds(tmp_path, 1, reports=1)
        path.write_bytes(whole)
    assert_holds(tmp_path, 2)


def test_two_damaged_ones_in_a_row(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state_of(step))
    pt(tmp_path, 3).unlink()
    seal(tmp_path, 2).write_text("{}")
    assert_holds(tmp_path, 1, reports=2)


@pytest.mark.parametrize("found", [FORMAT + 1, "1", None])
def test_another_format_is_refused(tmp_path: Path, found: object) -> None:
    """It is whole: an older one in its place would throw work away without need."""
    save(tmp_path, 1, state_of(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simclr_dist.run.checkpoint.FORMAT", found)
        save(tmp_path, 2, state_of(2))
    with pytest.raises(DataError) as caught:
        load_newest(tmp_path, report=silent)
    assert str(caught.value).startswith(f"{pt(tmp_path, 2)}: checkpoint format {found}, this simclr-dist reads {FORMAT};")
    assert "\n" not in str(caught.value)


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
    """Temporary files and data without a seal, of any step; not what somebody has put beside them."""
    for name in (".step-00000001.pt.999.tmp", ".step-00000003.json.0a1b2c3d.tmp", "step-00000001.pt", "step-00000007.pt"):
        (tmp_path / name).write_bytes(b"half")
    mine = ["notes.txt", "step-best.pt", "step-notes.json"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    save(tmp_path, 1, state_of(1))
    assert names(tmp_path) == sorted([*mine, "step-00000001.json", "step-00000001.pt"])
    assert_holds(tmp_path, 1)


def test_what_killed_runs_left_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that it has filled, no save would get further otherwise."""
    save(tmp_path, 1, state_of(1))
    pt(tmp_path, 2).write_bytes(b"half")
    events: list[tuple[str, ...]] = []
    record(monkeypatch, events.append)
    save(tmp_path, 2, state_of(2), keep_last=1)
    assert events[:2] == [("remove", "step-00000002.pt"), ("fsync", "TEMPORARY(step-00000002.pt)")]


def test_what_cannot_be_removed_is_said_and_costs_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".step-00000001.pt.999.tmp").mkdir()
    save(tmp_path, 2, state_of(2))
    assert_holds(tmp_path, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"WARNING: {tmp_path / '.step-00000001.pt.999.tmp'}: cannot be removed: ")
    assert error.count("\n") == 1


def test_the_seal_says_what_the_file_is(tmp_path: Path) -> None:
    path = save(tmp_path, 5, state_of(5))
    about = json.loads(seal(tmp_path, 5).read_text())
    assert (about["step"], about["size"]) == (5, path.stat().st_size)
