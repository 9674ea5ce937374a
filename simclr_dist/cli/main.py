"""The verbs of `simclr-dist`; the only place, with `__main__` blocks, that exits.

Exit codes are in `manual.EXIT_CODES`. Nothing here imports torch before the arguments, the config and the data have been
checked.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from simclr_dist.cli import manual
from simclr_dist.cli.completion import SHELLS, complete, script
from simclr_dist.config.arguments import at_least
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits
from simclr_dist.convert import options as shard_options
from simclr_dist.evaluate import command as evaluate_command
from simclr_dist.evaluate import embed_options
from simclr_dist.evaluate import finetune_options as finetune_command
from simclr_dist.evaluate.options import add_arguments as add_evaluate_arguments
from simclr_dist.launch.rendezvous import Nodes
from simclr_dist.launch.slurm import command as submit_command
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.check.findings import NAMES as CHECKS
from simclr_dist.preflight.check.findings import OF_A_CONFIG
from simclr_dist.preflight.plan import options as plan_options
from simclr_dist.system import signals, stdout
from simclr_dist.system.errors import ConfigError, OutputError, UserError
from simclr_dist.train.profiling import take_profile

_INTERRUPTED, _READER_GONE = 130, 141  # as a shell has it: 128 and SIGINT, 128 and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    try:
        with stdout.checked():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        return _READER_GONE
    except OutputError as error:
        return _refused(error)


def _run(arguments: list[str]) -> int:
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
        return _refused(error)
    except KeyboardInterrupt:
        print(f"simclr-dist: {manual.interrupted(known.verb)}", file=sys.stderr)
        return _INTERRUPTED
    return code


def _refused(error: UserError) -> int:
    print(f"simclr-dist: {error}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage; and takes no abbreviations, since it lets unknown options pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def print_help(self, file: Any = None) -> None:
        """argparse's own passes over a closed pipe."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"simclr-dist: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from simclr_dist.system.version import describe

        print(describe())
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, option: str | None = None
    ) -> NoReturn:
        print(script(shell))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("simclr-dist", description="Distributed large-batch SimCLR on WebDataset shards.")
    parser.add_argument("--version", action=_Version, nargs=0, help="this program's version, and what it runs on")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="a script: source <(simclr-dist --print-completion bash)",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    demo = verbs.add_parser("demo", help="first run: generate a small data set, train on it, show what was learned")
    demo.add_argument("--folder", default="runs/demo", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights, order and views (default: %(default)s)")
    demo.add_argument("--processes", type=at_least(1), default=2, help="training processes (default: %(default)s)")
    demo.set_defaults(run=_demo)

    shard = verbs.add_parser(
        "shard",
        help="turn images into shards; --index tars of others, --verify shards",
        description=shard_options.DESCRIPTION,
        epilog=shard_options.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shard_options.add_arguments(shard)
    shard.set_defaults(run=lambda arguments, _: shard_options.run(arguments))

    train = verbs.add_parser("train", help="pre-train an encoder (resumes by itself)", add_help=False)
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("-h", "--help", action="store_true", help="every setting, with its value in CONFIG")
    train.add_argument("--processes", type=at_least(1), help="ranks on this machine (default: one a GPU, or 1)")
    train.add_argument("--nnodes", type=_nodes, help="machines, N or MIN:MAX; the same command runs on each of them")
    train.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="with --nnodes: of the machine where they meet")
    train.add_argument(
        "--max-restarts", type=at_least(0), default=3, help="starts in a row without a new checkpoint before giving up (3)"
    )
    train.add_argument("--profile", metavar="STEPS", help="trace 3 steps (or 10:13: 10 to 12) into RUN/profile, with a table")
    train.add_argument("--profile-rank", default=None, metavar="R", help="with --profile: the rank, or all (default: 0)")
    train.set_defaults(run=_train, options=train)

    evaluate = verbs.add_parser("eval", help="measure an encoder: kNN and linear probe beside baselines")
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=lambda arguments, _: evaluate_command.run(arguments))

    finetune = verbs.add_parser("finetune", help="train an encoder further with labels, all or a part of them")
    finetune_command.add_arguments(finetune)
    finetune.set_defaults(run=lambda arguments, _: finetune_command.run(arguments))

    embed = verbs.add_parser("embed", help="write an encoder's features of your own images to a Parquet file")
    embed_options.add_arguments(embed)
    embed.set_defaults(run=lambda arguments, _: embed_options.run(arguments))

    export = verbs.add_parser("export", help="write an encoder as ONNX, tried against torch")
    export.add_argument("encoder", metavar="ENCODER", help="RUN/encoders/step-XXXXXXXX.safetensors")
    export.add_argument("out", metavar="OUT.onnx", help="file to write; an older one is replaced")
    export.add_argument("--layer", default="h", help="what comes out: h, z, or projector.N (default: %(default)s)")
    export.set_defaults(run=_export)

    submit = verbs.add_parser("submit", help="train on a SLURM cluster; submit status | logs | cancel | resume RUN")
    submit_command.add_arguments(submit)
    submit.set_defaults(run=submit_command.run)

    plan = verbs.add_parser("plan", help="what a config will need, before it runs")
    plan_options.add_arguments(plan)
    plan.set_defaults(run=plan_options.run)

    check = verbs.add_parser("check", help="try what training needs on these machines (also under torchrun or srun)")
    check.add_argument(
        "config", nargs="?", help="YAML file whose model, shards and folder are checked (default: a small model)"
    )
    check.add_argument("--only", choices=CHECKS, help="one check instead of all")
    check.add_argument("--processes", type=at_least(1), help="ranks on this machine (default: one a GPU, or 2)")
    check.set_defaults(run=_check)
    manual.fill_in(parser, verbs.choices)
    if "_ARGCOMPLETE" in os.environ:
        complete(parser, verbs.choices)
    return parser


def _nodes(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of machines nor MIN:MAX")
    return int(least), int(most)


def _demo(arguments: argparse.Namespace, _: list[str]) -> int:
    from simclr_dist.preflight.demo.run import run_demo

    return run_demo(Path(arguments.folder), seed=arguments.seed, processes=arguments.processes)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.help:
        return _train_help(arguments.config, arguments.options)
    if arguments.config is None:
        raise ConfigError("usage: simclr-dist train CONFIG [--processes N] [--key value ...]; --help lists every setting")
    given = {"--profile": arguments.profile, "--profile-rank": arguments.profile_rank}
    profile, _ = take_profile([f"{name}={value}" for name, value in given.items() if value is not None])
    signals.listen()  # torch may be imported to count GPUs: seconds in which a signal would be the end
    options = [name.removeprefix("--").replace("-", "_") for name in arguments.options._option_string_actions if len(name) > 2]
    config = load_config(arguments.config, overrides, options=options)
    nodes = _meeting(arguments, config)
    samples = _check_run(config, (arguments.processes or 1) * (nodes.least if nodes else 1), held=nodes is not None)

    processes = arguments.processes or _gpus(config)
    for machines in range(nodes.least, nodes.most + 1) if nodes else (1,):
        check_fits(config, samples, machines * processes)
    _tell_start(processes)
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
    from simclr_dist.run.folder import check_run_folder

    check_run_folder(config, held=held)
    samples = _count_images(config)
    check_fits(config, samples, world_size)
    return samples


def _count_images(config: Config) -> int:
    from simclr_dist.data.collection import find_tars, load_collection

    if config.data.samples is not None:
        find_tars(config.data.shards, allow_pipe=config.data.allow_pipe)
        return config.data.samples
    return len(load_collection(config.data.shards))


def _gpus(config: Config) -> int:
    if config.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _tell_start(processes: int) -> None:
    """To somebody who waits: nothing else is said for as long as torch takes."""
    if sys.stderr.isatty():
        print(f"starting {processes} process{'es' * (processes > 1)}; loading torch takes a while", file=sys.stderr)


def _train_help(config: str | None, options: argparse.ArgumentParser) -> int:
    import tyro

    defaults = load_config(config) if config else Config()
    plain = (tyro.conf.FlagConversionOff,)
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(Config, default=defaults, args=["--help"], prog="simclr-dist train CONFIG", config=plain)
    top, _, settings = written.getvalue().partition("show this help message and exit")  # the first of its options
    options.usage = "simclr-dist train CONFIG [options] [--key value ...]"
    last, options.epilog = options.epilog, None
    print(options.format_help())
    print("Settings, as YAML keys or --key value, the value as in YAML (true, null, '[0.2, 1.0]').")
    print(f"The defaults shown are {f'what {config} says' if config else 'those of an empty config'}.\n")
    print("\n".join(line.rstrip() for line in (settings or top).splitlines()).strip("\n"), last, sep="\n\n")
    return 0


def _export(arguments: argparse.Namespace, _: list[str]) -> int:
    with signals.blocked():  # torch's import passes over what a signal raises
        from simclr_dist.encoder.onnx import export_onnx

    difference = export_onnx(arguments.encoder, arguments.out, arguments.layer)
    print(f"written: {arguments.out}; ONNX Runtime's output differs from torch's by {difference:.1e} of the largest")
    return 0


def _check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if overrides and arguments.config is None:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.only in OF_A_CONFIG and arguments.config is None:
        raise ConfigError(f"--only {arguments.only}: has nothing to look at without a CONFIG, which names it")
    config = load_config(arguments.config, overrides) if arguments.config else None
    only = ["--only", arguments.only] if arguments.only else []
    command = ["-m", "simclr_dist.preflight.check", *([arguments.config] if arguments.config else []), *only, *overrides]
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # a task of srun
        import submitit

        from simclr_dist.launch.slurm.job import rank_variables

        os.environ["SUBMITIT_EXECUTOR"] = "slurm"  # which submitit's own jobs have, and by which it knows where it is
        os.environ |= rank_variables(submitit.JobEnvironment())
    if "WORLD_SIZE" in os.environ:  # already under torchrun
        from simclr_dist.preflight.check.command import main as check_main

        return check_main(command[2:])
    processes = arguments.processes or max(2, _gpus(config or Config()))
    _tell_start(processes)
    return torchrun(processes, command)
