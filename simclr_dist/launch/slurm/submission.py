"""From a config to jobs in the queue: every check first, then submitit, and the record in the run folder."""

import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.config.together import check_fits
from simclr_dist.data.collection import load_collection
from simclr_dist.launch.slurm import batch, scheduler
from simclr_dist.launch.slurm.batch import Evaluation, Submission
from simclr_dist.launch.slurm.profile import Profile, check_text
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import check_run_folder, newest_step
from simclr_dist.system.errors import ConfigError
from simclr_dist.system.files import write_atomically
from simclr_dist.train.profiling import Profile as StepProfile

_NO_LIMIT = 1_000_000  # starts that submitit counts as timed out: all that live up to a limit of ten minutes


def prepare(
    source: str,
    overrides: Sequence[str],
    profile: Profile,
    *,
    evaluation: Evaluation | None = None,
    profiled: StepProfile | None = None,
    run: Path | None = None,
    working_directory: Path | None = None,
) -> Submission:
    """Check all that can be refused before a job waits in a queue; `profiled` are steps of the training, `run` and
    `working_directory` those of a run that is resumed. Raises UserError."""
    config = load_config(source, overrides)
    here = working_directory or Path.cwd()
    run = run or here / config.run_folder
    config = dataclasses.replace(config, run_folder=str(run))
    for where, path in (("run_folder", run), ("working directory", here)):
        check_text(str(path), where)
    if "%" in str(run):
        raise ConfigError(f"run_folder: {str(run)!r}: SLURM would fill in what follows the %; name another")
    if profile.container is not None and re.search("[,:]", f"{run}{here}"):
        raise ConfigError(f"run_folder: {str(run)!r}, or the working directory: a container mounts none with a comma or colon")
    check_run_folder(config)
    samples = config.data.samples or len(load_collection(config.data.shards, beside=here))
    check_fits(config, samples, profile.world_size)
    done, total = newest_step(run), config.total_steps(samples)
    if done > total:
        raise ConfigError(f"steps: {run} has done {done} already, more than the {total} asked for")
    if profiled is not None:
        profiled.check(profile.world_size)
        if not profiled.steps(done, total):
            raise ConfigError(
                f"--profile-steps: {profiled.options[1]!r}: the job has steps {done + 1} to {total}: none to profile"
            )
    if evaluation is not None:
        for shards in (evaluation.train, evaluation.test):
            load_collection(shards, beside=here)
    return Submission(config, profile, here, evaluation, source, tuple(overrides), total, profiled)


def check_device(submission: Submission) -> None:
    """Raises ConfigError where a cluster's GPUs would stand idle, or be missed; on this machine a profile's do not count."""
    device, gpus = submission.config.device, submission.profile.gpus_per_node
    if (device == "cpu" and gpus > 0) or (device == "cuda" and gpus == 0):
        raise ConfigError(
            f"device: {device!r} contradicts the profile's gpus_per_node: {gpus}; change one of the two, or set device: auto"
        )


def submit(submission: Submission) -> list[str]:
    """Submit the run's job, then its evaluation's; returns their ids. Raises ConfigError when one is refused."""
    scheduler.require("sbatch", "srun")
    refuse_if_alive(submission.run)
    _refuse_if_done(submission)
    with _undone_when_refused(submission):
        store_config(submission)
        jobs = [_sbatch(submission, "train")]
    _write_record(submission, jobs)
    if submission.evaluation is not None:
        try:
            jobs.append(_sbatch(submission, "eval", after=jobs[0]))
        except ConfigError as error:
            undo = f"`simclr-dist submit cancel {shlex.quote(str(submission.run))}` takes it back"
            raise ConfigError(f"the evaluation: {error}; the training is submitted, as job {jobs[0]}: {undo}") from None
        finally:
            _write_record(submission, jobs)
    return jobs


def _refuse_if_done(submission: Submission) -> None:
    run, done = submission.run, newest_step(submission.run)
    exported = any((run / "encoders").glob(f"step-{done:08d}.*"))
    if exported and done == submission.total_steps and submission.evaluation is None:
        raise ConfigError(f"steps: {run} has done all of its {done}; nothing is left for a job (--eval would evaluate it)")


def store_config(submission: Submission) -> None:
    """Write the config that the jobs read, as it is now: the file that the user named may change until they start.

    A cancelled run may go on. Raises ConfigError when the run folder cannot be written.
    """
    try:
        submission.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(submission.folder / "config.yaml", write_yaml(submission.config.to_dict()).encode())
        (submission.run / "cancelled").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"run_folder: {str(submission.run)!r}: cannot be written: {error.strerror}") from None


def read_record(run: Path) -> dict[str, Any]:
    """What was submitted for the run folder last; raises ConfigError when nothing was."""
    try:
        found: dict[str, Any] = json.loads((run / "submission.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{run}: no job was submitted for this folder: it has no submission.json") from None
    except ValueError as error:
        raise ConfigError(f"{run / 'submission.json'}: is damaged: {error}") from None
    if not isinstance(found, dict) or not {"job_id", "eval_job_id", "profile"} <= set(found):
        raise ConfigError(f"{run / 'submission.json'}: is not the record of a submission; submit the run anew")
    return found


def refuse_if_alive(run: Path) -> None:
    """Raises ConfigError when a job of the run folder is in the queue or runs, or may."""
    if not (run / "submission.json").exists():
        return
    record = read_record(run)
    for job in (record["job_id"], record["eval_job_id"]):
        if job is None:
            continue
        found = scheduler.state(job)
        if found.name == scheduler.UNKNOWN:
            raise ConfigError(f"run_folder: {str(run)!r}: cannot find out whether its job {job} has ended ({found.reason})")
        if not found.over:
            cancel = f"`simclr-dist submit cancel {shlex.quote(str(run))}`"
            raise ConfigError(f"run_folder: {str(run)!r}: its job {job} is {found}; wait for its end, or {cancel} first")


def _write_record(submission: Submission, jobs: Sequence[str]) -> None:
    evaluation = submission.evaluation
    record = {
        "job_id": jobs[0],
        "eval_job_id": jobs[1] if len(jobs) > 1 else None,
        "config": submission.source,
        "overrides": submission.overrides,
        "working_directory": str(submission.working_directory),
        "time": time.time(),
        "profile": submission.profile.to_dict(),
        "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
    }
    write_atomically(submission.run / "submission.json", json.dumps(record, indent=2).encode() + b"\n")


def _sbatch(submission: Submission, kind: Kind, *, after: str | None = None) -> str:
    executor = submitit.AutoExecutor(
        submission.folder, cluster="slurm", slurm_max_num_timeout=_NO_LIMIT, slurm_python=batch.python(submission, kind)
    )
    parameters = batch.parameters(submission, kind, after)
    executor.update_parameters(**{f"slurm_{name}": value for name, value in parameters.items()})
    with _own_settings_only(batch.script(submission, kind, after=after)):
        try:
            job = executor.submit(submission.job(kind))
        except (FailedJobError, FailedSubmissionError) as error:
            said = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).strip().splitlines())
            raise ConfigError(f"SLURM refused the job: {said}") from None
    ledger.record(submission.run, "submitted", kind=kind, job=job.job_id)
    return str(job.job_id)


@contextmanager
def _undone_when_refused(submission: Submission) -> Iterator[None]:
    """Leave the run folder as it was, so that a refused submission does not look like one."""
    folder, config = submission.folder, submission.folder / "config.yaml"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    files = set(folder.glob("*"))
    before = config.read_bytes() if config.exists() else None
    try:
        yield
    except ConfigError:
        for path in set(folder.glob("*")) - files:
            path.unlink()
        if before is not None and config.read_bytes() != before:
            write_atomically(config, before)
        for path in made:
            if path.exists():
                path.rmdir()
        raise


@contextmanager
def _own_settings_only(text: str) -> Iterator[None]:
    """Without the variables that would overrule the batch script `text`: SBATCH_*, and those of a job that submits jobs."""
    named = set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE))
    other_names = {"timelimit": "time", "mem-per-node": "mem", "no-requeue": "requeue"}
    hidden = {}
    for name in list(os.environ):
        option = name.removeprefix("SBATCH_").lower().replace("_", "-")
        overrules = name.startswith("SBATCH_") and other_names.get(option, option) in named
        inherited = "SLURM_JOB_ID" in os.environ and name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"
        if overrules or inherited:
            hidden[name] = os.environ[name]
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= hidden
