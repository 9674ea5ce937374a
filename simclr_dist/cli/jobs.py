"""Run `submit shard`, `submit embed` and `submit eval`. The verb becomes SLURM jobs, in parts or on many ranks."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.cli import embed, eval, shard
from simclr_dist.cli.options import Parser, settings_from
from simclr_dist.convert.settings import ShardSettings
from simclr_dist.convert.shards import parts_left
from simclr_dist.data.collection import load_collection
from simclr_dist.encoder.names import check_is_file
from simclr_dist.launch.slurm import batch
from simclr_dist.launch.slurm.profile import Profile, load_profile
from simclr_dist.launch.slurm.submission import check_paths, submit_work
from simclr_dist.launch.slurm.work import Work
from simclr_dist.system.errors import ConfigError, say


def submit(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Check the verb's options as the verb does, then submit it. Return the exit code. Raises UserError."""
    verb, parts, place = arguments.config, arguments.parts, Path.cwd()
    given = {name: getattr(arguments, name) for name in ("labels", "train", "val", "test")}  # options of submit and of eval
    words = [*rest, *(word for name, value in given.items() if value is not None for word in (f"--{name}", value))]
    parser = Parser(f"simclr-dist {verb}", allow_abbrev=False)
    {"shard": shard, "embed": embed, "eval": eval}[verb].add_arguments(parser)
    typed = parser.parse_args(words)
    for name in ("profile", *["parts"] * (verb == "shard")):
        if getattr(arguments, name) is None:
            raise ConfigError(f"--{name}: is missing; `simclr-dist submit --help` has examples")
    if verb == "shard" and typed.destination is None:
        raise ConfigError("usage: simclr-dist submit shard SRC DST --parts N --profile FILE")
    paths = (arguments.profile, arguments.finish_profile or arguments.profile)
    profile, last = (load_profile(path, allow_setup=arguments.allow_setup) for path in paths)
    left: list[int] | None = []
    if verb == "shard":
        shard.refuse_others(typed, "parts")
        left = parts_left(typed.source, typed.destination, settings_from(ShardSettings, typed), parts)
    if left is None:
        print(f"{typed.destination}: was done already, with the same settings from the same files; nothing is submitted")
        return 0
    if verb == "shard" and arguments.dry_run and len(left) < parts:
        say(f"{len(left)} of {parts} parts have images that are not converted yet")
    product = (Path(typed.destination) if verb == "shard" else _checked(verb, typed)).absolute()
    tasks = {part: Work(verb, words, product, profile, place, ["--part", f"{part}/{parts}", *_cores(profile)]) for part in left}
    work = Work(verb, words, product, last, place, ["--finish", *_cores(last)] if verb == "shard" else ())
    check_paths(profile, "what the jobs write", product, place)
    if arguments.dry_run:
        print(batch.dry_run_work(tasks, work), end="")
        return 0
    *array, job = submit_work(tasks, work)
    for number in array:
        print(f"job {number}: part {', '.join(map(str, tasks))} of {parts}, {profile.cpus_per_task or 1} cores each")
    print(f"job {job}: {product}, {last.nodes} x {last.tasks} ranks" + (f", once job {array[0]} is done" if array else ""))
    print(f"next: simclr-dist submit status {shlex.quote(str(product))}")
    return 0


def _cores(profile: Profile) -> list[str]:
    """Return the option by which a part takes its cores alone. Raises ConfigError where it would get more than one rank."""
    if profile.world_size > 1 or profile.gpus_per_node:
        wanted = f"nodes: {profile.nodes}, tasks_per_node: {profile.tasks}, gpus_per_node: {profile.gpus_per_node}"
        raise ConfigError(f"profile: {wanted}: a part is one process without GPU; set 1, 1, 0 and cpus_per_task")
    return ["--processes", str(profile.cpus_per_task or 1)]


def _checked(verb: str, typed: argparse.Namespace) -> Path:
    """Check what needs no torch. Return the file that `embed` or `eval` writes."""
    if verb == "embed":
        return embed.checked(typed)[-1]
    if typed.watch is not None:
        raise ConfigError("--watch: `simclr-dist submit CONFIG --eval` evaluates what a run exports")
    foreign, _, path = eval.checked(typed)
    if foreign:
        check_is_file(foreign.weights)
    for shards in (typed.train, typed.val, typed.test):
        if shards is not None:
            load_collection(shards, beside=Path.cwd())
    return path
