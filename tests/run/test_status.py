"""What became of a run: true, said once, and kept whole."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.run.claim import claim_run
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
from simclr_dist.system.errors import ConfigError, DataError, DivergedError, LostRankError, RankError, SaveError, StoppedError


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
