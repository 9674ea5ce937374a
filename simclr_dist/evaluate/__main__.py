"""`python -m simclr_dist.evaluate ENCODER --train SHARDS --test SHARDS`, or --watch RUN; also under torchrun."""

import argparse
import os
import sys
from collections.abc import Sequence

from simclr_dist.errors import RankError, UserError
from simclr_dist.evaluate.command import run
from simclr_dist.evaluate.options import add_arguments


def main(argv: Sequence[str], prog: str = "python -m simclr_dist.evaluate") -> int:
    """Evaluate, print the table and the result's path; returns the exit code (a wrong command line exits with 2)."""
    parser = argparse.ArgumentParser(prog=prog, description="Frozen features of an encoder by kNN and a linear probe.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"simclr-dist: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
