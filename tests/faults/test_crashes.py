"""A crash costs at most what was not saved: killed ranks, agents and parents, ranks that hang or go wrong, a second writer."""

import hashlib
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

import training_runs as runs
from faults import hooks
from faults.commands import Command, running, simclr_dist
from faults.seeded_kills import killed_again_and_again
from faults.straight import EVERY, STEPS
from simclr_dist.run.checkpoint import saved_steps
from simclr_dist.run.claim import Claim, claim_run, heartbeat, is_held
from simclr_dist.run.folder import newest_step
from simclr_dist.run.status import recorded, write_status
from simclr_dist.system.errors import DataError, StoppedError, TakenOverError
from training_runs import until

pytestmark = pytest.mark.slow


# Kills


def test_killed_at_random_the_run_ends_with_the_same_bits(shards: Path, straight: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=STEPS)
    result = killed_again_and_again(tmp_path, 2, kills=2, seed=1)
    assert result["kills"] == 2
    assert result["most_lost"] <= EVERY
    runs.assert_same_run(tmp_path / "run", straight, STEPS)


def test_the_command_goes_on_by_itself_and_leaves_nobody_behind(shards: Path, straight: Path, tmp_path: Path) -> None:
    """A rank is killed, then torchrun's agent, then the parent of them all."""
    runs.write_config(tmp_path, shards, steps=STEPS, data={"workers": 1})
    run = tmp_path / "run"

    def got_to(command: Command, generation: int, done: int) -> None:
        def there() -> bool:
            beat = heartbeat(run)
            assert command.process.poll() is None, command.output
            return beat.get("generation", 0) >= generation and beat["step"] >= done

        until(there, 240)

    with running(tmp_path, simclr_dist("train", "config.yaml", "--processes", "2")) as command:
        got_to(command, 1, EVERY + 2)
        os.kill(command.ranks()[1], signal.SIGKILL)
        got_to(command, 2, 2 * EVERY + 2)
        assert "simclr-dist: rank 1 on " in command.output, "and not only the lost connection that rank 0 speaks of"
        (agent,) = command.agents()
        os.kill(agent, signal.SIGKILL)
        got_to(command, 3, 3 * EVERY + 2)
        assert runs.status(run)["state"] == "running"
        assert len(command.alive()) >= 6, "launcher, agent, two ranks and their readers"
        command.process.kill()
        until(lambda: not command.alive(), 20)
        assert runs.status(run)["state"] == "running", "killed, and not come to the end"
        assert command.output.count("starting again from step") == 2
    assert [entry["fruitless"] for entry in runs.events(run, "restart")] == [0, 0]
    assert all(entry["steps_lost"] <= EVERY for entry in runs.events(run, "start"))
    runs.train(tmp_path, 2, "--data.workers", "1")
    assert runs.events(run, "start")[-1]["steps_lost"] <= EVERY
    runs.assert_same_run(run, straight, STEPS)


# Ranks that hang

TIMED_OUT = re.compile("Timed out waiting 3000ms|Application timeout")  # gloo's words, by where it was waiting


def test_a_rank_that_hangs_ends_the_others_in_time(shards: Path, tmp_path: Path) -> None:
    """Also: until the first step is done another time-out holds, which must be longer here than the late rank's pause."""
    timeout = 3.0
    runs.write_config(
        tmp_path, shards, steps=1000, checkpoint={"every": 1}, timeout_minutes=timeout / 60, first_step_timeout_minutes=1.0
    )
    with runs.started(tmp_path, 2, hook=partial(hooks.late_in_step, 1, timeout + 1, 1)) as ranks:
        ranks.until(lambda: runs.steps_done(tmp_path / "run") >= 2)
        ranks.signal(signal.SIGSTOP, 1)
        began = time.monotonic()
        until(lambda: ranks.wait(0)[0] is not None, 60)
        assert time.monotonic() - began < timeout + 20
        assert ranks.wait(0) == [1, None]
        assert TIMED_OUT.search(ranks.output), ranks.output
    status = runs.status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("crashed", 1)
    assert TIMED_OUT.search(status["reason"]), status
    assert is_held(tmp_path / "run") is False


def test_the_first_step_has_a_time_out_of_its_own(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, timeout_minutes=100.0, first_step_timeout_minutes=3.0 / 60)
    with runs.started(tmp_path, 2, hook=partial(hooks.late_in_step, 1, 60, 1)) as ranks:
        until(lambda: ranks.wait(0)[0] is not None, 60)
        assert ranks.wait(0) == [1, None]
        assert TIMED_OUT.search(ranks.output), ranks.output


# Ranks that go wrong


@pytest.mark.parametrize(("check_every", "found"), [(8, 8), (0, 10)], ids=["by the regular check", "before a checkpoint"])
def test_a_rank_with_other_numbers_ends_the_run_before_they_are_saved(
    shards: Path, tmp_path: Path, check_every: int, found: int
) -> None:
    runs.write_config(tmp_path, shards, steps=30, check_ranks_every=check_every, global_batch_size=24)
    with runs.started(tmp_path, 3, hook=partial(hooks.corrupted_after_step, 7, 2)) as ranks:
        assert ranks.wait() == [1, 1, 1], ranks.output
        assert f"RanksDifferError: step {found}: rank 2 holds other numbers in encoder.conv1.weight" in ranks.output
    assert saved_steps(tmp_path / "run/checkpoints") == [5]
    status = runs.status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("crashed", 1)
    assert "rank 2 holds other numbers in encoder.conv1.weight" in status["reason"]


# Two writers


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_start_is_refused_and_the_first_unharmed(shards: Path, straight: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    runs.write_config(first, shards, steps=STEPS)
    runs.write_config(second, shards, steps=STEPS, run_folder=str(first / "run"))
    with runs.started(first, 2) as ranks:
        ranks.until(lambda: runs.steps_done(first / "run") >= 3)
        ranks.hold()  # else it may be done before the others ask
        line = f"simclr-dist: run_folder: '{first}/run' is in use by process {ranks.pid(0)} on "
        began = time.monotonic()
        refused = subprocess.run(simclr_dist("train", str(second / "config.yaml")), capture_output=True, text=True, check=False)
        assert time.monotonic() - began < 15, "without torch"
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert refused.stderr.startswith(line)
        with runs.started(second, 2) as others:
            assert others.wait() == [2, 2]
            assert others.output.startswith(line)
            assert others.output.count("\n") == 1
        ranks.signal(signal.SIGCONT)
        assert ranks.wait() == [0, 0], ranks.output
    runs.assert_same_run(first / "run", straight, STEPS)
    assert len(runs.events(first / "run", "start")) == 1


def test_a_writer_that_was_cut_off_writes_nothing_more(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Its machine was lost for the scheduler, which started the job anew elsewhere; then it comes back."""
    run = tmp_path / "first/run"
    for name in ("first", "second"):
        runs.write_config(tmp_path / name, shards, steps=STEPS, run_folder=str(run))
    job = {"SLURM_JOB_ID": "7"}
    cut_off = partial(hooks.signalled_in_step, EVERY + 3, signal.SIGSTOP)
    with runs.started(tmp_path / "first", 2, environment=job, hook=cut_off) as first:
        first.until(lambda: runs.steps_done(run) == EVERY + 2)
        with runs.started(tmp_path / "second", 2, environment=job | {"SLURM_RESTART_COUNT": "1"}) as second:
            second.until(lambda: newest_step(run) >= 3 * EVERY)
            second.hold()
            before = contents(run)

            first.signal(signal.SIGCONT)
            codes = first.wait()
            assert codes[0] == 2, first.output
            assert None not in codes
            assert f"simclr-dist: run_folder: {str(run)!r} was taken over by process {second.pid(0)} on " in first.output, (
                first.output
            )
            assert first.output.count(", SLURM job 7, since ") == 1

            assert contents(run) == before
            second.signal(signal.SIGCONT)
            assert second.wait() == [0, 0], second.output
    assert runs.status(run)["state"] == "done"
    assert [entry["generation"] for entry in runs.events(run, "start")] == [1, 2]
    assert [entry["state"] for entry in runs.events(run, "stop")] == ["done"]
    runs.assert_same_run(run, straight, STEPS)


@pytest.mark.parametrize("error", [None, StoppedError("SIGTERM"), DataError("bad.tar"), RuntimeError("Connection closed")])
def test_however_it_ends_it_says_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Its other ranks may be gone, so that it ends by an error of its own before it saves."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = claim_run(tmp_path)
    first.beat(5)

    def left_behind() -> None:
        with recorded(tmp_path, first):
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            later.append(claim_run(tmp_path))
            later[0].beat(6)
            write_status(tmp_path, "running", None)
            before.update(contents(tmp_path))
            if error:
                raise error

    later: list[Claim] = []
    before: dict[str, str] = {}
    with pytest.raises(TakenOverError):
        left_behind()
    assert contents(tmp_path) == before
    with pytest.raises(TakenOverError):
        first.beat(7)
    assert contents(tmp_path) == before
    for claim in (first, *later):
        claim.release()
