"""Requeue a job when its tasks could not. They were stopped, or died before they could ask for that. A batch script's
last line is `simclr-dist rescue RUN CODE`, after srun has ended with CODE; or `python -m` with this module, where the Python
is known. It exits with the job's exit code.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.launch.slurm.requeue import go_on, settle
from simclr_dist.run.status import record_event
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, say
from simclr_dist.system.slurm_job import job_id, restart_count


def main(argv: Sequence[str] | None = None) -> int:
    """Return the job's exit code. Nobody reads it when the job is requeued."""
    signals.listen()  # the script's trap ended where its `exec` began
    parser = argparse.ArgumentParser(prog="simclr-dist rescue")
    parser.add_argument("run", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--kind", choices=("train", "eval", "work"), default="train")
    parser.add_argument("--max-restarts", type=int, default=3)
    arguments = parser.parse_args(argv)
    if arguments.code == 0:
        return 0
    if (job := job_id()) is None:
        parser.error("SLURM_JOB_ID is not set: this is for a batch script")
    verdict = settle(arguments.run, arguments.kind, job, arguments.code, arguments.max_restarts)
    if verdict.final:
        say(f"job {job}: ends: {verdict.why}")
        return verdict.code
    if refused := go_on(arguments.run, arguments.kind, job, verdict, one_of_many=False):
        why = f"{verdict.why}, and not requeued: {refused}"
        record_event(arguments.run, "gave_up", kind=arguments.kind, job=job, restart=str(restart_count()), why=why)
        say(f"job {job}: ends: {why}")
        return int(arguments.code)
    say(f"job {job}: starts again: {verdict.why}")
    return PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
