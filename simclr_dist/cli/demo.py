"""Run the verb `demo`: the first run, without any data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.cli.options import at_least

HELP = "first run: generate a small data set, train on it, show what was learned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist demo`."""
    add = parser.add_argument
    add("--folder", default="runs/demo", help="where everything goes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and views (default: %(default)s)")
    add("--processes", type=at_least(1), default=2, help="training processes (default: %(default)s)")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Generate images, train, measure, show the result; return the exit code. Raises UserError."""
    from simclr_dist.preflight.demo.run import run_demo

    return run_demo(Path(arguments.folder), seed=arguments.seed, processes=arguments.processes)
