"""`python -m simclr_dist.evaluate ENCODER --train SHARDS --test SHARDS`, or --watch RUN; also under torchrun."""

import argparse
import sys
from collections.abc import Sequence

from simclr_dist.evaluate.command import run, told_once
from simclr_dist.evaluate.options import add_arguments


def main(argv: Sequence[str], prog: str = "python -m simclr_dist.evaluate") -> int:
    """Evaluate, print the table and the result's path; returns the exit code (a wrong command line exits with 2)."""
    parser = argparse.ArgumentParser(prog=prog, description="Frozen features of an encoder by kNN and a linear probe.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return told_once(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
