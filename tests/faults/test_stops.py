"""A stop loses nothing: whatever the signal, whoever gets it, and whenever."""

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import training_runs as runs
from faults import hooks
from faults.commands import running, simclr_dist, wait_for_ranks
from faults.straight import STEPS
from simclr_dist.run.checkpoint import load_newest, saved_steps
from simclr_dist.system.errors import PREEMPTED
from training_runs import until

pytestmark = pytest.mark.slow


NEVER = {"every": 1000}  # only the stop itself saves


def assert_stopped(run: Path, reason: str) -> int:
    """The run has been stopped for `reason`, and all that it did is saved; returns its step."""
    state = load_newest(run / "checkpoints", report=pytest.fail)
    done = state["step"] if state else 0
    status, stop = runs.status(run), runs.events(run, "stop")[-1]
    assert (status["state"], status["exit_code"], status["reason"]) == ("preempted", PREEMPTED, reason)
    assert (stop["state"], stop["exit_code"], stop["why"], stop["step"]) == ("preempted", PREEMPTED, reason, done)
    assert runs.last_step(run) == runs.steps_done(run) == done, "a step was made that is not saved"
    assert not list(run.rglob("*.tmp"))
    return int(done)


def assert_goes_on(run: Path, done: int) -> None:
    """The last start went on where the one before had stopped."""
    start = runs.events(run, "start")[-1]
    assert (start["step"], start["steps_lost"]) == (done, 0)


NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def test_any_signal_to_all_ranks_or_to_one(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Nine stops of one run, which ends as if there had been none."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint=NEVER)
    run, done = tmp_path / "run", 0
    for number in NUMBERS:
        for rank in (None, 0, 1):
            with runs.started(tmp_path, 2) as ranks:
                ranks.until(lambda: runs.steps_done(run) >= done + 2)  # noqa: B023
                ranks.signal(number, rank)
                assert ranks.wait() == [PREEMPTED] * 2, ranks.output
                assert f"simclr-dist: stopped by {number.name}: everything is saved" in ranks.output
                assert ranks.output.count("stopped by") == 1
            if done:
                assert_goes_on(run, done)
            before, done = done, assert_stopped(run, number.name)
            assert before < done < STEPS
    runs.train(tmp_path, 2)
    assert_goes_on(run, done)
    runs.assert_same_run(run, straight, STEPS)


@pytest.mark.parametrize("rank", [None, 1])
def test_before_the_first_step(shards: Path, tmp_path: Path, rank: int | None) -> None:
    runs.write_config(tmp_path, shards)
    with runs.started(tmp_path, 2) as ranks:
        ranks.until(lambda: any((tmp_path / "run/starts").glob("*")))
        ranks.signal(signal.SIGTERM, rank)
        assert ranks.wait() == [PREEMPTED] * 2, ranks.output
    assert assert_stopped(tmp_path / "run", "SIGTERM before the first step") == 0


@pytest.mark.parametrize(("rank", "world_size"), [(None, 2), (1, 2), (0, 1)])
def test_while_images_are_decoded_into_memory(shards: Path, tmp_path: Path, rank: int | None, world_size: int) -> None:
    """Long before they are all there, and all ranks alike."""
    runs.write_config(tmp_path, shards, data={"in_memory": "always"})
    hook = partial(hooks.signalled_while_decoding, 30, signal.SIGUSR1, rank)
    with runs.started(tmp_path, world_size, hook=hook) as ranks:
        assert ranks.wait() == [PREEMPTED] * world_size, ranks.output
        assert "Traceback" not in ranks.output
    assert assert_stopped(tmp_path / "run", "SIGUSR1 before the first step") == 0
    start, stop = (runs.events(tmp_path / "run", kind)[-1]["time"] for kind in ("start", "stop"))
    assert stop - start < 5, "some 8 s for all images"
    assert not list((tmp_path / "run").glob("metrics*")), "nothing was trained"


def test_during_a_save(shards: Path, straight: Path, tmp_path: Path) -> None:
    """To the rank that writes, and to one that goes on meanwhile."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint=NEVER)
    run = tmp_path / "run"
    for rank in (0, 1):
        with runs.started(tmp_path, 2, "--checkpoint.every", "1") as ranks:
            ranks.until(lambda: any((run / "checkpoints").glob(".step-*")))
            ranks.signal(signal.SIGUSR1, rank)
            assert ranks.wait() == [PREEMPTED] * 2, ranks.output
        done = assert_stopped(run, "SIGUSR1")
        assert 0 < done < STEPS
        assert saved_steps(run / "checkpoints") == list(range(max(1, done - 2), done + 1))
    runs.train(tmp_path, 2)
    assert_goes_on(run, done)
    runs.assert_same_run(run, straight, STEPS)


def test_signals_without_end_to_everybody(shards: Path, straight: Path, tmp_path: Path) -> None:
    """A scheduler signals all processes of a job, those that read images too, and more than once."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint=NEVER)
    run = tmp_path / "run"
    with runs.started(tmp_path, 2, "--data.workers", "2") as ranks:
        ranks.until(lambda: runs.steps_done(run) >= 2)
        assert len(ranks.children(0)) == 2
        sent = 0
        while None in ranks.wait(0) and sent < 3000:
            ranks.signal(signal.SIGTERM)
            sent += 1
            time.sleep(0.02)
        assert ranks.wait() == [PREEMPTED] * 2, ranks.output
        assert sent > 1
        assert "Traceback" not in ranks.output
    done = assert_stopped(run, "SIGTERM")
    runs.train(tmp_path, 2)
    assert_goes_on(run, done)
    runs.assert_same_run(run, straight, STEPS)


@pytest.mark.parametrize(
    "hook",
    [
        partial(hooks.signalled_in_step, 5, signal.SIGTERM),
        partial(hooks.signalled_in_step, 6, signal.SIGTERM, 1),
        partial(hooks.signalled_during_export, signal.SIGUSR2),
    ],
    ids=["the step before the last", "the last step, one rank", "export"],
)
def test_at_the_end_being_done_wins(shards: Path, tmp_path: Path, hook: Callable[[], None]) -> None:
    """The word of the last step but one is read in the last one."""
    runs.write_config(tmp_path, shards, steps=6)
    with runs.started(tmp_path, 2, hook=hook) as ranks:
        assert ranks.wait() == [0, 0], ranks.output
        assert "done: 6 steps" in ranks.output
    assert runs.status(tmp_path / "run")["state"] == "done"
    assert (tmp_path / "run/encoders/step-00000006.safetensors").exists()


def test_a_step_before_that_it_is_a_stop(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=6)
    with runs.started(tmp_path, 2, hook=partial(hooks.signalled_in_step, 4, signal.SIGTERM, 1)) as ranks:
        assert ranks.wait() == [PREEMPTED] * 2, ranks.output
    assert assert_stopped(tmp_path / "run", "SIGTERM") == 5


def test_a_run_goes_on_with_another_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """The global batch stays, and with it the negatives."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint=NEVER)
    run, done = tmp_path / "run", 0
    for world_size in (2, 1, 3):
        with runs.started(tmp_path, world_size) as ranks:
            ranks.until(lambda: runs.steps_done(run) >= done + 2)  # noqa: B023
            ranks.signal(signal.SIGTERM, world_size - 1)
            assert ranks.wait() == [PREEMPTED] * world_size, ranks.output
        if done:
            assert_goes_on(run, done)
        done = assert_stopped(run, "SIGTERM")
    runs.train(tmp_path, 2)
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["loss/negatives_an_anchor"] for line in lines} == {46}
    assert [entry["world_size"] for entry in runs.events(run, "start")] == [2, 1, 3, 2]


# Real commands, from their first moment


def test_a_bare_process_that_is_still_importing(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards)
    with running(tmp_path, [sys.executable, "-m", "simclr_dist.train", "config.yaml"]) as command:
        until(lambda: runs.listens(command.process.pid))
        assert "torch" not in Path(f"/proc/{command.process.pid}/maps").read_text()
        command.process.terminate()
        assert command.wait() == PREEMPTED, command.output
        assert command.output.startswith("simclr-dist: stopped by SIGTERM before the first step")
        assert command.output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_is_stopped_while_it_imports_and_by_ctrl_c(shards: Path, straight: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher alone, before torchrun has started a rank; then Ctrl-C in mid-run."""
    runs.write_config(tmp_path, shards, steps=STEPS, checkpoint=NEVER)
    run, train = tmp_path / "run", simclr_dist("train", "config.yaml", "--processes", "2")
    with running(tmp_path, train) as command:
        until(lambda: runs.listens(command.process.pid))
        assert not command.ranks()
        command.process.terminate()
        assert command.wait() == PREEMPTED, command.output
        until(lambda: not command.alive(), 20)
    assert not run.exists() or assert_stopped(run, "SIGTERM before the first step") == 0

    with running(tmp_path, train) as command:
        assert sorted(wait_for_ranks(command, 2)) == [0, 1], command.output
        until(lambda: runs.steps_done(run) >= 3 or command.process.poll() is not None)
        command.interrupt()
        assert command.wait() == PREEMPTED, command.output
        assert "Traceback" not in command.output
        until(lambda: not command.alive(), 20)
    done = assert_stopped(run, "SIGINT")
    runs.train(tmp_path, 2)
    assert_goes_on(run, done)
    runs.assert_same_run(run, straight, STEPS)
