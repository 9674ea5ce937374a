"""Run the verb `submit`: send a config to SLURM as a job. Or show, follow, cancel and resume the job of a run folder."""

import argparse
import dataclasses
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.cli import eval
from simclr_dist.cli.options import Parser, at_least, settings_from
from simclr_dist.config.strict_yaml import pairs
from simclr_dist.config.sweep import read_sweep
from simclr_dist.encoder.names import newest_encoder, result_path
from simclr_dist.evaluate.settings import Settings
from simclr_dist.launch.slurm import scheduler
from simclr_dist.launch.slurm.logs import tails
from simclr_dist.launch.slurm.profile import Profile, load_profile, profile_from_dict, refuse_programs
from simclr_dist.launch.slurm.requeue import jobs_folder
from simclr_dist.run.status import record_event
from simclr_dist.run.sweep import check_sweep_folder, why_left
from simclr_dist.system.errors import ConfigError, say
from simclr_dist.system.files import write_atomically
from simclr_dist.train.profiling import parse_profile

if TYPE_CHECKING:  # pyarrow and submitit, which --help need not wait for
    from simclr_dist.launch.slurm.batch import Evaluation, Submission

HELP = "train on a SLURM cluster, or shard, embed, eval; submit status | logs | cancel | resume RUN"

ACTIONS = ("status", "logs", "cancel", "resume")
VERBS = ("shard", "embed", "eval")
_OF_EVAL = ("train", "val", "test", "labels")
_OF_JOBS = {"profile", "dry_run", "allow_setup", "eval", *_OF_EVAL, "eval_profile", "profile_steps", "profile_rank"}
# What each form takes.
_OPTIONS = {
    "submit": {"local", "sweep", *_OF_JOBS},
    "resume": _OF_JOBS,
    "shard": {"profile", "dry_run", "allow_setup", "parts", "finish_profile"},
    "embed": {"profile", "dry_run", "allow_setup"},
    "eval": {"profile", "dry_run", "allow_setup", *_OF_EVAL},
    "logs": {"follow", "eval"},
    "status": set(),
    "cancel": set(),
}
_FOLLOW_SECONDS = 5.0  # between two questions whether a job has ended

USAGE = """simclr-dist submit CONFIG --profile FILE [--dry-run | --local] [--profile-steps STEPS] [--sweep KEY=V,V]
                          [--eval --train SHARDS [--val SHARDS] --test SHARDS [--labels SHARES]] [--key value ...]
       simclr-dist submit shard SRC DST --parts N --profile FILE [--finish-profile FILE] [options of shard]
       simclr-dist submit embed | eval ... --profile FILE [options of that verb]
       simclr-dist submit status | logs [-f] | cancel RUN, or what the jobs write; submit resume RUN"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist submit`. `run` takes what they leave: the run folder and settings."""
    parser.usage = USAGE
    add = parser.add_argument
    add("config", metavar="CONFIG", nargs="?", help="YAML file; or shard, embed, eval; or status, logs, cancel, resume")
    add("--profile", metavar="FILE", help="what is asked of SLURM (examples: launch/profiles)")
    add("--dry-run", action="store_true", help="show the batch script and the resolved config; needs no SLURM")
    add("--local", action="store_true", help="run the same job on this machine, with the profile's ranks of one node, or one")
    add("--eval", action="store_true", help="add a job that evaluates the run's encoders; with logs: that job's")
    add("--train", metavar="SHARDS", help="with --eval: labelled shards that kNN and the probe learn from")
    add("--val", metavar="SHARDS", help="with --eval: labelled shards that choose what eval leaves open")
    add("--test", metavar="SHARDS", help="with --eval: labelled shards that the accuracy is measured on")
    add("--labels", metavar="SHARES", help="with --eval: shares of the training labels, like 0.01/0.1/1")
    add("--eval-profile", metavar="FILE", help="with --eval: its own profile (default: one rank's share of the training's)")
    add(
        "--allow-setup",
        action="store_true",
        help="trust a profile whose set-up lines, container, variables or options may run programs",
    )
    add("--profile-steps", metavar="STEPS", help="train's --profile: trace 3 steps of each start (or 10:13) into RUN/profile")
    add("--profile-rank", metavar="R", help="with --profile-steps: the rank, or all (default: 0)")
    add("--sweep", action="append", metavar="KEY=V,V", help="a run for each value, as one job array; more give all pairs")
    add("--parts", type=at_least(1), metavar="N", help="with shard: tasks of the job array, each with a part of the images")
    add("--finish-profile", metavar="FILE", help="with shard: profile of the job that writes the tars (default: the same)")
    add("-f", "--follow", action="store_true", help="with logs: go on until the job has ended")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Do what the command line says; return the exit code. Raises UserError."""
    if arguments.config is None:
        raise ConfigError("usage: simclr-dist submit CONFIG --profile FILE, or submit status RUN; --help says more")
    action = arguments.config if arguments.config in (*ACTIONS, *VERBS) else "submit"
    for option in sorted(set.union(*_OPTIONS.values()) - _OPTIONS[action]):
        if getattr(arguments, option):
            raise ConfigError(f"--{option.replace('_', '-')}: has no effect on {action}; leave it out")
    if action == "submit":
        return _submit(arguments, rest)
    if action in VERBS:
        from simclr_dist.cli import jobs

        return jobs.submit(arguments, rest)
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"submit {action}: which run? Its folder comes next: simclr-dist submit {action} RUN")
    folder, overrides = Path(rest[0]).absolute(), rest[1:]
    folder = next((one for one in (folder, jobs_folder(folder)) if (one / "submission.json").exists()), folder)
    if action == "resume":
        return _resume(arguments, folder, overrides)
    if overrides:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}")
    from simclr_dist.launch.slurm.submission import read_record

    record = read_record(folder)
    if action == "logs":
        return _logs(folder, record, evaluation=arguments.eval, follow=arguments.follow)
    scheduler.require("squeue", "scancel")
    if action == "cancel":
        return _cancel(folder, record)
    from simclr_dist.launch.slurm.status import describe

    print(describe(folder, record))
    return 0


def _submit(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from simclr_dist.launch.slurm.submission import prepare

    if arguments.sweep and arguments.local:
        raise ConfigError("--sweep: contradicts --local; `simclr-dist train --sweep` trains the runs here, one after another")
    if arguments.dry_run and arguments.local:
        raise ConfigError("--dry-run: contradicts --local; take one of the two")
    if arguments.profile is not None:
        if re.fullmatch(r"\d+(:\d+)?", arguments.profile) and not Path(arguments.profile).exists():
            raise ConfigError(f"--profile: {arguments.profile!r}: names what is asked of SLURM; steps go to --profile-steps")
        profile = load_profile(arguments.profile, allow_setup=arguments.allow_setup or arguments.local)
    elif arguments.local:
        profile = Profile(gpus_per_node=0)
    else:
        raise ConfigError("--profile: is missing; it names a file like those in launch/profiles")
    if arguments.local:
        unused: dict[str, Any] = {"nodes": 1, "setup": (), "container": None, "extra": {}}
        for key, value in unused.items():
            if getattr(profile, key) != value:
                say(f"--local leaves out {key}: {getattr(profile, key)!r}")
        profile = dataclasses.replace(profile, **unused, container_runtime=None, container_mounts=())
        if not arguments.allow_setup:
            refuse_programs(profile, str(arguments.profile))
    evaluation = _evaluation(arguments, profile, None)
    profiled = parse_profile(arguments.profile_steps, arguments.profile_rank, option="--profile-steps")
    if arguments.sweep:
        return _submit_sweep(arguments, overrides, partial(prepare, profile=profile, evaluation=evaluation, profiled=profiled))
    submission = prepare(arguments.config, overrides, profile, evaluation=evaluation, profiled=profiled)
    if arguments.local:
        from simclr_dist.launch.slurm.local import run_here

        return run_here(submission)
    return _send(submission, dry_run=arguments.dry_run)


def _submit_sweep(arguments: argparse.Namespace, overrides: Sequence[str], prepare: "Callable[..., Submission]") -> int:
    """Submit what is left of a sweep as one array.

    Raises ConfigError for any of its runs before a job is queued. Where nothing is left, it prints the table of its runs.
    """
    from simclr_dist.launch.slurm.batch import dry_run_array
    from simclr_dist.launch.slurm.submission import check_device, refuse_if_alive, submit_array

    members = read_sweep(arguments.config, overrides, arguments.sweep)
    folder, submissions = Path(members[0].config.run_folder).absolute().parent, []
    check_sweep_folder(folder)
    for member in members:
        encoder = newest_encoder(folder / member.name) if arguments.eval else None
        why = why_left(member.config, evaluated=encoder is None or result_path(encoder).exists())
        if why is None and not arguments.dry_run:
            try:
                refuse_if_alive(folder / member.name)
            except ConfigError as error:
                why = f"left alone: {error}"
        if why:
            print(f"{member.name}: {why}")
            continue
        with member.named():
            submissions.append(prepare(arguments.config, member.overrides))
            check_device(submissions[-1])
    if submissions and arguments.dry_run:
        print(dry_run_array(folder, submissions), end="")
    elif submissions:
        jobs = submit_array(folder, submissions)
        ranks = f"{submissions[0].profile.nodes} x {submissions[0].profile.tasks} ranks"
        for number, one in enumerate(submissions):
            print(f"job {jobs[0]}_{number}: {one.run}, {ranks}" + (f"; then job {jobs[1]}_{number}" if len(jobs) > 1 else ""))
        print(f"next: simclr-dist runs {shlex.quote(str(folder))}; `scancel {' '.join(jobs)}` would end all of them")
    else:
        from simclr_dist.evaluate.compare import compare, table

        print(table(compare([folder])))
    return 0


def _resume(arguments: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> int:
    from simclr_dist.launch.slurm.submission import prepare, read_record

    record, where = read_record(folder), folder / "submission.json"
    if "tasks" in record:
        raise ConfigError(f"submit resume: is for runs; the same `submit {record['config']} ...` again sends what is left")
    if arguments.profile is None:
        profile = profile_from_dict(record["profile"], f"{where}: profile", allow_setup=arguments.allow_setup)
    else:
        profile = load_profile(arguments.profile, allow_setup=arguments.allow_setup)
    if "run_folder" in dict(pairs(overrides)):
        raise ConfigError("command line: --run-folder: a run that is resumed stays where it is")
    if not Path(record["working_directory"]).is_dir():
        raise ConfigError(f"{where}: working_directory: {record['working_directory']!r} is no more")
    evaluation = _evaluation(arguments, profile, record["evaluation"], f"{where}: evaluation")
    profiled = parse_profile(arguments.profile_steps, arguments.profile_rank, option="--profile-steps")
    submission = prepare(
        str(folder / "slurm" / "config.yaml"), overrides, profile, evaluation=evaluation, profiled=profiled,
        run=folder, working_directory=Path(record["working_directory"]),
    )  # fmt: skip
    overrides = (*record["overrides"], *overrides)
    submission = dataclasses.replace(submission, source=record["config"], overrides=overrides)
    return _send(submission, dry_run=arguments.dry_run)


def _evaluation(
    arguments: argparse.Namespace, profile: Profile, before: Mapping[str, Any] | None, where: str = ""
) -> "Evaluation | None":
    """Return the evaluation that the command line names, or else `before`."""
    from simclr_dist.launch.slurm.batch import Evaluation

    options = {name: getattr(arguments, name) for name in (*_OF_EVAL, "eval_profile")}
    given = {name: value for name, value in options.items() if value is not None}
    if not arguments.eval and before is None:
        for name in given:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect without --eval")
        return None
    shards = dict(before or {}) | given
    for name in ("train", "test"):
        if name not in shards:
            raise ConfigError(f"--eval: --{name} is missing; it names a folder of labelled shards")
    if "eval_profile" in given:
        profile = load_profile(given["eval_profile"], allow_setup=arguments.allow_setup)
    elif before is not None and arguments.profile is None:
        profile = profile_from_dict(before.get("profile", {}), f"{where}.profile", allow_setup=arguments.allow_setup)
    else:
        profile = profile.of_one_rank
    evaluation = Evaluation(shards["train"], shards["test"], profile, shards.get("val"), shards.get("labels"))
    parser = Parser("simclr-dist eval", allow_abbrev=False)
    eval.add_arguments(parser)
    settings_from(Settings, parser.parse_args(evaluation.options))  # refuses what the job would
    return evaluation


def _send(submission: "Submission", *, dry_run: bool) -> int:
    """Submit the jobs and print their numbers. With `dry_run` only print the batch scripts."""
    from simclr_dist.launch.slurm import batch
    from simclr_dist.launch.slurm.submission import check_device, submit

    check_device(submission)
    if dry_run:
        print(batch.dry_run(submission), end="")
        return 0
    jobs = submit(submission)
    print(f"job {jobs[0]}: {submission.run}, {submission.profile.nodes} x {submission.profile.tasks} ranks")
    for job in jobs[1:]:
        print(f"job {job}: its evaluation, once job {jobs[0]} is done")
    print(f"next: simclr-dist submit status {shlex.quote(str(submission.run))}")
    return 0


def _cancel(run: Path, record: Mapping[str, Any]) -> int:
    """Cancel the jobs of a run that have not ended. Raises ConfigError for a copy's, and where SLURM refuses."""
    from simclr_dist.launch.slurm.status import note_end
    from simclr_dist.launch.slurm.submission import jobs_of, original_of

    jobs = list(jobs_of(record).values())
    if origin := original_of(run, record):
        original, there = origin
        cure = f"cancel it there: `simclr-dist submit cancel {shlex.quote(str(original))}`"
        if not there:
            cure = f"which is not here; if this is that folder, moved, `scancel {' '.join(jobs)}` does it"
        raise ConfigError(f"{run}: not cancelled: job {' and '.join(jobs)} was submitted for {str(original)!r}; {cure}")
    states = dict(zip(jobs, scheduler.states(jobs), strict=True))
    for job, state in states.items():
        if state.over:
            print(f"job {job} has ended already: {state}")
    note_end(run, states)
    if not (alive := [job for job, state in states.items() if not state.over]):
        return 0
    # First: a job that is being stopped right now must not start itself again.
    write_atomically(run / "cancelled", " ".join(alive).encode() + b"\n")
    if refused := scheduler.cancel(alive):
        (run / "cancelled").unlink()
        raise ConfigError(f"{run}: not cancelled: {refused}")
    kind = "work" if "tasks" in record else "train" if record["job_id"] in alive else "eval"
    record_event(run, "cancelled", kind=kind, jobs=alive)
    resume = f"`simclr-dist submit resume {shlex.quote(str(run))}` goes on from the last save"
    print(f"cancelled: job {' and '.join(alive)}; {'the same command sends what is left' if kind == 'work' else resume}")
    return 0


def _logs(run: Path, record: Mapping[str, Any], *, evaluation: bool, follow: bool) -> int:
    """Print the log of a run's job. With `follow`, go on until the job has ended."""
    from simclr_dist.launch.slurm.submission import jobs_of

    jobs = [number for title, number in jobs_of(record).items() if (title == "evaluation") == evaluation]
    if not jobs:
        raise ConfigError(f"{run}: no evaluation was submitted; simclr-dist submit ... --eval does that")
    if follow:
        scheduler.require("squeue")
    files = [log for job in jobs for log in tails(run / "slurm", job)]
    written = [log.copy() for log in files]
    last_question, states = -math.inf, list[scheduler.JobState]()
    while follow and not (states and all(state.over for state in states)):
        if time.monotonic() - last_question >= _FOLLOW_SECONDS:
            last_question, states = time.monotonic(), scheduler.states(jobs)
        else:
            time.sleep(0.2)
        written += [log.copy() for log in files]  # after the question: a job that has ended has written all
    if not any(written):
        for job, state in zip(jobs, states or scheduler.states(jobs), strict=True):
            print(f"job {job} has written nothing: {state}", file=sys.stderr)
    return 0
