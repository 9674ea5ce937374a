"""Write the batch scripts of a run that has been checked."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.launch.slurm.job import Job
from simclr_dist.launch.slurm.profile import PASSED_ON, Profile
from simclr_dist.launch.slurm.requeue import Kind
from simclr_dist.train.profiling import Profile as StepProfile


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that follows a run."""

    train: str  # shards that kNN and the probe learn from
    test: str  # shards that the accuracy is measured on
    profile: Profile


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
            shards = ["--train", self.evaluation.train, "--test", self.evaluation.test]
            command = ["simclr_dist.evaluate", "--watch", str(self.run), *shards]
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


def script(submission: Submission, kind: Kind, *, after: str | None = None) -> str:
    """Return the batch script of a job. An evaluation's job starts once job `after` is done."""
    profile = submission.profile_of(kind)
    options = sorted(_options(submission, kind, after).items())
    flags = [f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    # Outside any container: it starts the job again when its tasks could not.
    rescue = [sys.executable, "-m", "simclr_dist.launch.slurm.rescue", "--kind", kind]
    rescue += ["--max-restarts", str(profile.max_restarts), str(submission.run)]
    sections = [
        ["#!/bin/bash"],
        ["# options", *(f"#SBATCH {flag}" for flag in flags)],
        ["# setup", *profile.setup, *exports],
        ["# tasks", "export SUBMITIT_EXECUTOR=slurm PYTHONSAFEPATH=1", shlex.join(_tasks(submission, profile))],
        ["# end", "code=$?", f"exec {shlex.join(rescue)} $code"],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _options(submission: Submission, kind: Kind, after: str | None) -> dict[str, object]:
    """Return sbatch's options by their long names. True stands for an option without a value."""
    profile = submission.profile_of(kind)
    options: dict[str, object] = {
        "job-name": submission.run.name + ("-eval" if kind == "eval" else ""),
        "chdir": submission.working_directory,
        "output": submission.folder / "%j_0_log.out",
        "error": submission.folder / "%j_0_log.err",
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


def _tasks(submission: Submission, profile: Profile) -> list[str]:
    """Return the shell words that start the tasks. Tasks with a container start in it."""
    folder, where = submission.folder, submission.working_directory
    words = ["srun", "--unbuffered", "--output", f"{folder}/%j_%t_log.out", "--error", f"{folder}/%j_%t_log.err"]
    # Else the others wait for a dead rank until their time-out, and a log loses what its file held before srun opens it.
    words += ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus_per_task is not None:
        words.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun no longer takes it over from sbatch
    mounts = [str(where), str(submission.run), *profile.container_mounts]
    if profile.container_runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        words += [f"--container-image={profile.container}", f"--container-mounts={pairs}", f"--container-workdir={where}"]
    elif profile.container is not None:
        gpus = ["--nv"] if profile.gpus_per_node else []
        words += ["apptainer", "exec", *gpus, f"--pwd={where}", *(f"--bind={mount}" for mount in mounts), profile.container]
    words.append(sys.executable if profile.container is None else profile.container_python)
    # submitit's own scripts start a task by this module too; it has no public name.
    return [*words, "-u", "-m", "submitit.core._submit", str(folder)]
