"""An end that SLURM alone knows: whoever looks at the run writes it down, once, and never that of a run that goes on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_dist.launch.slurm.status import note_end
from simclr_dist.run.claim import claim_run
from simclr_dist.run.status import End, outlook, read_ledger, read_status, record_end, record_event, record_start, write_status
from stand_ins import Command, StandIns

EVAL = ("--eval", "--train", "shards", "--test", "shards")
OVER = {
    "CANCELLED|None||0:00": "given up: job 100: CANCELLED 0:00, says squeue",  # in the queue, by plain scancel
    "TIMEOUT|TimeLimit|n1|1:00": "given up: job 100: TIMEOUT (TimeLimit) on n1 1:00, says squeue",
    "FAILED|NonZeroExitCode|n1|0:02": "given up: job 100: FAILED (NonZeroExitCode) on n1 0:02, says squeue",
    "": "given up: job 100: GONE (no longer known)",
}


def submitted(command: Command, *more: str) -> None:
    assert command("config.yaml", "--profile", "profile.yaml", *more)[0] == 0


def gave_up(run: Path) -> list[dict[str, object]]:
    return [entry for entry in read_ledger(run) if entry["event"] == "gave_up"]


def watcher(here: Path, command: Command) -> None:
    note_end(here / "run")


def status(here: Path, command: Command) -> None:
    assert "gave_up kind=train job=100" in command("status", "run")[1]


def cancel(here: Path, command: Command) -> None:
    assert "job 100 has ended already: " in command("cancel", "run")[1]


@pytest.mark.parametrize("look", [watcher, status, cancel])
@pytest.mark.parametrize("said", OVER)
def test_whoever_looks_writes_it_down(
    here: Path, slurm: StandIns, command: Command, said: str, look: Callable[[Path, Command], None]
) -> None:
    submitted(command, *EVAL)
    run = here / "run"
    assert outlook(run).job == "100", "the evaluation's was submitted later"
    slurm.state(100, said) if said else slurm.forget(100)
    slurm.state(101, "CANCELLED|None||0:00")
    look(here, command)
    assert (outlook(run).over, outlook(run).reason) == (True, OVER[said])
    look(here, command)
    assert len(gave_up(run)) == 1


@pytest.mark.parametrize("said", ["PENDING|Priority||0:00", "RUNNING|None|n1|0:07", "COMPLETING|None|n1|0:09", "no answer"])
def test_what_goes_on_is_left_alone(here: Path, slurm: StandIns, command: Command, said: str) -> None:
    submitted(command)
    slurm.state(100, said)
    note_end(here / "run")
    assert not gave_up(here / "run")


def test_ranks_that_were_killed_with_their_job(here: Path, slurm: StandIns, command: Command) -> None:
    """While one of them lives, SLURM's word does not count: it may be another cluster's job of that number."""
    submitted(command)
    run = here / "run"
    claim = claim_run(run)
    write_status(run, "running", None)
    record_event(run, "start", generation=1, job="100", step=0)
    slurm.state(100, "CANCELLED|None|n1|0:09")
    note_end(run)
    assert not gave_up(run)
    claim.release()
    note_end(run)
    assert outlook(run).reason == "given up: job 100: CANCELLED on n1 0:09, says squeue"
    assert read_status(run)["state"] == "crashed", "it had no time to say how it ended"


def test_a_batch_script_of_one_s_own(here: Path, slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start names the job; a run that is over, or was typed, has none."""
    slurm.state(7, "CANCELLED|None|n1|0:09")
    run = here / "run"
    (run / "starts").mkdir(parents=True)
    for job in (None, "7"):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        claim = claim_run(run)
        record_start(claim, 0, 1)
        record_end(run, claim.generation, End("preempted", 75))
        claim.release()
        note_end(run)
        assert len(gave_up(run)) == (job is not None)


def test_a_run_that_was_submitted_again_meanwhile(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    ledger = here / "run/ledger.jsonl"
    line = '{{"time": 1, "event": "submitted", "kind": "train", "job": "102"}}'
    slurm.write("squeue", f"#!/bin/sh\necho '{line}' >> \"{ledger}\"\necho 'CANCELLED|None|n1|0:09'\n")
    note_end(here / "run")
    assert outlook(here / "run").job == "102"


@pytest.mark.parametrize("job", ["--user=me", "100 101", "../100", ""])
def test_a_foreign_ledger_s_job_is_a_number(here: Path, slurm: StandIns, command: Command, job: str) -> None:
    submitted(command)
    slurm.write("squeue", "#!/bin/sh\necho asked > {folder}/asked\n")
    record_event(here / "run", "submitted", kind="train", job=job)
    note_end(here / "run")
    assert not (slurm.folder / "asked").exists()


def test_a_machine_without_slurm_asks_nobody(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    for program in slurm.bin.iterdir():
        program.unlink()
    note_end(here / "run")
    assert not outlook(here / "run").over


def test_cancelling_the_evaluation_alone_says_nothing_of_the_training(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    run = here / "run"
    claim = claim_run(run)
    record_start(claim, 0, 1)
    record_end(run, claim.generation, End("done", 0))
    claim.release()
    slurm.state(100, "COMPLETED|None|n1|0:09")
    assert command("cancel", "run")[0] == 0
    assert read_ledger(run)[-1]["kind"] == "eval"
    assert outlook(run).state == "done"
    assert outlook(run).reason is None
    assert not gave_up(run)


def test_a_training_that_is_over_beside_an_evaluation_that_is_not(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    slurm.state(100, "CANCELLED|None||0:00")
    assert command("cancel", "run")[1].splitlines()[1].startswith("cancelled: job 101; ")
    assert outlook(here / "run").reason == "given up: job 100: CANCELLED 0:00, says squeue"


def test_a_folder_of_starts_that_cannot_be_read(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    slurm.state(100, "CANCELLED|None||0:00")
    (here / "run/starts/00000001.json").mkdir(parents=True)
    assert command("status", "run")[0] == 0
    assert not gave_up(here / "run")


def test_another_user_s_run_is_only_looked_at(
    here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(command)
    slurm.state(100, "CANCELLED|None||0:00")
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path).name != "ledger.jsonl")
    code, _, err = command("status", "run")
    assert (code, err) == (0, "")
    assert not gave_up(here / "run")


@pytest.mark.parametrize(("noted", "here_is"), [("main", "other"), ("main", None), (None, "main"), (None, None)])
@pytest.mark.parametrize("said", ["COMPLETED|None|n1|0:09", ""])
def test_another_cluster_s_word_does_not_count(
    here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch,
    said: str, noted: str | None, here_is: str | None,
) -> None:  # fmt: skip
    """With the same disk, another job of that number, or none; where neither is known the job may be in another's queue."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", noted or "")
    submitted(command)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", here_is or "")
    slurm.state(100, said) if said else slurm.forget(100)
    note_end(here / "run")
    assert not gave_up(here / "run")


def test_a_copy_of_a_run_is_told_nothing(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    shutil.copytree(here / "run", here / "copy", symlinks=True)
    slurm.state(100, "CANCELLED|None||0:00")
    assert command("status", "copy")[0] == 0
    assert not gave_up(here / "copy")


def test_a_run_that_is_submitted_between_look_and_word(
    here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(command)
    slurm.state(100, "CANCELLED|None||0:00")
    monkeypatch.setattr(
        "simclr_dist.launch.slurm.status.note_death",
        lambda run: record_event(run, "submitted", kind="train", job="102", cluster="main"),
    )
    note_end(here / "run")
    assert outlook(here / "run").job == "102"
    assert not gave_up(here / "run")


def test_a_damaged_run_takes_nothing_of_slurms_word(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    slurm.state(100, "PENDING|Priority||0:00")
    (here / "run" / "slurm" / "config.yaml").write_text("{")
    code, out, err = command("status", "run")
    assert (code, err) == (0, "")
    assert "  job         100: PENDING (Priority) 0:00, says squeue\n" in out
    assert "  damaged     " in out
    assert "slurm/config.yaml: " in out.splitlines()[-1]
