"""What became of a run: true, said once, and kept whole."""

import errno
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from simclr_dist.run.claim import Claim, claim_run
from simclr_dist.run.status import (
    End,
    name_cause,
    note_death,
    read_ledger,
    read_status,
    record_end,
    record_event,
    record_start,
    recorded,
    write_status,
)
from simclr_dist.system import files
from simclr_dist.system.errors import (
    ConfigError,
    DataError,
    DivergedError,
    LostRankError,
    RankError,
    SaveError,
    StoppedError,
    TakenOverError,
)


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (None, "done", 0, None),
        (DataError("bad.tar: torn"), "failed", 2, "bad.tar: torn"),
        (ConfigError("seed: bad"), "failed", 2, "seed: bad"),
        (DivergedError("step 3"), "diverged", 3, "step 3"),
        (ValueError("a\nb"), "crashed", 1, "ValueError: a b"),
        (StoppedError("SIGTERM"), "preempted", 75, "SIGTERM"),
        (SaveError("x.pt", OSError(28, "full")), "crashed", 1, "SaveError: x.pt: cannot be written: full"),
        (KeyboardInterrupt(), "crashed", 1, "KeyboardInterrupt: "),
        (SystemExit(5), "crashed", 1, "SystemExit: 5"),
    ],
)
def test_status_says_how_a_run_ended(
    tmp_path: Path, error: BaseException | None, state: str, code: int, reason: str | None
) -> None:
    def within() -> None:
        with recorded(tmp_path, claim_run(tmp_path)):
            assert (read_status(tmp_path)["state"], read_status(tmp_path)["exit_code"]) == ("running", None)
            if error:
                raise error

    assert read_status(tmp_path) == {}
    if error is None:
        within()
    else:
        with pytest.raises(type(error)) as caught:
            within()
        assert caught.value is error, "recorded, not swallowed"
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status.get("reason")) == (state, code, reason)
    assert status["time"] > 1.7e9
    assert status.get("disk", False) == isinstance(error, SaveError)


def test_other_ranks_leave_the_status_alone_unless_they_alone_know(tmp_path: Path) -> None:
    for error in (DataError("all see it"), DivergedError("x"), ValueError("crash")):
        with pytest.raises(type(error)), recorded(tmp_path, None):
            raise error
        assert read_status(tmp_path) == {}
    with recorded(tmp_path, None):
        pass
    assert read_status(tmp_path) == {}
    with pytest.raises(RankError), recorded(tmp_path, None):
        raise RankError("shard-3.tar: unreadable here")
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("failed", "shard-3.tar: unreadable here")


def test_status_can_hold_more(tmp_path: Path) -> None:
    write_status(tmp_path, "running", None, note="x")
    assert read_status(tmp_path)["note"] == "x"
    assert read_status(tmp_path / "none") == {}
    assert read_status(tmp_path / "status.json") == {}, "a file in the folder's place"


# ledger.jsonl


def test_the_ledger_keeps_what_was_said_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path
    assert read_ledger(run) == []
    record_event(run, "start", step=3)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')  # a kill in the middle of a line
    assert [entry["event"] for entry in read_ledger(run)] == ["start"]
    record_event(run, "stop", state="preempted", exit_code=75, why="SIGTERM")
    assert [entry["event"] for entry in read_ledger(run)] == ["start", "stop"], "a torn line costs only itself"
    record_event(run / "missing", "stop", why="no folder")
    assert '"no folder"' in capfd.readouterr().err, "a line that cannot be written is said"


def test_a_start_records_what_was_lost(tmp_path: Path) -> None:
    held = claim_run(tmp_path)
    record_start(held, 0, 2)
    held.beat(17)
    held.release()
    held = claim_run(tmp_path)
    record_start(held, 15, 3)
    first, second = read_ledger(tmp_path)
    assert (first["event"], first["step"], first["steps_lost"], first["generation"]) == ("start", 0, 0, 1)
    assert (second["step"], second["steps_lost"], second["world_size"], second["generation"]) == (15, 2, 3, 2)
    assert 0 <= second["seconds_down"] < 5
    held.release()


def test_every_line_of_the_ledger_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network disk two machines that append at once write over each other."""
    claim = claim_run(tmp_path)
    real = time.sleep
    for append in (
        lambda: record_event(tmp_path, "restart", why="x"),
        lambda: record_start(claim, 0, 1),
        lambda: record_end(tmp_path, claim.generation, End("done", 0)),
    ):
        before = read_ledger(tmp_path)
        with (tmp_path / "ledger.jsonl").open("ab") as another:
            assert files.lock(another.fileno())

            def wait(seconds: float, another: BinaryIO = another, before: object = before) -> None:
                assert read_ledger(tmp_path) == before
                another.close()
                real(seconds)

            monkeypatch.setattr("simclr_dist.run.status.time.sleep", wait)
            append()
            assert another.closed
        assert len(read_ledger(tmp_path)) == len(before) + 1
    claim.release()


def test_a_disk_without_locks_keeps_its_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock", none)
    record_event(tmp_path, "restart", why="x")
    record_end(tmp_path, 1, End("done", 0))
    assert [entry["event"] for entry in read_ledger(tmp_path)] == ["restart", "stop"]


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Claim, Callable[[], Claim]]]:
    """A start, and what has another machine take over its run."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first, later = claim_run(tmp_path), list[Claim]()

    def take_over() -> Claim:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        later.append(claim_run(tmp_path))
        write_status(tmp_path, "running", None, start=later[0].generation, note="the other's")
        return later[0]

    yield first, take_over
    for claim in (first, *later):
        claim.release()


@pytest.mark.parametrize(
    "writes",
    [
        lambda claim: recorded(claim.run, claim).__enter__(),
        lambda claim: write_status(claim.run, "running", None, start=claim.generation, alarms=[]),
        lambda claim: record_start(claim, 3, 2),
    ],
    ids=["its first status", "an alarm", "its start"],
)
def test_a_start_that_was_left_behind_writes_nothing(left_behind: Any, writes: Callable[[Claim], object]) -> None:
    first, take_over = left_behind
    take_over()
    before = contents(first.run)
    with pytest.raises(TakenOverError, match="taken over by"):
        writes(first)
    assert contents(first.run) == before


def test_a_start_that_is_left_behind_while_it_writes(left_behind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk, say."""
    first, take_over = left_behind
    write_status(first.run, "running", None, start=first.generation)
    real = os.fsync

    def slow(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        take_over()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(TakenOverError):
        write_status(first.run, "running", None, start=first.generation, alarms=[])
    assert read_status(first.run)["note"] == "the other's"


def test_the_end_of_a_start_that_was_left_behind_is_not_the_others(left_behind: Any) -> None:
    """Its parent sees it die, and names the cause."""
    first, take_over = left_behind
    record_end(first.run, first.generation, End("crashed", 1, "Connection reset", lost=True))
    take_over()
    before = contents(first.run)
    name_cause(first.run, 0, "rank 1 was killed")
    record_end(first.run, first.generation, End("crashed", 1, "x"))
    assert contents(first.run) == before


def stops(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_ledger(run) if line["event"] == "stop"]


def test_the_first_word_of_an_end_stands(tmp_path: Path) -> None:
    """Rank 1 says what it alone has seen; rank 0 loses the connection with it, and its parent sees it die."""
    claim = claim_run(tmp_path)
    claim.beat(8)
    with pytest.raises(RankError), recorded(tmp_path, None):
        raise RankError("shard-3.tar: unreadable here")
    with pytest.raises(LostRankError), recorded(tmp_path, claim):
        raise LostRankError("gone")
    note_death(tmp_path)
    (stop,) = stops(tmp_path)
    assert (stop["state"], stop["exit_code"], stop["why"]) == ("failed", 2, "shard-3.tar: unreadable here")
    assert (stop["step"], stop["generation"]) == (8, 1)
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["start"]) == ("failed", 2, 1)
    assert status["reason"] == "shard-3.tar: unreadable here"


def test_many_parents_that_see_one_death_record_it_once(tmp_path: Path) -> None:
    claim = claim_run(tmp_path)
    write_status(tmp_path, "running", None)
    claim.beat(7)
    claim.release()
    context = multiprocessing.get_context("fork")
    together = context.Barrier(8)

    def see() -> None:
        together.wait()
        note_death(tmp_path)

    parents = [context.Process(target=see) for _ in range(8)]
    for parent in parents:
        parent.start()
    for parent in parents:
        parent.join()
        assert parent.exitcode == 0
    (stop,) = stops(tmp_path)
    assert (stop["state"], stop["step"], stop["why"]) == ("crashed", 7, "ended without a word: killed, or cut off")
    assert read_status(tmp_path)["reason"] == stop["why"]


def test_a_status_that_the_disk_did_not_take_is_shown_from_the_ledger(tmp_path: Path) -> None:
    claim = claim_run(tmp_path)
    write_status(tmp_path, "running", None)
    record_event(tmp_path, "stop", state="preempted", exit_code=75, why="SIGTERM", generation=1)
    claim.release()
    note_death(tmp_path)
    assert len(stops(tmp_path)) == 1
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["reason"]) == ("preempted", 75, "SIGTERM")


def test_the_ledger_knows_all_that_the_status_says_of_an_end(tmp_path: Path) -> None:
    for end in (End("crashed", 1, "disk full", disk=True), End("done", 0)):
        claim = claim_run(tmp_path)
        record_end(tmp_path, claim.generation, end)
        claim.release()
        status = read_status(tmp_path)
        (tmp_path / "status.json").unlink()
        assert read_status(tmp_path) | {"time": 0} == status | {"time": 0}


def test_alarms_stay_with_their_start(tmp_path: Path) -> None:
    for alarms in ([{"kind": "collapse"}], None):
        claim = claim_run(tmp_path)
        if alarms:
            write_status(tmp_path, "running", None, start=claim.generation, alarms=alarms)
        record_end(tmp_path, claim.generation, End("crashed", 1, "x"))
        claim.release()
        assert read_status(tmp_path).get("alarms") == alarms


def test_the_end_of_a_start_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Its ledger's stops name no start."""
    claim_run(tmp_path).release()
    record_event(tmp_path, "stop", state="preempted", exit_code=75, why="SIGTERM", step=3)
    write_status(tmp_path, "running", None)  # the next one, which was killed
    note_death(tmp_path)
    assert [stop["state"] for stop in stops(tmp_path)] == ["preempted", "crashed"]
    assert read_status(tmp_path)["state"] == "crashed"


@pytest.mark.parametrize(
    ("end", "earlier", "reason"),
    [
        (End("crashed", 1, "Connection reset", lost=True), 0, "rank 1 was killed"),
        (End("crashed", 1, "Connection reset", lost=True), 1, "Connection reset"),
        (End("crashed", 1, "ValueError: x"), 0, "ValueError: x"),
        (End("failed", 2, "bad.tar"), 0, "bad.tar"),
    ],
)
def test_the_cause_is_shown_of_a_start_that_lost_a_rank(tmp_path: Path, end: End, earlier: int, reason: str) -> None:
    claim = claim_run(tmp_path)
    record_end(tmp_path, claim.generation, end)
    name_cause(tmp_path, earlier, "rank 1 was killed")
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == (end.state, reason)
    claim.release()
    later = claim_run(tmp_path)
    write_status(tmp_path, "running", None)
    name_cause(tmp_path, earlier, "rank 1 was killed")
    assert read_status(tmp_path)["state"] == "running", "the next one is not spoken of"
    later.release()


def test_a_condition_is_looked_at_while_nobody_else_writes(tmp_path: Path) -> None:
    def alone() -> bool:
        with (tmp_path / "ledger.jsonl").open("ab") as another:
            return not files.lock(another.fileno())

    record_event(tmp_path, "gave_up", only_if=alone, why="x")
    record_event(tmp_path, "gave_up", only_if=lambda: not alone(), why="x")
    assert len(read_ledger(tmp_path)) == 1
