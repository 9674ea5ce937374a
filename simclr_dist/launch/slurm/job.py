"""Define the object that every task of a SLURM job runs. It is a parent, without torch, of one rank."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit

from simclr_dist.launch.slurm.requeue import Kind, go_on, settle
from simclr_dist.launch.supervisor import supervise
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED
from simclr_dist.system.machine import threads_a_rank
from simclr_dist.system.slurm_job import job_id, restart_count


@dataclass(frozen=True)
class Job:
    """One rank of `python -m COMMAND` for each task. Requeued when it was stopped or has crashed; returns when it is done.

    Otherwise the task ends by SystemExit: with the rank's code when that is final, with 75 when another start follows.
    """

    kind: Kind
    run: str
    command: list[str]  # a module and its arguments
    working_directory: str
    max_restarts: int = 3

    def __call__(self) -> None:
        """Run the rank that this task stands for."""
        signals.listen()  # in the place of submitit's handlers, of which one ignores SIGTERM
        os.chdir(self.working_directory)
        task = submitit.JobEnvironment()
        code = PREEMPTED
        if not signals.requested():
            code = supervise([sys.executable, "-u", "-m", *self.command], env={**os.environ, **rank_variables(task)})
        if code == 0:
            return
        if code < 0 and signals.requested():
            code = PREEMPTED  # killed while it was starting, before it could listen: it had done nothing
        if task.cluster != "slurm":
            raise SystemExit(code if code > 0 else 1)
        if code := self._end(task, code):
            raise SystemExit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Answer submitit when its signal comes before this object runs. Nothing is to be saved yet."""
        return submitit.helpers.DelayedSubmission(self)

    def _end(self, task: submitit.JobEnvironment, code: int) -> int:
        """Settle what becomes of the job; return this task's exit code."""
        run, job = Path(self.run), str(job_id())
        if code == PREEMPTED and task.global_rank != 0:
            # Rank 0 requeues, ends, and so takes the others along. But it may have got no signal, and then waits for this rank,
            # which ended before it could pass its own on.
            signals.exit_on_signal(PREEMPTED, "simclr-dist: {signal}: requeued")
            time.sleep(3)
        verdict = settle(run, self.kind, job, code, self.max_restarts)
        if verdict.final:
            if task.global_rank != 0:
                time.sleep(1)  # the first task to end takes the others along: let rank 0 speak
            return verdict.code if verdict.code >= 0 else 1
        # Waiting to be killed would keep the nodes for SLURM's KillWait. Where the request failed, the batch script, which
        # outlives us, tries again.
        go_on(run, self.kind, job, verdict, one_of_many=True)
        return PREEMPTED if code == PREEMPTED else 1


def meeting_port(job: int, restart: int) -> int:
    """Return the port at which a job's ranks meet. The next start has another, should this one be taken.

    It lies below those that Linux gives to connections (from 32768), and between those of NFS and of GlusterFS.
    launch/train.sbatch has the same rule.
    """
    return 21_000 + (job * 101 + restart * 13) % 3_000


def rank_variables(task: submitit.JobEnvironment) -> dict[str, str]:
    """Return torchrun's variables for a task of a job."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    variables = {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        # Where SLURM shows each task only its own GPU, that is number 0 for all of them.
        "LOCAL_RANK": "0" if gpus and "," not in gpus else str(task.local_rank),
        "MASTER_ADDR": task.hostnames[0] if task.cluster == "slurm" else "127.0.0.1",
        "MASTER_PORT": str(meeting_port(int(task.raw_job_id), restart_count())),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        share = str(threads_a_rank(task.num_tasks // task.num_nodes))
        variables["OMP_NUM_THREADS"] = os.environ.get("SLURM_CPUS_PER_TASK", share)
    return variables
