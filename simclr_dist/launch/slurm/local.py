"""A submission's jobs on this machine, through submitit's local executor."""

import os
import shutil
import signal
import sys
import time

import submitit
from submitit.core.utils import environment_variables

from simclr_dist.launch.slurm.batch import Submission
from simclr_dist.launch.slurm.logs import tails
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.launch.slurm.submission import refuse_if_alive, store_config
from simclr_dist.run.claim import newest_start
from simclr_dist.run.folder import note_death, read_status
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED

_NO_LIMIT = 60 * 24 * 3650  # minutes; submitit ends a local job after two


def run_here(submission: Submission) -> int:
    """Run the training, then its evaluation if there is one, with one rank a task and rank 0's output as it comes.

    Returns the exit code: 75 after a stop. Nodes, time limit, container and set-up lines of the profile stay unused.
    """
    if shutil.which("squeue"):
        refuse_if_alive(submission.run)
    store_config(submission)
    code = _run(submission, "train")
    if code == 0 and submission.evaluation is not None:
        code = _run(submission, "eval")
    return code


def _run(submission: Submission, kind: Kind) -> int:
    profile = submission.profile_of(kind)
    start = newest_start(submission.run)
    executor = submitit.AutoExecutor(submission.folder, cluster="local")
    executor.update_parameters(tasks_per_node=profile.tasks, gpus_per_node=profile.gpus_per_node, timeout_min=_NO_LIMIT)
    # submitit's controller has no way to take Ctrl-C but to kill the tasks; the tasks themselves listen to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with environment_variables(**profile.environment):
        job = executor.submit(submission.job(kind))
    signals.listen()
    out, err = tails(submission.folder, job.job_id, sys.stdout, sys.stderr)
    told = 0
    while not job.done():
        began = any([out.copy(), err.copy()]) or told
        if (asked := signals.asked()) != told and began:  # before its first line the controller would just die
            os.kill(int(job.job_id), signal.SIGTERM)
            told = asked
        time.sleep(0.1)
    out.copy()
    err.copy()
    return _exit_code(submission, kind, job, start)


def _exit_code(submission: Submission, kind: Kind, job: submitit.Job[None], start: int) -> int:
    """submitit's controller does not tell how its tasks ended; one that is done leaves a result, and training a status."""
    tasks = [job.task(number) for number in range(job.num_tasks)]
    if all(task.paths.result_pickle.exists() for task in tasks):
        return 0 if job.exception() is None else 1
    if kind == "eval":
        return PREEMPTED if signals.asked() else 1
    note_death(submission.run)
    status = read_status(submission.run)
    if status.get("start", 0) <= start:  # nothing began that could be lost
        return PREEMPTED if signals.asked() else 1
    return int(status.get("exit_code") or 1)
