"""A watcher beside a run that SLURM ends: it ends too, wherever the run was, and a stop in the meantime brings it back."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import training_runs
from slurm.cluster import LOGIN, Cluster
from slurm.training import LAUNCH, Run


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    """A run of one node, which would train for minutes."""
    made = Run(cluster, tmp_path, training_runs.make_shards(tmp_path), steps=1000)
    made.profile(nodes=1)
    cluster.environment["OMP_NUM_THREADS"] = "1"
    yield made
    cluster.cancel_all()


def test_a_scancel_ends_the_watcher_s_job_too(run: Run) -> None:
    """Nobody of ours hears of it but by SLURM. Before it the watcher was stopped while it waited, and came back."""
    cluster, options = run.cluster, ("--poll", "0.5", "--device", "cpu")
    run.submit()
    run.started(1)
    arguments = (str(LAUNCH / "eval.sbatch"), str(run.run), str(run.shards), str(run.shards), *options)
    watcher = int(cluster.login("sbatch", "--parsable", *arguments, cwd=run.folder).stdout)
    cluster.until(lambda: len(run.events("waiting")) == 1, "the watcher waits")
    cluster.login("scancel", "--signal=USR2", "--full", str(watcher))
    cluster.until(lambda: len(run.events("waiting")) == 2, "the watcher waits again")
    assert [entry["kind"] for entry in run.events("requeued")] == ["eval"], run.logs()
    cluster.login("scancel", str(run.job))
    assert cluster.wait(watcher, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", run.logs()
    assert {entry["job"] for entry in run.events("waiting")} == {str(watcher)}
    [end] = run.events("gave_up")
    assert (end["kind"], end["job"]) == ("train", str(run.job))
    assert end["why"].startswith(f"job {run.job}: CANCELLED")


def test_a_scancel_in_the_queue_ends_a_watcher(run: Run) -> None:
    """Of a run that somebody has resumed: its earlier end does not end the watcher, and its new job runs nothing."""
    cluster, log = run.cluster, run.folder / "watched"
    run.submit()
    run.started(1)
    run.command("submit", "cancel", str(run.run))
    cluster.wait(run.job, "CANCELLED")
    cluster.login("scontrol", "update", f"nodename={','.join(cluster.nodes)}", "state=drain", "reason=test")
    run.command("submit", "resume", str(run.run))
    job = run.events("submitted")[-1]["job"]
    shards = ("--train", str(run.shards), "--test", str(run.shards))
    command = (
        sys.executable,
        "-m",
        "simclr_dist",
        "eval",
        "--watch",
        str(run.run),
        *shards,
        "--device",
        "cpu",
        "--poll",
        "0.5",
    )
    with cluster.start(LOGIN, *command, cwd=run.folder, log=log) as watcher:
        try:
            cluster.until(lambda: "waiting" in log.read_text(), "the watcher waits")
            assert cluster.state(job) == "PENDING"
            cluster.login("scancel", job)
            assert watcher.wait(60) == 0, log.read_text()
        finally:
            watcher.kill()
    first, last = log.read_text().splitlines()
    assert first == f"{run.run}: submitted; waiting for its next encoder"
    assert last.startswith(f"{run.run}: preempted (given up: job {job}: CANCELLED")
    assert len(run.events("start")) == 1
