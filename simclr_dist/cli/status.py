"""Run the verb `status`: say how runs stand, and what comes next."""

import argparse
from collections.abc import Sequence

HELP = "how a run stands: state, step, time left, loss, encoder, next command"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist status`."""
    what = "a run folder, or folders of them (default: %(default)s)"
    parser.add_argument("folders", metavar="RUN", nargs="*", default=["runs"], help=what)


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Print how the runs stand; return 0. Raises UserError."""
    from simclr_dist.evaluate.status import status

    print(status(arguments.folders))
    return 0
