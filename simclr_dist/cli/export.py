"""Run the verb `export`: write an encoder for other programs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.encoder.names import PATTERN
from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError

HELP = "write an encoder as ONNX, tried against torch, or as a folder for a model hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist export`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help=PATTERN)
    add("out", metavar="OUT", help="OUT.onnx, a file; or a new folder, with weights, a model card (README.md) and results")
    add("--layer", default="h", help="what comes out of the ONNX file: h, z, or projector.N (default: %(default)s)")
    add("--license", default="", metavar="ID", help="licence of the folder, for its card: apache-2.0, cc-by-nc-4.0, other")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Export an encoder; return the exit code. Print how far ONNX Runtime is from torch. Raises UserError."""
    ending = Path(arguments.out).suffix
    if ending[1:].isalpha() and ending != ".onnx" and not arguments.out.endswith("/"):  # a folder may be called v1.2
        raise ConfigError(f"export: {arguments.out!r} must end in .onnx, or in / for a folder")
    if ending == ".onnx" and arguments.license:
        raise ConfigError(f"--license: {arguments.license!r}: has no effect on an ONNX file; leave it out")
    if ending != ".onnx" and arguments.layer != "h":
        raise ConfigError(f"--layer: {arguments.layer!r}: a folder has the encoder, which is h; leave it out")
    with signals.blocked(), signals.uncollected():  # torch's import passes over what a signal raises
        from simclr_dist.encoder.onnx import export_onnx
        from simclr_dist.evaluate.publish import publish

    if ending != ".onnx":
        measured = publish(arguments.encoder, arguments.out, arguments.license)
        hint = "" if measured else "; no results are in its card: `simclr-dist eval` this encoder, and export it anew"
        print(f"written: {arguments.out}{hint}")
        return 0
    difference = export_onnx(arguments.encoder, arguments.out, arguments.layer)
    print(f"written: {arguments.out}; ONNX Runtime's output differs from torch's by {difference:.1e} of the largest")
    return 0
