"""Does the test cluster do what the fault tests rely on?"""

import contextlib
import signal
import time
from pathlib import Path

import pytest

from slurm.cluster import Cluster

# A task that says what it gets, and goes on.
LISTENER = r"""
import os, signal, sys, time
def say(text):
    print(os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", 0), text, flush=True)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: say(signal.Signals(number).name))
say("starts")
time.sleep(300)
"""


def listener(folder: Path) -> str:
    (folder / "listener.py").write_text(LISTENER)
    return f"srun --output={folder}/said python3 {folder}/listener.py"


def said(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().splitlines() if path.exists() else []


def test_tasks_run_on_both_nodes_under_their_own_names(cluster: Cluster, tmp_path: Path) -> None:
    script = "srun sh -c 'echo $(hostname) $(getent hosts $(hostname)) $GLOO_SOCKET_IFNAME'"
    job = cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/out", cwd=tmp_path)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["n1 10.77.0.12 n1 eth0"] * 2 + ["n2 10.77.0.13 n2 eth0"] * 2
    assert cluster.login("sacct", check=False).returncode == 1


@pytest.mark.parametrize("cluster", [{"slurmd_timeout": 5, "kill_wait": 2}], indirect=True)
def test_a_lost_node_requeues_its_job(tmp_path: Path, cluster: Cluster) -> None:
    job = cluster.sbatch(listener(tmp_path), "--nodes=1", cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    node = cluster.show(job)["NodeList"]
    cluster.until(lambda: said(tmp_path) == ["0 0 starts"], "the task runs")
    cluster.kill_node(node)
    cluster.until(lambda: cluster.show(job).get("Restarts") == "1" and cluster.state(job) == "RUNNING", "it runs elsewhere")
    assert cluster.show(job)["NodeList"] != node
    cluster.boot_node(node)
    cluster.login("scancel", str(job))
    cluster.wait(job, "CANCELLED")
    cluster.wait_for_nodes()


@pytest.mark.parametrize("cluster", [{"grace": 3, "kill_wait": 2}], indirect=True)
def test_preemption_warns_with_sigterm_and_requeues_after_the_grace(tmp_path: Path, cluster: Cluster) -> None:
    job = cluster.sbatch(listener(tmp_path), "--nodes=2", "--ntasks-per-node=1", "--exclusive", cwd=tmp_path)
    cluster.until(lambda: len(said(tmp_path)) == 2, "both tasks run")
    other = tmp_path / "other"
    other.mkdir()
    urgent = cluster.sbatch("sleep 1", "--nodes=2", "--exclusive", "--partition=urgent", cwd=other)
    cluster.until(lambda: {"0 0 SIGTERM", "1 0 SIGTERM"} <= set(said(tmp_path)), "both are warned")
    cluster.wait(urgent, "COMPLETED")
    cluster.until(lambda: "0 1 starts" in said(tmp_path), "the job starts again")
    assert cluster.show(job)["Restarts"] == "1"


def test_a_cut_link_is_silent_and_heals(cluster: Cluster) -> None:
    cluster.cut("n2")
    asked = ["timeout", "1", "bash", "-c", "echo > /dev/tcp/n2/6818"]
    assert cluster.login(*asked, check=False).returncode == 124
    cluster.heal("n2")
    cluster.until(lambda: cluster.login(*asked, check=False).returncode == 0, "n2 answers")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_outlives_its_controller(tmp_path: Path, cluster: Cluster, how: signal.Signals) -> None:
    job = cluster.sbatch("sleep 3", "--nodes=2", cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    if how == signal.SIGKILL:
        time.sleep(6)  # its state is on disk every 5 s
    cluster.stop_controller(how)
    assert cluster.login("squeue", "--noheader", check=False).returncode != 0
    cluster.start_controller()
    assert cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", seconds=30) == "COMPLETED"


def test_a_stand_in_can_take_the_place_of_sacct(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sacct").write_text("#!/bin/sh\necho stand-in\n")
    (tmp_path / "sacct").chmod(0o755)
    first = f"{tmp_path}:{cluster.environment['PATH']}"
    assert cluster.login("sacct", env={"PATH": first}).stdout == "stand-in\n"
    assert "disabled" in cluster.login("sacct", check=False).stderr
    cluster.environment["PATH"] = first
    assert cluster.login("sacct").stdout == "stand-in\n"


def held(cluster: Cluster) -> set[str]:
    """The namespaces of a cluster."""
    pids = [cluster.network.pids(name)[0] for name in ("switch", "login", *cluster.nodes)]
    return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for pid in pids for kind in ("net", "mnt", "pid", "uts")}


def left(names: set[str], folder: Path) -> list[str]:
    """Whatever on this machine still has to do with a cluster that has ended."""
    found = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            its = {str((process / "ns" / kind).readlink()) for kind in ("net", "mnt", "pid", "uts")}
            if its & names or str(folder) in (process / "cmdline").read_text():
                found.append((process / "cmdline").read_text())
    return found + [str(folder)] * folder.exists()


def test_two_clusters_live_side_by_side_and_leave_nothing(tmp_path: Path, cluster: Cluster) -> None:
    with Cluster(nodes=1) as other:
        job = other.sbatch("setsid sleep 100 & trap '' TERM; sleep 100", cwd=tmp_path)
        other.wait(job, "RUNNING")
        assert cluster.state(job) == ""
        names, folder = held(other), other.folder
        assert not names & held(cluster)
        assert len(left(names, folder)) > 5
    assert left(names, folder) == []


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, error: type[BaseException]) -> None:
    found: list[tuple[set[str], Path]] = []

    def fail(starting: Cluster) -> None:
        found.append((held(starting), starting.folder))
        raise error("as it should")

    monkeypatch.setattr(Cluster, "wait_for_nodes", fail)
    with pytest.raises(error, match="as it should"), Cluster():
        pass
    assert len(found[0][0]) == 16
    assert left(*found[0]) == []
