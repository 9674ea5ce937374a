"""Start `simclr-dist`: find the verb, run it, and return its exit code.

Nothing imports torch before the arguments, the config and the data have been checked.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from simclr_dist.cli import train
from simclr_dist.cli.completion import SHELLS, complete, script
from simclr_dist.cli.exits import exit_code, refused, under_torchrun
from simclr_dist.cli.manual import fill_in, interrupted
from simclr_dist.cli.options import Parser
from simclr_dist.launch.slurm import rescue
from simclr_dist.system import stdout
from simclr_dist.system.errors import OutputError, say
from simclr_dist.system.machine import wait_without_spinning
from simclr_dist.system.progress import Progress
from simclr_dist.system.ranks import TYPED
from simclr_dist.system.version import describe

_INTERRUPTED, _READER_GONE = 130, 141  # as a shell has it: 128 and SIGINT, 128 and SIGPIPE

_AS_RANKS = ("eval", "finetune", "embed", "check")
# Others start processes that speak for themselves.
_WORK_HERE = ("shard", "eval", "finetune", "embed", "neighbours", "duplicates", "export")

# Each module has `HELP`, `add_arguments(parser)`, and `run(arguments, rest)`, which returns the exit code. `rest` is what the
# options leave: settings of a config.
_NAMES = "demo shard train eval finetune embed neighbours duplicates export submit status runs plan check"
VERBS = {name: import_module(f"simclr_dist.cli.{name}") for name in _NAMES.split()}


def _keep_folder_off_path() -> None:
    """Keep the current folder off the path of what we start. A torch.py there would be taken for torch."""
    os.environ["PYTHONSAFEPATH"] = "1"
    root, others = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if sys.path[0] == root and root not in others:  # `python -m` in a clone, which may not be what is installed
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, others)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code. A process that torchrun has started does the work of one rank."""
    _keep_folder_off_path()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["rescue"]:  # no verb: batch scripts type it, which do not know where this Python is
        return rescue.main(arguments[1:])
    if arguments[:1] == ["train"] and under_torchrun():
        return train.main(arguments[1:])
    os.environ[TYPED] = shlex.join(["simclr-dist", *arguments])
    wait_without_spinning()
    try:
        with stdout.checked():
            return _run(arguments)
    except BrokenPipeError:
        return _READER_GONE
    except OutputError as error:
        return refused(error)


def _run(arguments: list[str]) -> int:
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(parsed, "config"):
        parser.prog += f" {parsed.verb}" if parsed.verb else ""  # whose help is meant
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.version or parsed.print_completion:
        print(describe() if parsed.version else script(parsed.print_completion))
        return 0
    if parsed.verb is None:
        parser.print_help()
        return 2
    try:
        is_rank = parsed.verb in _AS_RANKS or "measure" in parsed
        with Progress(parsed.verb, shown=parsed.verb in _WORK_HERE and os.environ.get("RANK", "0") == "0"):
            return exit_code(lambda: VERBS[parsed.verb].run(parsed, rest), is_rank=is_rank)
    except KeyboardInterrupt:
        say(interrupted(parsed.verb))
        return _INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line. Also answer a shell that asks for completions."""
    about = "Distributed large-batch SimCLR on WebDataset shards."
    parser = Parser("simclr-dist", description=about, allow_abbrev=False)  # as unknown options may pass
    parser.add_argument("--version", action="store_true", help="this program's version, and what it runs on")
    completion = "a script: source <(simclr-dist --print-completion bash)"
    parser.add_argument("--print-completion", choices=SHELLS, help=completion)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in VERBS.items():
        # The help of `train` takes a CONFIG.
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, add_help=name != "train", allow_abbrev=False))
    fill_in(parser, verbs.choices)
    if "_ARGCOMPLETE" in os.environ:
        complete(parser, verbs.choices)
    return parser
