"""`python -m simclr_dist.launch.slurm.rescue RUN CODE`: the last line of a batch script, after srun has ended with CODE.

Requeues a job whose tasks were stopped, or have died without being able to do so themselves; exits with the code that the
job is to have.
"""

import argparse
import os
import sys
from pathlib import Path

from simclr_dist.launch.slurm.requeue import go_on, settle
from simclr_dist.system.errors import PREEMPTED


def main() -> int:
    """Returns the job's exit code, which counts for nothing when the job is requeued."""
    parser = argparse.ArgumentParser(prog="python -m simclr_dist.launch.slurm.rescue")
    parser.add_argument("run", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--kind", choices=("train", "eval"), default="train")
    parser.add_argument("--max-restarts", type=int, default=3)
    told = parser.parse_args()
    if told.code == 0:
        return 0
    job = os.environ["SLURM_JOB_ID"]
    verdict = settle(told.run, told.kind, job, told.code, told.max_restarts)
    print(f"simclr-dist: job {job}: {'ends' if verdict.final else 'starts again'}: {verdict.why}", file=sys.stderr, flush=True)
    if verdict.final:
        return verdict.code
    go_on(told.run, told.kind, job, verdict, one_of_many=False)
    return PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
