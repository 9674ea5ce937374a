"""A run that has been checked, as batch scripts: what sbatch is told, and how the ranks and their Python start."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.launch.slurm.job import Job
from simclr_dist.launch.slurm.profile import Profile
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.train.profiling import Profile as StepProfile


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that follows a run: labelled shards to learn from and to measure on, and where it runs."""

    train: str
    test: str
    profile: Profile


@dataclass(frozen=True)
class Submission:
    """A run that has been checked: its jobs can be submitted, shown, or run here."""

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
        """The run folder."""
        return Path(self.config.run_folder)

    @property
    def folder(self) -> Path:
        """What submitit writes: batch scripts, logs; and the config that the jobs read."""
        return self.run / "slurm"

    def job(self, kind: Kind) -> Job:
        """The object that every task runs."""
        if self.evaluation is None or kind == "train":
            command = ["simclr_dist.train", str(self.folder / "config.yaml"), *(self.profiled.options if self.profiled else [])]
        else:
            shards = ["--train", self.evaluation.train, "--test", self.evaluation.test]
            command = ["simclr_dist.evaluate", "--watch", str(self.run), *shards]
        return Job(kind, str(self.run), command, str(self.working_directory), self.profile_of(kind).max_restarts)

    def profile_of(self, kind: Kind) -> Profile:
        """Where a job runs."""
        return self.evaluation.profile if self.evaluation is not None and kind == "eval" else self.profile


def dry_run(submission: Submission) -> str:
    """The batch scripts as sbatch would get them, and the config as the job would read it; needs no SLURM, writes nothing."""
    kinds: list[Kind] = ["train"] if submission.evaluation is None else ["train", "eval"]
    titles: dict[Kind, str] = {"train": "training", "eval": "evaluation"}
    parts = [
        (
            f"{titles[kind]}; each rank runs: python -m {shlex.join(submission.job(kind).command)}",
            script(submission, kind, after="TRAINING_JOB" if kind == "eval" else None),
        )
        for kind in kinds
    ]
    if submission.profiled is not None:
        parts.insert(1, (f"profiled, into {submission.run / 'profile'}", " ".join(submission.profiled.options)))
    parts.append((str(submission.folder / "config.yaml"), write_yaml(submission.config.to_dict())))
    return "\n".join(f"# ---- {title}\n{text.rstrip()}\n" for title, text in parts)


def script(submission: Submission, kind: Kind, *, after: str | None = None) -> str:
    """The batch script of a job; an evaluation's job starts once job `after` is done."""
    writer = _ScriptWriter(submission.folder, python=python(submission, kind))
    writer.update_parameters(**parameters(submission, kind, after))
    return writer.text()


class _ScriptWriter(SlurmExecutor):
    """What AutoExecutor hands its parameters to, on machines without SLURM, where submitit refuses to make one."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def parameters(submission: Submission, kind: Kind, after: str | None) -> dict[str, Any]:
    """SlurmExecutor's parameters; each value is checked to be one line, and put in quotes by submitit."""
    profile = submission.profile_of(kind)
    options: dict[str, Any] = {
        "job_name": submission.run.name + ("-eval" if kind == "eval" else ""),
        "time": profile.minutes,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks,
        "gpus_per_node": profile.gpus_per_node or None,
        "mem": None if profile.memory_gb is None else f"{round(profile.memory_gb * 1024)}M",
        "signal_delay_s": profile.stop_seconds,
        "dependency": None if after is None else f"afterok:{after}",
        "setup": [*profile.setup, *(f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items())],
        "srun_args": _srun_arguments(submission, kind),
        "teardown": _teardown(submission, kind),
        "additional_parameters": {
            "chdir": str(submission.working_directory),
            "requeue": True,
            # A training that fails for good takes its evaluation along; otherwise that would wait for ever.
            **({} if after is None else {"kill-on-invalid-dep": "yes"}),
            **({} if profile.reservation is None else {"reservation": profile.reservation}),
            **profile.extra,
        },
    }
    for name in ("partition", "account", "qos", "cpus_per_task", "constraint", "exclude", "mail_user", "mail_type"):
        options[name] = getattr(profile, name)
    return {name: value for name, value in options.items() if value is not None}


def _srun_arguments(submission: Submission, kind: Kind) -> list[str]:
    profile = submission.profile_of(kind)
    # Else the others wait for a dead rank until their time-out, and a log loses what its file held before srun opens it.
    arguments = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus_per_task is not None:
        arguments.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun no longer takes it over from sbatch
    if profile.container_runtime == "pyxis":
        mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(submission, kind))
        arguments += [f"--container-image={profile.container}", f"--container-mounts={mounts}"]
        arguments.append(f"--container-workdir={submission.working_directory}")
    return arguments


def python(submission: Submission, kind: Kind) -> str:
    """The words of the shell that start a task's Python, in its container if it has one."""
    profile = submission.profile_of(kind)
    if profile.container is None:
        return shlex.quote(sys.executable)
    words = [profile.container_python]
    if profile.container_runtime == "apptainer":
        gpus = ["--nv"] if profile.gpus_per_node else []
        mounts = [f"--bind={mount}" for mount in _mounts(submission, kind)]
        words = ["apptainer", "exec", *gpus, f"--pwd={submission.working_directory}", *mounts, profile.container, *words]
    return shlex.join(words)


def _mounts(submission: Submission, kind: Kind) -> list[str]:
    return [str(submission.working_directory), str(submission.run), *submission.profile_of(kind).container_mounts]


def _teardown(submission: Submission, kind: Kind) -> list[str]:
    """The end of the batch script, outside any container: what starts the job again when its tasks could not."""
    rescue = [sys.executable, "-m", "simclr_dist.launch.slurm.rescue", "--kind", kind]
    rescue += ["--max-restarts", str(submission.profile_of(kind).max_restarts), str(submission.run)]
    return ["code=$?", f"exec {shlex.join(rescue)} $code"]
