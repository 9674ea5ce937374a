"""Run a submission's jobs on this machine, through submitit's local executor."""

import os
import shutil
import signal
import time

import submitit

from simclr_dist.launch.slurm.batch import Submission
from simclr_dist.launch.slurm.logs import tails
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.launch.slurm.submission import refuse_if_alive, store_config
from simclr_dist.run.claim import newest_start
from simclr_dist.run.status import note_death, read_status
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED

_NO_LIMIT = 60 * 24 * 3650  # minutes; submitit ends a local job after two


def run_here(submission: Submission) -> int:
    """Run the training, then its evaluation if there is one. Return the exit code, 75 after a stop.

    Each task is one rank, and rank 0's output is shown as it comes. Nodes, time limit, container and set-up lines of the
    profile stay unused.
    """
    if shutil.which("squeue"):
        refuse_if_alive(submission.run)
    store_config(submission)
    code = _run(submission, "train")
    return _run(submission, "eval") if code == 0 and submission.evaluation is not None else code


def _run(submission: Submission, kind: Kind) -> int:
    profile = submission.profile_of(kind)
    start = newest_start(submission.run)
    executor = submitit.AutoExecutor(submission.folder, cluster="local")
    executor.update_parameters(tasks_per_node=profile.tasks, gpus_per_node=profile.gpus_per_node, timeout_min=_NO_LIMIT)
    # submitit's controller has no way to take these but to kill the tasks, or to leave them behind. We pass a SIGTERM on.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    with submitit.helpers.environment_variables(**profile.environment):
        job = executor.submit(submission.job(kind))
    signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    signals.listen()
    out, err = tails(submission.folder, job.job_id)
    passed_on = 0  # the last stop signal that the tasks have
    while not job.done():
        began = any([out.copy(), err.copy()]) or passed_on
        if (number := signals.requested()) != passed_on and began:  # before its first line the controller would just die
            os.kill(int(job.job_id), signal.SIGTERM)
            passed_on = number
        time.sleep(0.1)
    out.copy()
    err.copy()
    # submitit's controller does not tell how the tasks ended; one that is done leaves a result.
    if all(job.task(number).paths.result_pickle.exists() for number in range(job.num_tasks)):
        return 0 if job.exception() is None else 1
    if kind == "train":
        note_death(submission.run)
        status = read_status(submission.run)
        if status.get("start", 0) > start:
            return int(status.get("exit_code") or 1)
    return PREEMPTED if signals.requested() else 1  # an evaluation, or a training that had not begun: nothing is lost
