"""What lies in launch/ for SLURM, as a user would run it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import training_runs
from simclr_dist.launch.slurm.job import meeting_port
from simclr_dist.run.claim import heartbeat
from simclr_dist.run.status import read_ledger
from slurm.cluster import Cluster
from slurm.training import LAUNCH, STARTUP, Run, submit_array

STEPS = 15
OPTIONS = ("--nodes=2", "--exclusive", "--cpus-per-task=2", "--export=ALL,OMP_NUM_THREADS=1,GLOO_SOCKET_IFNAME=eth0")
# A cluster that binds a task to the cores it has asked for: to one of them, where it has asked for nothing.
pytestmark = pytest.mark.parametrize("cluster", [{"tasks": "affinity\nTaskPluginParam=autobind=cores"}], indirect=True)


@pytest.fixture
def folder(tmp_path: Path, cluster: Cluster) -> Path:
    """A config for a short run, and the program on PATH as pipx leaves it: a link, with no Python beside it."""
    shards = training_runs.make_shards(tmp_path)
    training_runs.write_config(tmp_path, shards, steps=STEPS)
    cluster.environment |= STARTUP
    home = Path(sys.executable).parent
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "simclr-dist").symlink_to(home / "simclr-dist")
    others = (place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != home)
    cluster.environment["PATH"] = os.pathsep.join([str(tmp_path / "bin"), *others])
    return tmp_path


def sbatch(cluster: Cluster, folder: Path, *arguments: str) -> int:
    return int(cluster.login("sbatch", "--parsable", *arguments, cwd=folder).stdout)


def test_the_batch_scripts(cluster: Cluster, folder: Path) -> None:
    """Both jobs are stopped in the middle by a signal to all they consist of, and go on; the second waits for the first."""
    shards = str(folder / "shards")
    train = sbatch(cluster, folder, *OPTIONS, str(LAUNCH / "train.sbatch"), "config.yaml", "run", "--processes", "1")
    after = ("--dependency", f"afterok:{train}", "--cpus-per-task=2")
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
    result = json.loads((folder / "run" / "eval" / f"step-{STEPS:08d}.json").read_text())
    assert result["hardware"]["cpus"] == json.loads((folder / "run" / "env.json").read_text())["cpus"] == 2, "all asked for"
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


def test_a_part_that_fails_takes_the_job_behind_it_along(cluster: Cluster, folder: Path) -> None:
    """Which would wait for ever: 'DependencyNeverSatisfied'."""
    script = ("--cpus-per-task=1", str(LAUNCH / "shard_array.sbatch"), "no-images", "out")
    parts = sbatch(cluster, folder, "--array=1-2", *script)
    last = sbatch(cluster, folder, "--dependency", f"afterok:{parts}", *script)
    assert cluster.wait(last, "CANCELLED", "COMPLETED", "FAILED", seconds=60) == "CANCELLED", said(folder)
    assert "no-images: no such folder of images" in said(folder)


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
    assert json.loads((run.run / "env.json").read_text())["cpus"] == 2, "those that it has asked for"


def test_a_rank_that_always_dies_is_given_up(cluster: Cluster, folder: Path) -> None:
    """Though the launcher gives up at the end of each start. The first start and three more, as documented."""
    cluster.environment["DIES_IN_STEP"] = "1"
    once = ("--processes", "1", "--max-restarts", "0")
    job = sbatch(cluster, folder, *OPTIONS, str(LAUNCH / "train.sbatch"), "config.yaml", "run", *once)
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=240) == "FAILED", said(folder)
    assert cluster.show(job)["Restarts"] == "3"
    ledger = read_ledger(folder / "run")
    assert [entry["event"] for entry in ledger].count("requeued") == 3
    given_up = [entry["why"] for entry in ledger if entry["event"] == "gave_up" and entry.get("job") == str(job)]
    assert len(given_up) == 1
    assert given_up[0].startswith("4 crashes in a row at step 0; the last: ")
    assert "4 crashes in a row" in said(folder)


@pytest.mark.parametrize(
    ("then", "taken", "end"),
    [("listen", 1, ("COMPLETED", "0")), ("fileno", 1, ("COMPLETED", "1")), ("fileno", 9, ("FAILED", "3"))],
    ids=["listened at", "held", "held at every start"],
)
def test_a_port_that_is_taken_does_not_end_the_run(
    cluster: Cluster, folder: Path, then: str, taken: int, end: tuple[str, str]
) -> None:
    """The script sees a program that listens there. Where one only holds it, the next start has another port; for so often."""
    held = ("--hold", "--nodes=1", "--nodelist=n1", *OPTIONS[1:])
    job = sbatch(cluster, folder, *held, str(LAUNCH / "train.sbatch"), "config.yaml", "run", "--processes", "2")
    ports = [meeting_port(job, restart) for restart in range(taken)]
    other = f"""
import socket, time
taken = [socket.socket() for port in {ports}]
for its, port in zip(taken, {ports}):
    its.bind(("", port))
    its.{then}()
open("ready", "w")
time.sleep(600)
"""
    cluster.start("n1", sys.executable, "-c", other, cwd=folder)
    cluster.until((folder / "ready").exists, "the port is taken")
    cluster.login("scontrol", "release", str(job))
    found = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=180), cluster.show(job)["Restarts"]
    log = (folder / f"slurm-{job}.out").read_text()
    assert found == end, log[-3000:]
    assert [f":{port}': the port is in use on this machine" in log for port in ports[:4]] == [end[1] != "0"] * min(taken, 4)
    assert ("4 crashes in a row at step 0" in log) == (end[0] == "FAILED")


def said(folder: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in folder.glob("slurm-*.out"))
