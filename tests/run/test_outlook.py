"""Does anything start a run again? What its ledger and status say, in whatever order things have happened."""

import os
from pathlib import Path

import pytest

from simclr_dist.run.claim import claim_run
from simclr_dist.run.status import End, Outlook, outlook, read_status, record_end, record_event, record_start, write_status

CODES = {"done": 0, "failed": 2, "diverged": 3, "preempted": 75, "crashed": 1}


def happened(run: Path, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word is an event. Job 7 trains, 8 evaluates, 9 trains later."""
    job, claim = None, None
    for word in story.split():
        if word in ("7", "9"):
            record_event(run, "submitted", kind="train", job=word)
            job = word
        elif word == "8":
            record_event(run, "submitted", kind="eval", job=word)
        elif word in ("start", "typed"):
            monkeypatch.delenv("SLURM_JOB_ID", raising=False)
            if word == "start" and job:
                monkeypatch.setenv("SLURM_JOB_ID", job)
            claim = claim_run(run)
            write_status(run, "running", None)
            record_start(claim, 0, 1)
        elif word == "claimed":
            claim = claim_run(run)
        elif word in CODES:
            assert claim is not None
            record_end(run, claim.generation, End(word, CODES[word], "why"))
            claim.release()
        elif word == "requeued":
            record_event(run, "requeued", kind="train", job=job, why="x", crash=False, saved=0)
        elif word == "eval-requeued":
            record_event(run, "requeued", kind="eval", job="8", why="x", crash=False, saved=0)
        elif word == "eval-cancelled":
            record_event(run, "cancelled", kind="eval", jobs=["8"])
        elif word == "cancelled":
            record_event(run, "cancelled", kind="train", jobs=["7", "8"])
        elif word == "gave-up":
            record_event(run, "gave_up", kind="train", job=job, restart="0", why="4 crashes")
        elif word == "eval-gave-up":
            record_event(run, "gave_up", kind="eval", job="8", restart="0", why="4 crashes")
        elif word == "batch":  # a script of one's own, as job 9
            monkeypatch.setenv("SLURM_JOB_ID", "9")
        else:
            assert word == "launcher-gave-up"
            record_event(run, "gave_up", why="a rank was killed", launcher_job=os.environ.get("SLURM_JOB_ID"))


@pytest.mark.parametrize(
    ("story", "state", "why", "over", "job"),
    [
        ("", "not started", None, False, None),
        ("7", "submitted", None, False, "7"),
        ("7 start", "running", None, False, "7"),
        ("7 start preempted", "preempted", "why", False, "7"),
        ("7 start preempted requeued", "requeued", None, False, "7"),
        ("7 start done", "done", "why", True, None),
        ("7 start diverged", "diverged", "why", True, None),
        ("7 claimed failed", "failed", "why", True, None),  # before its first step
        ("typed crashed", "crashed", "why", False, None),
        # An evaluation's jobs come and go.
        ("7 8 start crashed gave-up eval-requeued", "crashed", "given up: 4 crashes", True, None),
        ("7 8 start preempted cancelled eval-requeued", "preempted", "cancelled", True, None),
        ("7 8 start crashed gave-up 8", "crashed", "given up: 4 crashes", True, None),
        ("7 8 start eval-gave-up", "running", None, False, "7"),
        ("7 8 start eval-cancelled", "running", None, False, "7"),
        ("7 8 start cancelled preempted", "preempted", "cancelled", True, None),  # the ranks save after the word
        # Somebody has submitted it again, or started it.
        ("7 start failed 9", "submitted", None, False, "9"),
        ("7 start done 9 8", "submitted", None, False, "9"),  # with more steps
        ("7 start done 9 start", "running", None, False, "9"),
        ("7 start done typed", "running", None, False, None),
        ("7 start preempted cancelled 9", "submitted", None, False, "9"),
        ("7 start crashed gave-up 9", "submitted", None, False, "9"),
        ("7 start failed 9 start failed", "failed", "why", True, None),
        # A launcher's word is the last where no batch script may start it again.
        ("typed crashed launcher-gave-up", "crashed", "given up: a rank was killed", True, None),
        ("7 start crashed launcher-gave-up", "crashed", "given up: a rank was killed", False, "7"),
        ("batch claimed crashed launcher-gave-up", "crashed", "given up: a rank was killed", False, "9"),
        ("7 start crashed batch launcher-gave-up", "crashed", "given up: a rank was killed", False, "9"),
        ("7 start crashed launcher-gave-up requeued", "requeued", None, False, "7"),
        ("7 start crashed launcher-gave-up gave-up", "crashed", "given up: 4 crashes", True, None),
    ],
)
def test_what_a_run_may_still_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: str, state: str, why: str | None, over: bool, job: str | None
) -> None:
    happened(tmp_path, story, monkeypatch)
    assert outlook(tmp_path) == Outlook(state, why, over, job)


@pytest.mark.parametrize(
    ("story", "over"),
    [("7 start done", True), ("7 start crashed gave-up", True), ("7 start done 9", False), ("7 start preempted", False)],
)
def test_a_status_that_the_disk_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: str, over: bool) -> None:
    """It is gone, or still says running."""
    happened(tmp_path, story, monkeypatch)
    for status in (None, {"start": read_status(tmp_path)["start"]}):
        (tmp_path / "status.json").unlink(missing_ok=True)
        if status:
            write_status(tmp_path, "running", None, **status)
        assert outlook(tmp_path).over == over


def test_a_status_of_an_earlier_start_that_the_disk_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened(tmp_path, "7 start done", monkeypatch)
    earlier = (tmp_path / "status.json").read_bytes()
    happened(tmp_path, "9 start", monkeypatch)
    (tmp_path / "status.json").write_bytes(earlier)
    assert outlook(tmp_path) == Outlook("running", job="9")


def test_a_ledger_that_the_disk_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of a later start counts."""
    happened(tmp_path, "7 start done", monkeypatch)
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    happened(tmp_path, "typed", monkeypatch)
    (tmp_path / "ledger.jsonl").write_bytes(ledger)
    assert outlook(tmp_path) == Outlook("running", job="7")
    write_status(tmp_path, "failed", 2, reason="x")
    assert outlook(tmp_path) == Outlook("failed", "x", over=True)
