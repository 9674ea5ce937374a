"""The real trainer on a real SLURM: stopped, killed, cut off and cancelled; nothing is lost that need not be."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import training_runs
from simclr_dist.launch.slurm.job import meeting_port
from simclr_dist.run.status import read_status
from slurm.cluster import Cluster, why_not
from slurm.training import Run, alone

STEPS = 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for all runs of this file."""
    return training_runs.make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    """The last checkpoint of the run that nothing happens to."""
    if reason := why_not():
        pytest.skip(reason)
    return alone(tmp_path_factory.mktemp("alone"), shards, STEPS)


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, shards: Path) -> Iterator[Run]:
    """A run of two nodes, to be submitted."""
    made = Run(cluster, tmp_path, shards, steps=STEPS, checkpoint={"every": 10})
    yield made
    cluster.cancel_all()


def test_whatever_happens_to_it_the_run_ends_as_if_nothing_had(run: Run, undisturbed: dict[str, Any]) -> None:
    """Preempted, requeued by an administrator, stopped by a time limit's notice and by a signal to one rank, killed."""
    cluster = run.cluster
    run.submit("--eval", "--train", str(run.shards), "--test", str(run.shards))
    evaluation = int(json.loads((run.run / "submission.json").read_text())["eval_job_id"])

    run.started(1)
    since = time.time()
    cluster.login("sbatch", "-p", "urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", cwd=run.folder)
    run.pending(since)

    run.started(2)
    cluster.login("scontrol", "requeue", str(run.job))

    run.started(3)
    cluster.login("scancel", "--signal=USR2", str(run.job))

    run.started(4)
    os.kill(run.ranks()[-1], signal.SIGTERM)

    run.started(5)
    before_kill = run.step
    os.kill(run.ranks()[-1], signal.SIGKILL)

    run.done()
    stops, starts = run.events("stop"), run.events("start")
    assert [stop["state"] for stop in stops] == ["preempted"] * 4 + ["crashed", "done"], run.logs()
    assert [stop["why"] for stop in stops[:4]] == ["SIGTERM", "SIGTERM", "SIGUSR2", "SIGTERM"]
    assert [start["steps_lost"] for start in starts[:5]] == [0, 0, 0, 0, 0]
    assert starts[5]["steps_lost"] <= 10
    assert starts[5]["step"] >= before_kill - 10
    run.assert_equal(undisturbed, STEPS)
    # The evaluation waited through all of it.
    assert cluster.wait(evaluation, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "COMPLETED", run.logs()
    assert (run.run / "eval" / f"step-{STEPS:08d}.json").exists()


def test_cancelled_is_cancelled_and_can_be_resumed_on_fewer_nodes(run: Run) -> None:
    """A stop signal must not bring a cancelled job back; the run goes on when told so, with the same global batch."""
    cluster = run.cluster
    run.submit("--eval", "--train", str(run.shards), "--test", str(run.shards))
    evaluation = int(json.loads((run.run / "submission.json").read_text())["eval_job_id"])
    run.started(1)
    taken = [cluster.show(job)["OverSubscribe"] for job in (run.job, evaluation)]
    assert taken == ["NO", "OK"], "the training has its machines for itself, the evaluation a share of one"
    assert f"SLURM job {run.job}" in run.command("submit", "resume", str(run.run), check=False), "one at a time"
    run.command("submit", "cancel", str(run.run))
    assert cluster.wait(run.job, "CANCELLED", "PENDING", "COMPLETED", seconds=60) == "CANCELLED"
    assert cluster.wait(evaluation, "CANCELLED", seconds=60) == "CANCELLED"
    assert run.events("cancelled")
    stopped = read_status(run.run)
    assert stopped["state"] == "preempted", "it saved all the same"

    run.profile(nodes=1)
    run.command("submit", "resume", str(run.run), "--profile", "profile.yaml")
    run.job = int(json.loads((run.run / "submission.json").read_text())["job_id"])
    run.started(2)
    assert [start["world_size"] for start in run.events("start")] == [2, 1]
    assert run.events("start")[1]["steps_lost"] == 0
    negatives = {line["loss/negatives_an_anchor"] for line in training_runs.metrics(run.run)}
    assert negatives == {2 * (24 - 1)}
    cluster.login("scancel", str(run.job))  # not by our command: SLURM's own must do as well
    assert cluster.wait(run.job, "CANCELLED", "PENDING", "COMPLETED", seconds=60) == "CANCELLED"


@pytest.mark.parametrize("cluster", [{"kill_wait": 30}], indirect=True)
def test_a_scontrol_that_answers_late_revives_nothing_that_was_cancelled(run: Run) -> None:
    """And a run that was stopped still goes on."""
    cluster, late = run.cluster, run.folder / "late"
    late.mkdir()
    (late / "scontrol").write_text(f'#!/bin/sh\nsleep 3\nexec {shutil.which("scontrol")} "$@"\n')
    (late / "scontrol").chmod(0o755)
    path = cluster.environment["PATH"]
    cluster.environment["PATH"] = f"{late}:{path}"
    run.submit()
    cluster.environment["PATH"] = path
    run.started(1)
    cluster.login("scancel", "--signal=USR2", str(run.job))
    run.started(2)
    cluster.login("scancel", str(run.job))
    assert cluster.wait(run.job, "CANCELLED", "PENDING", "COMPLETED", seconds=60) == "CANCELLED", run.logs()
    assert cluster.show(run.job)["Restarts"] == "1"
    assert [start["steps_lost"] for start in run.events("start")] == [0, 0]


def test_the_port_of_a_job_that_is_taken_is_another_one_in_the_next_start(run: Run) -> None:
    first = meeting_port(1, 0)
    lines = f"import socket, time; s = socket.create_server(('', {first})); open('ready', 'w'); time.sleep(600)"
    run.cluster.start("n1", sys.executable, "-c", lines, cwd=run.folder)
    run.cluster.until((run.folder / "ready").exists, "the port is taken")
    assert run.submit() == 1
    run.started(1)
    assert run.cluster.show(run.job)["Restarts"] == "1"
    assert f"simclr-dist: MASTER_PORT: {first}: is in use on this machine" in run.logs()
    assert "Traceback" not in run.logs()


def test_a_node_that_loses_power(run: Run, undisturbed: dict[str, Any]) -> None:
    """The one that hosts rank 0, the store and the batch script: nobody is left to ask for a requeue but SLURM itself."""
    run.submit()
    run.started(1)
    run.reach(15)
    run.cluster.kill_node("n1")
    time.sleep(1)
    run.cluster.boot_node("n1")
    run.started(2, seconds=180)
    assert run.events("start")[1]["steps_lost"] <= 10, run.logs()
    run.done()
    run.assert_equal(undisturbed, STEPS)
    assert not run.events("gave_up")


def test_failed_for_good_takes_the_evaluation_along(run: Run) -> None:
    """A run that diverges is not started again, and says why."""
    training_runs.write_config(
        run.folder,
        run.shards,
        run_folder=str(run.run),
        steps=STEPS,
        max_skipped_steps=2,
        optim={"name": "sgd", "base_lr": 1e30, "warmup_steps": 0},
    )
    run.submit("--eval", "--train", str(run.shards), "--test", str(run.shards))
    evaluation = int(json.loads((run.run / "submission.json").read_text())["eval_job_id"])
    assert run.cluster.wait(run.job, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "FAILED", run.logs()
    assert run.cluster.show(run.job)["ExitCode"] == "3:0"
    assert run.cluster.wait(evaluation, "CANCELLED", "RUNNING", "COMPLETED", seconds=30) == "CANCELLED"
    assert len(run.events("start")) == 1
    said = run.command("submit", "status", str(run.run))
    assert "not finite" in said
    assert "DependencyNeverSatisfied" in said


def test_a_controller_that_restarts_and_accounting_that_hangs(run: Run, tmp_path: Path) -> None:
    """The job does not notice; the status is right within 5 s, also while nobody answers."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sacct").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "bin" / "sacct").chmod(0o755)
    run.cluster.environment["PATH"] = f"{tmp_path / 'bin'}:{run.cluster.environment.get('PATH', os.environ['PATH'])}"
    run.submit()
    run.started(1)
    run.cluster.stop_controller()
    began = time.monotonic()
    said = run.command("submit", "status", str(run.run))
    assert time.monotonic() - began < 30
    assert "running" in said
    step = run.step
    run.cluster.start_controller()
    run.reach(step + 5)
    assert "RUNNING" in run.command("submit", "status", str(run.run))
    assert len(run.events("start")) == 1
