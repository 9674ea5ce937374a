"""Name the SLURM job that this process belongs to."""

import os


def job_id() -> str | None:
    """Return the id that SLURM knows this job by; None outside.

    One task of an array has the array's number, which SLURM takes for all of its tasks: that task is NUMBER_TASK. A job that
    was sent from inside an array inherits the array's variables, but not its number. In all parts of a heterogeneous job
    SLURM_JOB_ID is the first part's, and right: SLURM requeues no part alone.
    """
    job, task = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task and job == os.environ.get("SLURM_ARRAY_JOB_ID") else job


def restart_count() -> int:
    """Return how often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def gpus_given() -> int:
    """Count the GPUs that SLURM has given to this process. 0 outside a job, and where none is named."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if job_id() is None or given in ("", "-1", "NoDevFiles"):
        return 0
    return 1 if given.startswith("MIG-") else given.count(",") + 1  # of parts of a GPU CUDA takes the first alone
