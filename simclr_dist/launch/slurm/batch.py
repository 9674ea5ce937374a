"""Write the batch scripts of a run that has been checked."""

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.launch.slurm.job import Job
from simclr_dist.launch.slurm.profile import PASSED_ON, Profile
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.launch.slurm.work import Work
from simclr_dist.system.slurm_job import ARRAY_TASK
from simclr_dist.train.profiling import Profile as StepProfile


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that follows a run."""

    train: str  # shards that kNN and the probe learn from
    test: str  # shards that the accuracy is measured on
    profile: Profile
    val: str | None = None  # shards that choose what is not set
    labels: str | None = None  # shares of the training labels, as they are typed

    @property
    def options(self) -> list[str]:
        """Return the options of its `eval`."""
        given = {"--train": self.train, "--val": self.val, "--test": self.test, "--labels": self.labels}
        return [word for option, value in given.items() if value is not None for word in (option, value)]


@dataclass(frozen=True)
class Submission:
    """A checked run. Its jobs can be submitted, shown, or run on this machine."""

    config: Config  # its run_folder is absolute
    profile: Profile
    working_directory: Path  # what relative paths of the config are relative to
    evaluation: Evaluation | None
    source: str
    overrides: tuple[str, ...]
    total_steps: int
    profiled: StepProfile | None = None  # steps of each of its starts

    @property
    def run(self) -> Path:
        """Return the run folder."""
        return Path(self.config.run_folder)

    @property
    def folder(self) -> Path:
        """Return the folder of batch scripts, logs, pickled jobs, the jobs' config."""
        return self.run / "slurm"

    def job(self, kind: Kind) -> Job:
        """Return the object that every task of a job runs."""
        if self.evaluation is None or kind == "train":
            command = ["simclr_dist.train", str(self.folder / "config.yaml"), *(self.profiled.options if self.profiled else [])]
            command += ["--data.allow_pipe", "true"] * self.config.data.allow_pipe  # which no file may set, and the user typed
        else:
            command = ["simclr_dist.evaluate", "--watch", str(self.run), *self.evaluation.options]
        return Job(kind, str(self.run), command, str(self.working_directory), self.profile_of(kind).max_restarts)

    def profile_of(self, kind: Kind) -> Profile:
        """Return the profile of a job."""
        return self.evaluation.profile if self.evaluation is not None and kind == "eval" else self.profile


def dry_run(submission: Submission) -> str:
    """Return the batch scripts and the config that the jobs read. This needs no SLURM and writes nothing."""
    ranks = "each rank runs: python -m"
    parts = [(f"training; {ranks} {shlex.join(submission.job('train').command)}", script(submission, "train"))]
    if submission.profiled is not None:
        parts.append((f"profiled, into {submission.run / 'profile'}", " ".join(submission.profiled.options)))
    if submission.evaluation is not None:
        title = f"evaluation; {ranks} {shlex.join(submission.job('eval').command)}"
        parts.append((title, script(submission, "eval", after="TRAINING_JOB")))
    parts.append((str(submission.folder / "config.yaml"), write_yaml(submission.config.to_dict())))
    return "\n".join(f"# ---- {title}\n{text.rstrip()}\n" for title, text in parts)


def dry_run_array(folder: Path, submissions: Sequence[Submission]) -> str:
    """Return the scripts of an array, then each run's scripts and config."""
    parts = [(f"array {kind}", array_script(folder, submissions, kind)) for kind in kinds_of(submissions[0])]
    for one in submissions:
        parts += [(str(path), text) for path, text in task_scripts(one).items()]
        parts.append((str(one.folder / "config.yaml"), write_yaml(one.config.to_dict())))
    return "\n".join(f"# ---- {title}\n{text.rstrip()}\n" for title, text in parts)


def dry_run_work(tasks: Mapping[int, Work], last: Work) -> str:
    """Return the batch scripts of an array's `tasks` and the job behind. Say what their ranks run."""
    array = script(tasks[min(tasks)], "work", tasks=tasks) if tasks else ""
    parts, end = (
        "".join(f"# ---- each rank runs: python -m {shlex.join(one.job('work').command)}\n" for one in works)
        for works in (tasks.values(), [last])
    )
    return f"{parts}{array}\n{end}{script(last, 'work', after='ARRAY' if tasks else None)}\n"


def kinds_of(submission: Submission) -> tuple[Kind, ...]:
    """Return the kinds of jobs that a submission has, in their order."""
    return ("train",) if submission.evaluation is None else ("train", "eval")


def array_script(folder: Path, submissions: Sequence[Submission], kind: Kind, *, after: str = "TRAINING_ARRAY") -> str:
    """Return the batch script of an array. Its task N runs the script of run N.

    An evaluation starts once the task of its number in the array `after` is done.
    """
    options = _options(submissions[0], kind, after if kind == "eval" else None)
    options |= {"job-name": folder.name + ("-eval" if kind == "eval" else ""), "array": f"0-{len(submissions) - 1}"}
    options |= dict.fromkeys(("output", "error"), folder / "slurm" / f"%A_%a.{kind}.out")
    if kind == "eval":
        options["dependency"] = f"aftercorr:{after}"
    scripts = ["scripts=(", *(f"  {shlex.quote(str(one.folder / f'{kind}.sh'))}" for one in submissions), ")"]
    body = [f"export {ARRAY_TASK}=$SLURM_JOB_ID", *scripts, 'exec bash "${scripts[$SLURM_ARRAY_TASK_ID]}"']
    return "\n\n".join(["#!/bin/bash", _flags(options), "\n".join(body)])


def task_scripts(submission: Submission) -> dict[Path, str]:
    """Return a run's scripts in an array, by path."""
    # The run's logs are in its folder, as those of a job of its own are.
    log = f"{shlex.quote(str(submission.folder))}/${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_0_log"
    first = f"exec >> {log}.out 2>> {log}.err"
    return {
        submission.folder / f"{kind}.sh": "\n\n".join([first, *_sections(submission, kind, "%A_%a")]) + "\n"
        for kind in kinds_of(submission)
    }


def script(submission: Submission | Work, kind: Kind, *, after: str | None = None, tasks: Collection[int] = ()) -> str:
    """Return the batch script of a job, or of `tasks` like it. It starts once job `after` is done."""
    job, mark = ("%A_%a", [f"export {ARRAY_TASK}=$SLURM_JOB_ID"]) if tasks else ("%j", [])
    options = _options(submission, kind, after, job) | ({"array": ",".join(map(str, tasks))} if tasks else {})
    return "\n\n".join(["#!/bin/bash", _flags(options), *mark, *_sections(submission, kind, job)])


def _flags(options: Mapping[str, object]) -> str:
    flags = (f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in sorted(options.items()))
    return "\n".join(["# options", *(f"#SBATCH {flag}" for flag in flags)])


def _sections(submission: Submission | Work, kind: Kind, job: str) -> list[str]:
    """Return what a batch script does. `job` is srun's pattern for its number."""
    profile = submission.profile_of(kind)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    # Outside any container: it starts the job again when its tasks could not.
    rescue = [sys.executable, "-m", "simclr_dist.launch.slurm.rescue", "--kind", kind]
    rescue += ["--max-restarts", str(profile.max_restarts), str(submission.run)]
    sections = [
        ["# setup", *profile.setup, *exports],
        ["# tasks", "export SUBMITIT_EXECUTOR=slurm PYTHONSAFEPATH=1", shlex.join(_tasks(submission, profile, job))],
        ["# end", "code=$?", f"exec {shlex.join(rescue)} $code"],
    ]
    return ["\n".join(section) for section in sections]


def _options(submission: Submission | Work, kind: Kind, after: str | None, job: str = "%j") -> dict[str, object]:
    """Return sbatch's options by their long names. True stands for an option without a value."""
    profile = submission.profile_of(kind)
    options: dict[str, object] = {
        "job-name": submission.run.name.removesuffix(".jobs") + ("-eval" if kind == "eval" else ""),
        "chdir": submission.working_directory,
        "output": submission.folder / f"{job}_0_log.out",
        "error": submission.folder / f"{job}_0_log.err",
        "open-mode": "append",
        "requeue": True,
        "nodes": profile.nodes,
        "ntasks-per-node": profile.tasks,
        "gpus-per-node": profile.gpus_per_node or None,
        "time": profile.minutes,
        "mem": None if profile.memory_gb is None else f"{round(profile.memory_gb * 1024)}M",
        "signal": f"USR2@{profile.stop_seconds}",
        "dependency": None if after is None else f"afterok:{after}",
        # A training that fails for good takes its evaluation along; otherwise that would wait for ever.
        "kill-on-invalid-dep": None if after is None else "yes",
    }
    options |= {name: getattr(profile, name.replace("-", "_")) for name in PASSED_ON}
    return {name: value for name, value in options.items() if value is not None} | dict(profile.extra)


def _tasks(submission: Submission | Work, profile: Profile, job: str) -> list[str]:
    """Return the shell words that start the tasks. Tasks with a container start in it."""
    folder, where = submission.folder, submission.working_directory
    words = ["srun", "--unbuffered", "--output", f"{folder}/{job}_%t_log.out", "--error", f"{folder}/{job}_%t_log.err"]
    # Else the others wait for a dead rank until their time-out, and a log loses what its file held before srun opens it.
    words += ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus_per_task is not None:
        words.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun no longer takes it over from sbatch
    seen = submission.product.parent if isinstance(submission, Work) else submission.run
    mounts = [str(where), str(seen), *profile.container_mounts]
    if profile.container_runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        words += [f"--container-image={profile.container}", f"--container-mounts={pairs}", f"--container-workdir={where}"]
    elif profile.container is not None:
        gpus = ["--nv"] if profile.gpus_per_node else []
        words += ["apptainer", "exec", *gpus, f"--pwd={where}", *(f"--bind={mount}" for mount in mounts), profile.container]
    words.append(sys.executable if profile.container is None else profile.container_python)
    # submitit's own scripts start a task by this module too; it has no public name.
    return [*words, "-u", "-m", "submitit.core._submit", str(folder)]
