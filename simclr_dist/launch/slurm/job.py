"""The object that submitit pickles and runs in every task: a parent without torch of one rank."""

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


@dataclass(frozen=True)
class Job:
    """One rank a task of `python -m COMMAND`, requeued when it was stopped or has crashed; returns when it is done.

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
        here = submitit.JobEnvironment()
        code = (
            PREEMPTED
            if signals.asked()
            else supervise([sys.executable, "-u", "-m", *self.command], env={**os.environ, **rank_variables(here)})
        )
        if code == 0:
            return
        if code < 0 and signals.asked():
            code = PREEMPTED  # killed while it was starting, before it could listen: it had done nothing
        if here.cluster != "slurm":
            raise SystemExit(code if code > 0 else 1)
        if code := self._end(here, code):
            raise SystemExit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit calls when its signal comes before this object runs: there is nothing to save yet."""
        return submitit.helpers.DelayedSubmission(self)

    def _end(self, here: submitit.JobEnvironment, code: int) -> int:
        """See to what becomes of the job; returns this task's exit code."""
        run, job = Path(self.run), here.raw_job_id
        if code == PREEMPTED and here.global_rank != 0:
            # Rank 0 requeues, ends, and so takes the others along. But it may not have been asked to stop, and then waits for
            # this rank, which ended before it could tell.
            signals.exit_when_asked(PREEMPTED, "simclr-dist: {signal}: requeued")
            time.sleep(3)
        verdict = settle(run, self.kind, job, code, self.max_restarts)
        if verdict.final:
            if here.global_rank != 0:
                time.sleep(1)  # the first task to end takes the others along: let rank 0 speak
            return verdict.code if verdict.code >= 0 else 1
        # Waiting to be killed would keep the nodes for SLURM's KillWait. Where the request failed, the batch script, which
        # outlives us, tries again.
        go_on(run, self.kind, job, verdict, one_of_many=True)
        return PREEMPTED if code == PREEMPTED else 1


def rank_variables(here: submitit.JobEnvironment) -> dict[str, str]:
    """torchrun's variables, from the scheduler's."""
    job, restart = int(here.raw_job_id), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    one_gpu_a_task = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
    variables = {
        "RANK": str(here.global_rank),
        "WORLD_SIZE": str(here.num_tasks),
        # Where SLURM shows each task only its own GPU, that is number 0 for all of them.
        "LOCAL_RANK": "0" if os.environ.get("CUDA_VISIBLE_DEVICES") and one_gpu_a_task else str(here.local_rank),
        "MASTER_ADDR": here.hostnames[0] if here.cluster == "slurm" else "127.0.0.1",
        "MASTER_PORT": str(20_000 + (job * 101 + restart * 13) % 20_000),  # all tasks find the same, the next start another
    }
    if "SLURM_CPUS_PER_TASK" in os.environ:
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    return variables
