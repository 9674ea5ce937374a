"""Run the verb `runs`: compare runs by their folders."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.system.errors import ConfigError, refusing
from simclr_dist.system.files import write_atomically

HELP = "compare runs: settings that differ, state, accuracy, speed, cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist runs`."""
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="+", help="a run folder, or a folder of them (a sweep's, say)")
    add("--csv", metavar="FILE", help="write the same as CSV, with numbers in full")
    add("--picture", metavar="FILE.png", help="draw loss and accuracy of all runs into one picture")
    add("--over", choices=("steps", "images", "hours"), help="with --picture: what goes across (default: steps)")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Print the comparison, and write it where that is asked; return 0. Raises UserError."""
    from simclr_dist.evaluate.compare import as_csv, compare, curves_of, table

    if arguments.over and not arguments.picture:
        raise ConfigError("--over: has no effect without --picture; leave it out")
    if arguments.picture and not arguments.picture.endswith(".png"):
        raise ConfigError(f"--picture: {arguments.picture!r}: the picture is a .png file")
    for file in filter(None, (arguments.csv, arguments.picture)):
        if not Path(file).absolute().parent.is_dir() or Path(file).is_dir():
            raise ConfigError(f"{file}: is a folder, or in a folder that is not there; name another file")
    comparison = compare(arguments.folders)
    print(table(comparison))
    if arguments.csv:
        _write(arguments.csv, as_csv(comparison).encode())
    if arguments.picture:
        from simclr_dist.evaluate.result.picture import charts_png

        axis = arguments.over or "steps"
        _write(arguments.picture, charts_png(curves_of(comparison, axis), axis))
    return 0


def _write(path: str, content: bytes) -> None:
    with refusing(f"{path}: cannot be written"):
        write_atomically(Path(path), content)
    print(f"written: {path}")
