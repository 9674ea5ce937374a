"""Name the SLURM job that this process belongs to."""

import os

# Variable in which a batch script of our own array has its SLURM_JOB_ID.
ARRAY_TASK = "SIMCLR_DIST_ARRAY_TASK"


def job_id() -> str | None:
    """Return the id that SLURM knows this job by; None outside.

    One task of an array has the array's number, which SLURM takes for all of its tasks: that task is NUMBER_TASK. A job that
    was sent from inside an array inherits the array's variables, but not its number. Tasks of our own arrays are all called
    NUMBER_TASK, as they were when they were sent. In all parts of a heterogeneous job SLURM_JOB_ID is the first part's, and
    right: SLURM requeues no part alone.
    """
    job, task, array = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "ARRAY_TASK_ID", "ARRAY_JOB_ID"))
    return f"{array}_{task}" if job and task and array and job in (array, os.environ.get(ARRAY_TASK)) else job


def restart_count() -> int:
    """Return how often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def gpus_given() -> int:
    """Count the GPUs that SLURM has given to this process. 0 outside a job, and where none is named."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if job_id() is None or given in ("", "-1", "NoDevFiles"):
        return 0
    return 1 if given.startswith("MIG-") else given.count(",") + 1  # of parts of a GPU CUDA takes the first alone
