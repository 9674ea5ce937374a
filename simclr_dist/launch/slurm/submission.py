"""Turn a config into jobs in the queue. Keep the record of them in the run folder."""

import dataclasses
import json
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import submitit

from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.data.collection import load_collection
from simclr_dist.encoder.names import encoder_path
from simclr_dist.launch.slurm import batch, scheduler
from simclr_dist.launch.slurm.batch import Evaluation, Submission
from simclr_dist.launch.slurm.profile import Profile, check_text
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.launch.slurm.work import Work
from simclr_dist.run.folder import check_run_folder, newest_step
from simclr_dist.run.status import record_event
from simclr_dist.system.errors import ConfigError, reason_of, refusing
from simclr_dist.system.files import read_object, write_atomically
from simclr_dist.train.inputs import check_inputs
from simclr_dist.train.profiling import Profile as StepProfile

_RECORD = {
    "job_id": str, "eval_job_id": str | None, "config": str, "overrides": list, "working_directory": str, "profile": dict,
    "evaluation": dict | None, "tasks?": list,
}  # fmt: skip
# Starts that ran into the time limit, after which submitit ends a job; it counts all starts of a limit of ten minutes or less.
_MOST_TIMEOUTS = 1_000_000


def prepare(
    source: str, overrides: Sequence[str], profile: Profile, *, evaluation: Evaluation | None = None,
    profiled: StepProfile | None = None, run: Path | None = None, working_directory: Path | None = None,
) -> Submission:  # fmt: skip
    """Check all that can be refused before a job is queued. Raises UserError.

    `profiled`: steps of the training. `run` and `working_directory`: those of a run that is resumed.
    """
    config = load_config(source, overrides)
    folder = working_directory or Path.cwd()
    run = run or folder / config.run_folder
    config = dataclasses.replace(config, run_folder=str(run))
    check_paths(profile, "run_folder", run, folder)
    check_run_folder(config)
    total = config.total_steps(check_inputs(config, profile.world_size, beside=folder))
    if profiled is not None:
        profiled.check(profile.world_size)
        if not profiled.steps(done := newest_step(run), total):
            steps = f"the job has steps {done + 1} to {total}"
            raise ConfigError(f"--profile-steps: {profiled.options[1]!r}: {steps}: none to profile")
    if evaluation is not None:
        for shards in (evaluation.train, evaluation.val, evaluation.test):
            if shards is not None:
                load_collection(shards, beside=folder)
    return Submission(config, profile, folder, evaluation, source, tuple(overrides), total, profiled)


def check_paths(profile: Profile, key: str, path: Path, folder: Path) -> None:
    """Raise ConfigError for a path that no batch script can name."""
    for where, each in ((key, path), ("working directory", folder)):
        check_text(str(each), where)
    if "%" in str(path):
        raise ConfigError(f"{key}: {str(path)!r}: SLURM would fill in what follows the %; name another")
    if profile.container is not None and re.search("[,:]", f"{path}{folder}"):
        raise ConfigError(f"{key}: {str(path)!r}, or the working directory: a container mounts none with a comma or colon")


def check_device(submission: Submission) -> None:
    """Raise ConfigError where a cluster's GPUs would stand idle, or be missed. On this machine a profile's do not count."""
    device, gpus = submission.config.device, submission.profile.gpus_per_node
    if (device == "cpu" and gpus > 0) or (device == "cuda" and gpus == 0):
        contradiction = f"{device!r} contradicts the profile's gpus_per_node: {gpus}"
        raise ConfigError(f"device: {contradiction}; change one of the two, or set device: auto")


def submit(submission: Submission) -> list[str]:
    """Submit the run's job, then its evaluation's; return their numbers. Raises ConfigError when one is refused."""
    scheduler.require("sbatch", "srun")
    refuse_if_alive(submission.run)
    run, done = submission.run, newest_step(submission.run)
    if done == submission.total_steps and submission.evaluation is None and encoder_path(run, done).exists():
        raise ConfigError(f"steps: {run} has done all of its {done}; nothing is left for a job (--eval would evaluate it)")
    with _undone_when_refused(submission.folder / "config.yaml"):
        store_config(submission)
        jobs = [_send(submission.folder, batch.script(submission, "train"), {None: submission}, "train")]
    _write_record(submission, jobs)
    if submission.evaluation is not None:
        try:
            jobs.append(_send(submission.folder, batch.script(submission, "eval", after=jobs[0]), {None: submission}, "eval"))
        except ConfigError as error:
            undo = f"`simclr-dist submit cancel {shlex.quote(str(run))}` takes it back"
            raise ConfigError(f"the evaluation: {error}; the training is submitted, as job {jobs[0]}: {undo}") from None
        finally:
            _write_record(submission, jobs)
    return jobs


def submit_array(folder: Path, submissions: Sequence[Submission]) -> list[str]:
    """Submit a sweep's runs as one array, their evaluations as another. Return the arrays' numbers.

    `folder` is the sweep's. No job of these runs may be alive. Raises ConfigError when an array is refused.
    """
    scheduler.require("sbatch", "srun")
    scripts = [batch.task_scripts(one) for one in submissions]
    configs = [one.folder / "config.yaml" for one in submissions]
    with _undone_when_refused(folder / "slurm" / "array", *configs, *(path for of_run in scripts for path in of_run)):
        for one, of_run in zip(submissions, scripts, strict=True):
            store_config(one, of_run)
        text = batch.array_script(folder, submissions, "train")
        jobs = [_send(folder / "slurm", text, dict(enumerate(submissions)), "train")]
    for number, one in enumerate(submissions):
        _write_record(one, [f"{jobs[0]}_{number}"])
    if submissions[0].evaluation is not None:
        try:
            text = batch.array_script(folder, submissions, "eval", after=jobs[0])
            jobs.append(_send(folder / "slurm", text, dict(enumerate(submissions)), "eval"))
        except ConfigError as error:
            raise ConfigError(f"the evaluations: {error}; the trainings are submitted: `scancel {jobs[0]}` ends them") from None
        for number, one in enumerate(submissions):
            _write_record(one, [f"{job}_{number}" for job in jobs])
    return jobs


def submit_work(tasks: Mapping[int, Work], last: Work) -> list[str]:
    """Submit an array, if it has tasks, and the job behind it. Return their numbers. Raises ConfigError when one is refused."""
    scheduler.require("sbatch", "srun")
    refuse_if_alive(last.run)
    with _undone_when_refused(last.folder / "script"):
        store_config(last)
        text = batch.script(tasks[min(tasks)] if tasks else last, "work", tasks=tasks)
        jobs = [_send(last.folder, text, tasks or {None: last}, "work")]
    _write_record(last, jobs, tasks=list(tasks))
    if tasks:
        try:
            jobs.append(_send(last.folder, batch.script(last, "work", after=jobs[0]), {None: last}, "work"))
        except ConfigError as error:
            undo = f"`simclr-dist submit cancel {shlex.quote(str(last.product))}` takes them back"
            raise ConfigError(f"the job behind the parts: {error}; they are submitted, as job {jobs[0]}: {undo}") from None
        _write_record(last, jobs, tasks=list(tasks))
    return jobs


def store_config(submission: Submission | Work, scripts: Mapping[Path, str] = MappingProxyType({})) -> None:
    """Write a run's config for its jobs, and `scripts`. What was cancelled may go on. Raises ConfigError for a full disk."""
    files = dict(scripts)
    if isinstance(submission, Submission):  # the file that the user named may change until the jobs start
        files[submission.folder / "config.yaml"] = write_yaml(submission.config.to_dict())
    with refusing(f"run_folder: {str(submission.run)!r}: cannot be written", ConfigError):
        submission.folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            write_atomically(path, text.encode())
        (submission.run / "cancelled").unlink(missing_ok=True)
        for earlier in submission.folder.glob("*.pkl"):  # of ended jobs, or put there to be run in the place of ours
            earlier.unlink()


def read_record(run: Path) -> dict[str, Any]:
    """Read what was submitted last for a run folder. Raises ConfigError when nothing was, DataError for a damaged record."""
    record = read_object(run / "submission.json", _RECORD, "move it elsewhere and submit the run anew")
    if not record:
        raise ConfigError(f"{run}: no job was submitted for this folder: it has no submission.json")
    for key in ("job_id", "eval_job_id"):  # which become words of commands: --user=me would be all of my jobs
        if (number := record[key]) is not None and not scheduler.JOB_NUMBER.fullmatch(number):
            raise ConfigError(f"{run / 'submission.json'}: {key}: {number!r} is no job's number; submit the run anew")
    if any(type(task) is not int for task in record.get("tasks", ())):
        raise ConfigError(f"{run / 'submission.json'}: tasks: {record['tasks']!r} are no numbers; submit the jobs anew")
    return record


def original_of(run: Path, record: Mapping[str, Any]) -> tuple[Path, bool] | None:
    """Return a copy's original, and whether that is there. None for the folder of the jobs, also when it was moved."""
    original = Path(str(record.get("run_folder", run)))
    try:
        same, there = original.samefile(run), True
    except OSError:
        same, there = record.get("inode") == run.stat().st_ino, False
    return None if same else (original, there)


def jobs_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of a record's jobs by what they do."""
    first, last, tasks = record["job_id"], record["eval_job_id"], record.get("tasks")
    jobs = {f"part {task}": f"{first}_{task}" for task in tasks or ()} or {"job": first}
    return jobs | ({"evaluation" if tasks is None else "finish": last} if last else {})


def refuse_if_alive(run: Path) -> None:
    """Raise ConfigError when a job of the run folder waits or runs. Also raise it when that cannot be ruled out.

    A copy has no job.
    """
    if not (run / "submission.json").exists():
        return
    record = read_record(run)
    match original_of(run, record):
        case _, True:
            return
    key, whose = ("", run.with_suffix("")) if "tasks" in record else ("run_folder: ", run)
    jobs = jobs_of(record).values()
    for job, state in zip(jobs, scheduler.states(list(jobs)), strict=True):
        if state.name == scheduler.UNKNOWN:
            raise ConfigError(f"{key}{str(whose)!r}: cannot find out whether its job {job} has ended ({state.reason})")
        if not state.over:
            cancel = f"`simclr-dist submit cancel {shlex.quote(str(whose))}`"
            raise ConfigError(f"{key}{str(whose)!r}: its job {job} is {state}; wait for its end, or {cancel} first")


def _write_record(submission: Submission | Work, jobs: Sequence[str], **more: Any) -> None:
    evaluation = submission.evaluation
    record = {
        "job_id": jobs[0],
        "eval_job_id": jobs[1] if len(jobs) > 1 else None,
        "config": submission.source,
        "overrides": submission.overrides,
        "working_directory": str(submission.working_directory),
        "run_folder": str(submission.run),
        "inode": submission.run.stat().st_ino,
        "time": time.time(),
        "profile": dataclasses.asdict(submission.profile),
        "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
        **more,
    }
    write_atomically(submission.run / "submission.json", json.dumps(record, indent=2).encode() + b"\n")


def _send(folder: Path, text: str, sent: Mapping[Any, Submission | Work], kind: Kind) -> str:
    """Pickle what each of an array's tasks runs, and submit their script. Return its number. A job's task is None."""
    unique = secrets.token_hex(16)
    script, pickles = folder / f".{unique}.sh", {task: one.folder / f"{unique}_{task}.pkl" for task, one in sent.items()}
    try:
        folder.mkdir(exist_ok=True)
        script.write_text(text, encoding="utf-8")
        for task, one in sent.items():
            pickled = submitit.helpers.DelayedSubmission(one.job(kind))
            pickled.set_timeout(one.profile_of(kind).minutes, _MOST_TIMEOUTS)
            pickled.dump(pickles[task])
        number = scheduler.submit(script)
    except BaseException as error:  # a second Ctrl-C too: what was not sent leaves no files
        for path in (script, *pickles.values()):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"run_folder: {str(folder.parent)!r}: cannot be written: {reason_of(error)}") from None
        raise
    jobs = {task: number if task is None else f"{number}_{task}" for task in sent}
    for task, one in sent.items():
        pickles[task].rename(one.folder / f"{jobs[task]}_submitted.pkl")  # a task that has begun already waits for it
    script.rename(stays := folder / f"{number}_submission.sh")
    if None in sent:
        script.symlink_to(stays)  # `scontrol show job` names the first path
    cluster = scheduler.cluster()
    for task, one in sent.items():
        record_event(one.run, "submitted", kind=kind, job=jobs[task], cluster=cluster)
    return number


@contextmanager
def _undone_when_refused(*files: Path) -> Iterator[None]:
    """Restore files, and remove new folders, when SLURM refuses. A submission that failed leaves no trace."""
    new_folders = {folder for file in files for folder in file.parents if not folder.exists()}
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    except ConfigError:
        for file, content in before.items():
            if content is not None:
                write_atomically(file, content)
            elif file.exists():
                file.unlink()
        for folder in sorted(filter(Path.exists, new_folders), key=lambda folder: -len(folder.parts)):
            folder.rmdir()
        raise
