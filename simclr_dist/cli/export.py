"""Run the verb `export`: write an encoder as ONNX."""

import argparse
from collections.abc import Sequence

from simclr_dist.encoder.names import PATTERN
from simclr_dist.system import signals

HELP = "write an encoder as ONNX, tried against torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist export`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help=PATTERN)
    add("out", metavar="OUT.onnx", help="file to write; an older one is replaced")
    add("--layer", default="h", help="what comes out: h, z, or projector.N (default: %(default)s)")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Export an encoder; return the exit code. Print how far ONNX Runtime is from torch. Raises UserError."""
    with signals.blocked(), signals.uncollected():  # torch's import passes over what a signal raises
        from simclr_dist.encoder.onnx import export_onnx

    difference = export_onnx(arguments.encoder, arguments.out, arguments.layer)
    print(f"written: {arguments.out}; ONNX Runtime's output differs from torch's by {difference:.1e} of the largest")
    return 0
