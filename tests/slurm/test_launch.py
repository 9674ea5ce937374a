"""What lies in launch/ for SLURM, as a user would run it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import training_runs
from simclr_dist.run.claim import heartbeat
from simclr_dist.run.status import read_ledger
from slurm.cluster import Cluster
from slurm.training import LAUNCH, STARTUP, Run, submit_array

STEPS = 15
OPTIONS = ("--nodes=2", "--exclusive", "--export=ALL,OMP_NUM_THREADS=1,GLOO_SOCKET_IFNAME=eth0")


@pytest.fixture
def folder(tmp_path: Path, cluster: Cluster) -> Path:
    """A config for a short run, and the package's commands on PATH."""
    shards = training_runs.make_shards(tmp_path)
    training_runs.write_config(tmp_path, shards, steps=STEPS)
    cluster.environment |= STARTUP
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return tmp_path


def sbatch(cluster: Cluster, folder: Path, *arguments: str) -> int:
    return int(cluster.login("sbatch", "--parsable", *arguments, cwd=folder).stdout)


def test_the_batch_scripts(cluster: Cluster, folder: Path) -> None:
    """Both jobs are stopped in the middle by a signal to all they consist of, and go on; the second waits for the first."""
    shards = str(folder / "shards")
    train = sbatch(cluster, folder, *OPTIONS, str(LAUNCH / "train.sbatch"), "config.yaml", "run", "--processes", "1")
    after = ("--dependency", f"afterok:{train}", "--kill-on-invalid-dep=yes")
    evaluate = sbatch(cluster, folder, *after, str(LAUNCH / "eval.sbatch"), "run", shards, shards)
    cluster.until(lambda: heartbeat(folder / "run").get("step", 0) > 3, "training runs", 90)
    cluster.login("scancel", "--signal=USR2", "--full", str(train))
    cluster.until(lambda: cluster.show(train).get("Restarts") == "1", "the training is requeued")
    assert cluster.wait(train, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "COMPLETED", said(folder)
    assert cluster.wait(evaluate, "RUNNING", "CANCELLED", seconds=60) == "RUNNING"
    time.sleep(0.5)
    cluster.login("scancel", "--signal=TERM", "--full", str(evaluate))
    cluster.until(lambda: cluster.show(evaluate).get("Restarts") == "1", "the evaluation is requeued")
    assert cluster.wait(evaluate, "COMPLETED", "FAILED", "CANCELLED", seconds=120) == "COMPLETED", said(folder)
    assert (folder / "run" / "eval" / f"step-{STEPS:08d}.json").exists()
    starts = [entry for entry in read_ledger(folder / "run") if entry["event"] == "start"]
    assert [start["steps_lost"] for start in starts] == [0, 0]


def test_of_an_array_the_preempted_task_alone_starts_again(cluster: Cluster, folder: Path) -> None:
    """That with the array's own number; the other trains on, and both lose nothing."""
    tasks, hit = submit_array(cluster, folder, "--processes", "1", "--steps", "40")
    node = cluster.show(tasks[hit])["NodeList"]
    cluster.login("sbatch", "-p", "urgent", f"--nodelist={node}", "--exclusive", "--wrap", "sleep 1", cwd=folder)
    for task in tasks:
        assert cluster.wait(task, "COMPLETED", "FAILED", "CANCELLED", seconds=240) == "COMPLETED", said(folder)
    assert [cluster.show(task)["Restarts"] for task in tasks] == [str(int(number == hit)) for number in (0, 1)]
    for number in (0, 1):
        ledger = read_ledger(folder / f"run-{number}")
        assert [entry["steps_lost"] for entry in ledger if entry["event"] == "start"] == [0] * (1 + (number == hit))
        requeued = [entry["job"] for entry in ledger if entry["event"] == "requeued"]
        assert requeued == [tasks[hit]] * (number == hit)


def test_a_wrong_config_ends_the_batch_script_with_2(cluster: Cluster, folder: Path) -> None:
    job = sbatch(cluster, folder, *OPTIONS, str(LAUNCH / "train.sbatch"), "config.yaml", "run", "--sead", "1")
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=60) == "FAILED"
    assert cluster.show(job)["ExitCode"] == "2:0"
    assert "sead" in said(folder)
    assert "did you mean" in said(folder)


def test_submitit_on_one_page(cluster: Cluster, folder: Path) -> None:
    command = [sys.executable, str(LAUNCH / "submit.py"), "config.yaml", "run", "--nodes", "2", "--gpus", "0", "--cpus", "2"]
    run = Run(cluster, folder, folder / "shards", steps=STEPS)
    printed = cluster.login(*command, env={"GLOO_SOCKET_IFNAME": "eth0"}, cwd=folder).stdout
    run.job = int(printed.split()[1].rstrip(":"))
    run.started(1)
    cluster.login("scontrol", "requeue", str(run.job))
    run.done()
    starts: list[dict[str, Any]] = run.events("start")
    assert [start["steps_lost"] for start in starts] == [0, 0]
    assert json.loads((run.run / "status.json").read_text())["state"] == "done"


def said(folder: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in folder.glob("slurm-*.out"))
