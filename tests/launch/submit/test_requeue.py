"""Which jobs start again, which end, and that a request which was not heard is made again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.convert.partial import Partial
from simclr_dist.launch.slurm import requeue, rescue, scheduler
from simclr_dist.launch.slurm.requeue import go_on, settle
from simclr_dist.run.claim import claim_run
from simclr_dist.run.restarts import MAX_IDLE_STOPS
from simclr_dist.run.status import outlook, read_ledger, record_event, record_start, write_status
from simclr_dist.system.errors import PREEMPTED
from stand_ins import StandIns


class Slurm:
    """What the scheduler says of the job, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fate: str | None = None
        self.refusals: list[str] = []
        self.asked = 0
        monkeypatch.setattr(scheduler, "overtaken", lambda _: self.fate)
        monkeypatch.setattr(scheduler, "requeue", self._requeue)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def _requeue(self, _: str) -> str | None:
        self.asked += 1
        return self.refusals.pop() if self.refusals else None


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(monkeypatch)


def events(run: Path) -> list[str]:
    return [entry["event"] for entry in read_ledger(run)]


@pytest.mark.parametrize(
    ("state", "code", "final", "exit_code"),
    [
        ("preempted", 75, False, None),
        ("crashed", 1, False, None),
        ("crashed", 137, False, None),
        (None, 143, False, None),
        (None, 75, False, None),
        ("failed", 75, True, 2),  # srun's code is the highest of all tasks'
        ("diverged", 143, True, 3),
        ("done", 143, True, 0),  # a signal on the way out
        ("done", 75, True, 0),
        (None, 2, True, 2),
        (None, 3, True, 3),
    ],
)
def test_what_a_task_s_end_means(
    tmp_path: Path, slurm: Slurm, state: str | None, code: int, final: bool, exit_code: int | None
) -> None:
    if state:
        own = {"preempted": 75, "crashed": 1, "failed": 2, "diverged": 3, "done": 0}[state]
        write_status(tmp_path, state, own, reason="as it was")
    verdict = settle(tmp_path, "train", "7", code, 3)
    assert verdict.final == final
    assert not final or verdict.code == exit_code
    assert verdict.crash == (not final and code != PREEMPTED)


def test_a_status_of_an_earlier_start_is_not_this_one_s(tmp_path: Path, slurm: Slurm) -> None:
    write_status(tmp_path, "failed", 2, reason="yesterday")
    status: dict[str, Any] = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"time": requeue._began() - 60}))
    assert not settle(tmp_path, "train", "7", 75, 3).final


def test_cancelled_jobs_end(tmp_path: Path, slurm: Slurm) -> None:
    (tmp_path / "cancelled").write_text("7 8\n")
    assert settle(tmp_path, "train", "7", 75, 3).final
    assert not settle(tmp_path, "train", "9", 75, 3).final, "the next job of the run was not cancelled"
    slurm.fate = "cancelled"
    assert settle(tmp_path, "train", "9", 75, 3).final
    slurm.fate = "requeued"
    assert not settle(tmp_path, "train", "9", 1, 0).final, "whatever it was: SLURM has started it again"


@pytest.mark.parametrize(("code", "limit"), [(1, 3), (75, MAX_IDLE_STOPS)])
def test_what_brings_nothing_new_is_given_up(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, code: int, limit: int
) -> None:
    record_event(tmp_path, "submitted", job="7")
    for start in range(limit):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        verdict = settle(tmp_path, "train", "7", code, 3)
        assert not verdict.final, start
        assert go_on(tmp_path, "train", "7", verdict, one_of_many=True) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(limit))
    assert settle(tmp_path, "train", "7", code, 3).final
    assert events(tmp_path)[-1] == "gave_up"
    assert settle(tmp_path, "train", "7", code, 3).final, "the batch script asks again, after the task"
    assert events(tmp_path).count("gave_up") == 1
    record_event(tmp_path, "submitted", job="8")
    assert not settle(tmp_path, "train", "8", code, 3).final, "a new submission starts counting anew"


def ended(run: Path, monkeypatch: pytest.MonkeyPatch, start: int, code: int, *, waited: bool, submitted: str = "7") -> bool:
    """Whether a watcher's job ends for good at the end of this start; otherwise it is requeued."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
    if waited:
        record_event(run, "waiting", kind="eval", job=submitted)
    verdict = settle(run, "eval", submitted, code, 3)
    return verdict.final or go_on(run, "eval", submitted, verdict, one_of_many=True) is not None


@pytest.mark.parametrize("fate", [None, "requeued"])
def test_a_watcher_may_wait_as_long_as_the_training_takes(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, fate: str | None
) -> None:
    """At its own time limits, and where SLURM preempts it. Then evaluations never end: one of a file that goes, and another."""
    slurm.fate = fate
    for start in range(3 * MAX_IDLE_STOPS):
        record_event(tmp_path, "requeued", kind="train", job="6", why="x", crash=False, saved=start)  # which is not its own
        assert not ended(tmp_path, monkeypatch, start, PREEMPTED, waited=True), start
    slurm.fate = None
    for start in range(3 * MAX_IDLE_STOPS, 5 * MAX_IDLE_STOPS + 1):
        waited = start == 4 * MAX_IDLE_STOPS
        assert not ended(tmp_path, monkeypatch, start, PREEMPTED, waited=waited), start
    assert ended(tmp_path, monkeypatch, 5 * MAX_IDLE_STOPS + 1, PREEMPTED, waited=False)
    assert read_ledger(tmp_path)[-1]["why"] == f"{MAX_IDLE_STOPS + 1} stops in a row at step 0; the last: stopped"


def test_a_watcher_that_crashes_in_a_circle_is_given_up(tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it comes to wait before each crash, and is stopped between them."""
    for start, code in enumerate((1, PREEMPTED, 1, 1)):
        assert not ended(tmp_path, monkeypatch, start, code, waited=True), start
    assert ended(tmp_path, monkeypatch, 4, 1, waited=True)


def test_progress_starts_the_count_anew(tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    for start in range(12):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        (tmp_path / "checkpoints" / f"step-{start // 2:08d}.json").touch()
        verdict = settle(tmp_path, "train", "7", 1, 2)
        assert not verdict.final, start
        go_on(tmp_path, "train", "7", verdict, one_of_many=True)


def test_a_launcher_that_gives_up_at_every_start_does_not_start_the_count_anew(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under launch/train.sbatch, which nobody has submitted in the ledger; another job counts for itself."""
    for start in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        record_event(tmp_path, "gave_up", why="RuntimeError: x")
        verdict = settle(tmp_path, "train", "7", 1, 3)
        assert verdict.final == (start == 3), start
        if not verdict.final:
            go_on(tmp_path, "train", "7", verdict, one_of_many=False)
    assert verdict.why.startswith("4 crashes in a row at step 0; the last: ")
    assert not settle(tmp_path, "train", "8", 1, 3).final


def test_of_many_tasks_one_asks_and_the_batch_script_asks_again(tmp_path: Path, slurm: Slurm) -> None:
    verdict = settle(tmp_path, "train", "7", 75, 3)
    slurm.refusals = ["the controller is away"]
    assert go_on(tmp_path, "train", "7", verdict, one_of_many=True) == "the controller is away"
    assert go_on(tmp_path, "train", "7", verdict, one_of_many=True) is None, "the mark stands"
    assert slurm.asked == 1
    assert go_on(tmp_path, "train", "7", verdict, one_of_many=False) is None, "who made the mark may have been killed"
    assert slurm.asked == 2
    assert events(tmp_path).count("requeued") == 1


def test_a_start_counts_once_though_task_and_batch_script_ask(tmp_path: Path, slurm: Slurm) -> None:
    verdict = settle(tmp_path, "train", "7", 1, 1)
    slurm.refusals = ["the controller is away"]
    assert go_on(tmp_path, "train", "7", verdict, one_of_many=True) == "the controller is away"
    assert not settle(tmp_path, "train", "7", 1, 1).final


@pytest.mark.parametrize("kind", ["eval", "work"])
def test_a_rank_s_mistake_is_final_for_the_ranks_that_it_stops(tmp_path: Path, slurm: Slurm, kind: requeue.Kind) -> None:
    """srun ends them by SIGTERM, and passes on the highest code of all: that of a stop."""
    assert settle(tmp_path, kind, "7", 2, 3).final
    assert settle(tmp_path, kind, "7", PREEMPTED, 3).final
    assert not settle(tmp_path, kind, "8", PREEMPTED, 3).final


def test_what_a_part_has_done_counts_and_what_others_have_does_not(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, jobs = Partial(tmp_path / "out.v1"), tmp_path / "out.v1.jobs"
    for folder in (partial.units, jobs):
        folder.mkdir(parents=True)
    partial.settings.write_text('{"parts": 2}')
    for restart, (unit, final) in enumerate([(0, False), (2, False), (1, False), (3, True)]):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        partial.unit(unit).touch()
        verdict = settle(jobs, "work", "7_1", -9, 1)
        assert verdict.final == final, f"units 0 and 2 are those of part 1, and {unit} is new"
        go_on(jobs, "work", "7_1", verdict, one_of_many=False)


def test_processes_know_when_they_began() -> None:
    assert 0 < time.time() - requeue._began() < 24 * 3600


@pytest.mark.parametrize(("refusals", "said"), [([], "starts again: stopped"), (["x"], "ends: stopped, and not requeued: x")])
def test_a_batch_script_s_last_word_is_what_came_of_it(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    refusals: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.refusals = list(refusals)
    assert rescue.main([str(tmp_path), "75"]) == PREEMPTED
    assert capsys.readouterr().err == f"simclr-dist: job 7: {said}\n"
    assert outlook(tmp_path).over == bool(refusals)
    given_up = [
        (entry["job"], entry["kind"], entry["restart"]) for entry in read_ledger(tmp_path) if entry["event"] == "gave_up"
    ]
    assert given_up == [("7", "train", "0")] * bool(refusals)


def test_a_start_that_was_left_behind_says_nothing_behind_the_new_one(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that was lost, and comes back."""
    slurm.fate = "requeued"
    verdict = settle(tmp_path, "train", "7", 1, 3)
    with monkeypatch.context() as new:
        new.setenv("SLURM_JOB_ID", "7")
        new.setenv("SLURM_RESTART_COUNT", "1")
        claim = claim_run(tmp_path)
        write_status(tmp_path, "running", None)
        record_start(claim, 0, 1)
    assert go_on(tmp_path, "train", "7", verdict, one_of_many=False) is None
    assert outlook(tmp_path).state == "running"
    assert events(tmp_path) == ["start"]
    claim.release()


def test_the_end_of_a_start_that_was_left_behind_is_not_the_last(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation's starts leave no line that it could see. Between those of later starts its own would break their row."""
    for restart, saved in ((0, 5), (2, 5), (1, 9), (3, 5)):
        record_event(tmp_path, "requeued", kind="eval", job="7", restart=str(restart), why="x", crash=True, saved=saved)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert [end.saved for end in requeue._earlier(tmp_path, "eval", "7")[0]] == [5, 5, 5]


def test_a_rescue_outlives_the_signals_of_its_job(no_slurm: StandIns, tmp_path: Path) -> None:
    """bash's trap ends where its `exec` begins."""
    asked, answer = no_slurm.folder / "asked", no_slurm.folder / "answer"
    # It would outlive a rescue that is killed, so it does not wait for ever.
    waits = "until /bin/cat {folder}/answer 2>&- || [ $((turns += 1)) -gt 600 ]; do /bin/sleep 0.05; done"
    no_slurm.write("scontrol", "#!/bin/sh\nturns=0\n: > {folder}/asked\n" + waits + "\n")
    command = [sys.executable, "-m", "simclr_dist.launch.slurm.rescue", str(tmp_path / "run"), "75"]
    with subprocess.Popen(command, env={**os.environ, "SLURM_JOB_ID": "7"}, stderr=subprocess.PIPE, text=True) as rescuer:
        assert rescuer.stderr is not None
        while not asked.exists() and rescuer.poll() is None:
            time.sleep(0.02)
        rescuer.send_signal(signal.SIGTERM)
        answer.write_text(
            "JobId=7\n   JobState=PENDING Reason=None x\n   Requeue=1 Restarts=1 BatchFlag=1\n   RunTime=00:00:00 x\n"
        )
        assert rescuer.wait(30) == PREEMPTED
        assert "starts again: SLURM has requeued it" in rescuer.stderr.read()
