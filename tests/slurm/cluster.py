"""A real SLURM on this machine: a login node with the controller, and nodes of two CPUs, each a namespace of its own."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from network import namespaces
from network.namespaces import Network, NodeProcess

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_OF_ANOTHER_SLURM = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_")
LOGIN = "login"

# Without accounting, as on many a small cluster: sacct answers with an error. No cgroups: a node is not a machine.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={cred_expire}
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{tasks}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=900
MessageTimeout=5
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout}
BatchStartTimeout=10
InactiveLimit=0
UnkillableStepTimeout=30
PropagateResourceLimits=NONE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pids/slurmctld
SlurmdPidFile={folder}/pids/slurmd-%n
SlurmctldLogFile={folder}/logs/slurmctld
SlurmdLogFile={folder}/logs/slurmd-%n
SlurmctldDebug=verbose
SlurmdDebug=verbose
NodeName={nodes} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no cluster here, in a line; empty where there can be one."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else namespaces.why_not()


class Cluster:
    """SLURM on nodes n1, n2, ... and on `login`; a context manager that leaves nothing, also when its start fails.

    Partition `main` (the default) is preempted by jobs of partition `urgent`: SIGTERM, `grace` seconds, SIGKILL, requeue.
    `kill_wait`: seconds from SIGTERM to SIGKILL at a cancel, a requeue and a time limit.
    `slurmd_timeout`: seconds until a silent node counts as lost.
    `tasks`: the plugin that rules a task's CPUs: "affinity" binds it to those it has asked for, "none" lets it use all.
    `cred_expire`: seconds that a requeued job waits; 120 on a usual cluster, which SLURM also takes for anything below 5.

    `environment` is what every command here has: this process's variables but those of another SLURM, this Python first on
    PATH, and gloo on the nodes' network. A test may change it, for instance to put a stand-in for sacct first.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        grace: int = 20,
        kill_wait: int = 5,
        slurmd_timeout: int = 10,
        cred_expire: int = 5,
        tasks: str = "none",
    ) -> None:
        self.nodes = tuple(f"n{1 + k}" for k in range(nodes))
        self.network = Network((LOGIN, *self.nodes))
        self._settings = {
            "grace": grace,
            "kill_wait": kill_wait,
            "slurmd_timeout": slurmd_timeout,
            "cred_expire": cred_expire,
            "tasks": tasks,
            "nodes": ",".join(self.nodes),
        }

    def __enter__(self) -> Self:
        with ExitStack() as started:
            self.folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
            self.environment = {key: value for key, value in os.environ.items() if not key.startswith(_OF_ANOTHER_SLURM)}
            self.environment |= {
                "SLURM_CONF": f"{self.folder}/slurm.conf",
                "GLOO_SOCKET_IFNAME": "eth0",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            started.enter_context(self.network)
            self._start()
            self._started = started.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._started.close()

    def start(
        self,
        node: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> NodeProcess:
        """Start a command on a node; `env` adds to its environment."""
        return self.network.run(node, *command, env=self.environment | dict(env or {}), cwd=cwd, log=log)

    def run(
        self,
        node: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """A command on a node from start to end (seconds: `timeout`); with `check` it must exit with 0."""
        variables = self.environment | dict(env or {})
        return self.network.call(node, *command, env=variables, cwd=cwd, timeout=timeout, check=check)

    def login(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return self.run(LOGIN, *command, env=env, cwd=cwd, timeout=timeout, check=check)

    def sbatch(self, script: str, *options: str, cwd: Path) -> int:
        """Submit the lines of a batch script, whose outputs go to `cwd`; returns the job's id."""
        path = cwd / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return int(self.login("sbatch", "--parsable", *options, path, cwd=cwd).stdout)

    def show(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`; empty for a job that the controller does not know."""
        shown = self.login("scontrol", "show", "job", "--oneliner", str(job), check=False).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, job: int | str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ...; "" for a job that the controller does not know."""
        return self.show(job).get("JobState", "")

    def wait(self, job: int | str, *states: str, seconds: float = 60.0) -> str:
        """Until a job is in one of these states; returns it."""
        self.until(lambda: self.state(job) in states, f"job {job} is {' or '.join(states)}", seconds)
        return self.state(job)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Poll; when it takes too long, say what was waited for, and what the queue and the controller said last."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.folder / "logs/slurmctld"
                said = "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else ""
                raise AssertionError(f"not in {seconds:g} s: {what}\n{self.login('squeue', check=False).stdout}\n{said}")
            time.sleep(0.2)

    def cancel_all(self, seconds: float = 60.0) -> None:
        """No job is left in the queue."""
        self.login("scancel", "--user=root")
        self.until(lambda: not self.login("squeue", "--noheader").stdout, "the queue is empty", seconds)

    def kill_node(self, name: str) -> None:
        """Power failure: everything on it is gone, and nobody is told: connections to it stay open, silent."""
        self.network.kill(name)

    def boot_node(self, name: str) -> None:
        """The node comes back, with its SLURM daemon."""
        self.network.boot(name)
        self.run(name, "slurmd")

    def cut(self, name: str) -> None:
        """Pull a node's cable, or the controller's (`login`)."""
        self.network.cut(name)

    def heal(self, name: str) -> None:
        self.network.heal(name)

    def stop_controller(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM lets it save its state, as an administrator's restart does; SIGKILL takes the last seconds of it away."""
        pids = self.network.pids(LOGIN, "slurmctld")
        for pid in pids:
            os.kill(pid, how)
        self.until(lambda: not self.network.pids(LOGIN, "slurmctld"), "the controller has ended")

    def start_controller(self) -> None:
        """With the state that the last one has left, if any."""
        self.login("slurmctld")
        self.until(lambda: self.login("scontrol", "ping", check=False).returncode == 0, "the controller answers")

    def restart_controller(self, *, down: float = 0.0, how: signal.Signals = signal.SIGTERM) -> None:
        """Away for `down` seconds in the middle of whatever runs."""
        self.stop_controller(how)
        time.sleep(down)
        self.start_controller()

    def wait_for_nodes(self, seconds: float = 30.0) -> None:
        """Until every node is up and idle."""

        def idle() -> bool:
            lines = self.login("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", check=False).stdout.split(
                "\n"
            )
            return len([line for line in lines if line and "*" not in line.split()[-1]]) == len(self.nodes)

        self.until(idle, "all nodes are idle", seconds)

    def _start(self) -> None:
        for folder in ("munge", "state", "spool", "pids", "logs"):
            (self.folder / folder).mkdir()
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(folder=self.folder, **self._settings))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge/key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.login("munged", "--force", *(f"--{option}={self.folder}/munge/{name}" for option, name in files.items()))
        self.start_controller()
        for name in self.nodes:
            (self.folder / "spool" / name).mkdir()
            self.run(name, "slurmd")
        self.wait_for_nodes()
