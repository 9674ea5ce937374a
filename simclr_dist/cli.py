"""The verbs of `simclr-dist`; the only place, with `__main__` blocks, that exits.

Exit codes: 0 done, 1 crash, 2 usage, config or data error, 3 diverged, 75 stopped with all saved. Nothing here imports
torch before the arguments, the config and the data have been checked.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from simclr_dist import __version__, stopping
from simclr_dist.config import Config, check_fits, load_config
from simclr_dist.errors import ConfigError, UserError
from simclr_dist.evaluate import command as evaluate_command
from simclr_dist.evaluate import embed_options
from simclr_dist.evaluate import finetune_options as finetune_command
from simclr_dist.evaluate.options import add_arguments as add_evaluate_arguments
from simclr_dist.launcher import torchrun
from simclr_dist.profiling import take_profile
from simclr_dist.rendezvous import Nodes
from simclr_dist.slurm import command as submit_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(known, "config"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.verb is None:
        parser.print_help()
        return 2
    try:
        code: int = known.run(known, rest)
    except UserError as error:
        print(f"simclr-dist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("simclr-dist: interrupted", file=sys.stderr)
        return 130
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage; and takes no abbreviations, since it lets unknown options pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"simclr-dist: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("simclr-dist", description="Distributed large-batch SimCLR on WebDataset shards.")
    parser.add_argument("--version", action="version", version=f"simclr-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    demo = verbs.add_parser("demo", help="first run: generate a small data set, train on it, show what was learned")
    demo.add_argument("--folder", default="runs/demo", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, order and views (default: %(default)s)")
    demo.add_argument("--processes", type=_at_least(1), default=2, help="training processes (default: %(default)s)")
    demo.set_defaults(run=_demo)

    shard = verbs.add_parser("shard", help="turn images into shards", description=_SHARD)
    shard.add_argument("source", help="ImageFolder, flat folder of images, Parquet file or folder of them")
    shard.add_argument("destination", help="folder to write; must not exist")
    shard.add_argument("--shard-size", type=_at_least(1), default=1000, help="images a shard (default: %(default)s)")
    shard.add_argument("--seed", type=_at_least(0), default=0, help="of the shuffle and the split (default: %(default)s)")
    shard.add_argument("--short-side", type=_at_least(8), help="shrink images to this short side in pixels")
    shard.add_argument(
        "--quality", type=_at_least(1), default=95, help="JPEG quality of re-encoded images (default: %(default)s)"
    )
    shard.add_argument("--split", help="like 0.8/0.2: write DST/train and DST/test, stratified by label")
    shard.add_argument("--processes", type=_at_least(1), default=os.cpu_count(), help="(default: all cores)")
    shard.add_argument("--strict", action="store_true", help="refuse when a file is not an image, instead of leaving it out")
    shard.set_defaults(run=_shard)

    train = verbs.add_parser("train", help="pre-train an encoder (resumes by itself)", add_help=False)
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("-h", "--help", action="store_true", help="every setting, with its value in CONFIG")
    train.add_argument("--processes", type=_at_least(1), help="ranks on this machine (default: one a GPU, or 1)")
    train.add_argument("--nnodes", type=_nodes, help="machines, N or MIN:MAX; the same command runs on each of them")
    train.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="with --nnodes: of the machine where they meet")
    train.add_argument(
        "--max-restarts", type=_at_least(0), default=3, help="starts in a row without a new checkpoint before giving up (3)"
    )
    train.add_argument("--profile", metavar="STEPS", help="trace 3 steps (or 10:13: 10 to 12) into RUN/profile, with a table")
    train.add_argument("--profile-rank", default=None, metavar="R", help="with --profile: the rank, or all (default: 0)")
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("eval", help="measure an encoder: kNN and linear probe beside baselines")
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=lambda arguments, _: evaluate_command.run(arguments))

    finetune = verbs.add_parser("finetune", help="train an encoder further with labels, all or a part of them")
    finetune_command.add_arguments(finetune)
    finetune.set_defaults(run=lambda arguments, _: finetune_command.run(arguments))

    embed = verbs.add_parser("embed", help="write an encoder's features of your own images to a Parquet file")
    embed_options.add_arguments(embed)
    embed.set_defaults(run=lambda arguments, _: embed_options.run(arguments))

    export = verbs.add_parser("export", help="write an encoder as ONNX, tried against torch (pip install 'simclr_dist[onnx]')")
    export.add_argument("encoder", metavar="ENCODER", help="RUN/encoders/step-XXXXXXXX.safetensors")
    export.add_argument("out", metavar="OUT.onnx", help="file to write; an older one is replaced")
    export.add_argument("--layer", default="h", help="what comes out: h, z, or projector.N (default: %(default)s)")
    export.set_defaults(run=_export)

    submit = verbs.add_parser("submit", help="train on a SLURM cluster; submit status | logs | cancel | resume RUN")
    submit_command.add_arguments(submit)
    submit.set_defaults(run=submit_command.run)

    plan = verbs.add_parser("plan", help="what a config will need, before it runs")
    plan.add_argument("config", help="YAML file")
    plan.add_argument("--processes", type=_at_least(1), default=1, help="ranks in all (default: %(default)s)")
    plan.add_argument("--samples", type=_at_least(1), help="images in the data set, when its shards are not here")
    plan.set_defaults(run=_plan)

    check = verbs.add_parser("check", help="prove on these machines that training is exact (also under torchrun)")
    check.add_argument("config", nargs="?", help="YAML file whose model is checked (default: a small one)")
    check.add_argument("--only", choices=["gradient"], default="gradient", help="the check to run (default: %(default)s)")
    check.add_argument("--processes", type=_at_least(1), help="ranks on this machine (default: one a GPU, or 2)")
    check.set_defaults(run=_check)
    return parser


_SHARD = """Write WebDataset tars and a Parquet manifest. Every image is decoded once; what is not an image is listed with its
reason and left out. The same input and seed give the same bytes."""


def _at_least(least: int) -> "type[int]":
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: the least is {least}")
        return value

    parse.__name__ = "int"  # argparse names it in its message
    return parse  # type: ignore[return-value]


def _nodes(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of machines nor MIN:MAX")
    return int(least), int(most)


def _demo(arguments: argparse.Namespace, _: list[str]) -> int:
    from simclr_dist.demo import run_demo

    return run_demo(Path(arguments.folder), seed=arguments.seed, processes=arguments.processes)


def _shard(arguments: argparse.Namespace, _: list[str]) -> int:
    from simclr_dist.data.shards import write_shards

    split = None
    if arguments.split is not None:
        try:
            split = tuple(float(part) for part in arguments.split.split("/"))
        except ValueError:
            split = ()
        if len(split) != 2 or min(split) <= 0 or abs(sum(split) - 1) > 1e-9:
            raise ConfigError(f"--split: {arguments.split!r} is not two shares that add up to 1, like 0.8/0.2")
    summary = write_shards(
        arguments.source,
        arguments.destination,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        short_side=arguments.short_side,
        quality=arguments.quality,
        split=split,
        processes=arguments.processes,
        strict=arguments.strict,
        progress=True,
    )
    print(
        f"{summary.written} images in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB, {len(summary.classes)} classes"
    )
    print(f"{summary.converted} re-encoded, {summary.duplicates} duplicates kept, {len(summary.skipped)} files were no images")
    for problem in summary.rejected[:10]:
        print(f"left out: {problem.name}: {problem.reason}")
    if summary.rejected:
        print(f"left out: {len(summary.rejected)} in all, listed in {Path(arguments.destination) / 'rejected.jsonl'}")
    print(f"written to {', '.join(map(str, summary.destinations))}")
    return 0


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.help:
        return _train_help(arguments.config)
    if arguments.config is None:
        raise ConfigError("usage: simclr-dist train CONFIG [--processes N] [--key value ...]; --help lists every setting")
    given = {"--profile": arguments.profile, "--profile-rank": arguments.profile_rank}
    profile, _ = take_profile([f"{name}={value}" for name, value in given.items() if value is not None])
    stopping.listen()  # torch may be imported to count GPUs: seconds in which a signal would be the end
    config = load_config(arguments.config, overrides)
    nodes = _meeting(arguments, config)
    samples = _check_run(config, (arguments.processes or 1) * (nodes.least if nodes else 1), held=nodes is not None)

    processes = arguments.processes or _gpus(config)
    for machines in range(nodes.least, nodes.most + 1) if nodes else (1,):
        check_fits(config, samples, machines * processes)
    command = ["-m", "simclr_dist.train", arguments.config, *(profile.options if profile else []), *overrides]
    return torchrun(processes, command, Path(config.run_folder), nodes=nodes, max_restarts=arguments.max_restarts)


def _meeting(arguments: argparse.Namespace, config: Config) -> Nodes | None:
    """Where the machines of a run meet; None for one machine."""
    if arguments.nnodes is None:
        if arguments.rdzv_endpoint is not None:
            raise ConfigError("--rdzv-endpoint goes with --nnodes: say how many machines there are")
        return None
    if arguments.rdzv_endpoint is None:
        raise ConfigError("--nnodes needs --rdzv-endpoint HOST:PORT: one of the machines, and a free port there")
    least, most = arguments.nnodes
    return Nodes(least, most, arguments.rdzv_endpoint, config.first_step_timeout_minutes)


def _check_run(config: Config, world_size: int, *, held: bool) -> int:
    """Everything that can be refused before a process starts; returns the number of images.

    `held`: the run may be in use, by the machines that this one joins.
    """
    from simclr_dist.data.manifest import load_manifest
    from simclr_dist.run import check_run_folder

    check_run_folder(config, held=held)
    samples = len(load_manifest(config.data.shards))
    check_fits(config, samples, world_size)
    return samples


def _gpus(config: Config) -> int:
    if config.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _train_help(config: str | None) -> int:
    import tyro

    defaults = load_config(config) if config else Config()
    print("usage: simclr-dist train CONFIG [--processes N] [--profile STEPS] [--key value ...]\n")
    print("Settings, as YAML keys or --key value, the value as in YAML (true, null, '[0.2, 1.0]'):\n")
    plain = (tyro.conf.FlagConversionOff,)
    tyro.cli(Config, default=defaults, args=["--help"], prog="simclr-dist train CONFIG", add_help=True, config=plain)
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    from simclr_dist.onnx_export import export_onnx

    difference = export_onnx(arguments.encoder, arguments.out, arguments.layer)
    print(f"written: {arguments.out}; ONNX Runtime's output differs from torch's by {difference:.1e} of the largest")
    return 0


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from simclr_dist.plan import plan

    print(plan(load_config(arguments.config, overrides), world_size=arguments.processes, samples=arguments.samples))
    return 0


def _check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if overrides and arguments.config is None:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}")
    config = load_config(arguments.config, overrides) if arguments.config else None
    command = ["-m", "simclr_dist.check", *([arguments.config] if arguments.config else []), *overrides]
    if "WORLD_SIZE" in os.environ:  # already under torchrun
        from simclr_dist.check import main as check_main

        return check_main(command[2:])
    return torchrun(arguments.processes or max(2, _gpus(config or Config())), command)


if __name__ == "__main__":
    sys.exit(main())
