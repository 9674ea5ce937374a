"""`simclr-dist eval`: what can be refused is refused, and stop signals are heard, before torch is imported."""

import argparse
import os
import sys
from collections.abc import Callable

from simclr_dist.evaluate.options import check_arguments
from simclr_dist.system import signals, stdout
from simclr_dist.system.errors import PREEMPTED, RankError, UserError

_STOPPED = "simclr-dist: stopped by {signal}; the same command starts the evaluation again"


def run(arguments: argparse.Namespace) -> int:
    """Do what `options.add_arguments` were told; returns the exit code.

    Raises UserError, and SystemExit(75) when a stop signal comes: an evaluation has nothing to save.
    """
    check_arguments(arguments)
    signals.leave_at_once(PREEMPTED, _STOPPED)
    if arguments.watch is not None:
        from simclr_dist.evaluate.watch import watch_from_arguments as evaluate_from_arguments
    else:
        from simclr_dist.evaluate.job import run_from_arguments as evaluate_from_arguments
    signals.exit_when_asked(PREEMPTED, _STOPPED)
    return evaluate_from_arguments(arguments)


def told_once(run: Callable[[], int]) -> int:
    """The exit code of a command that torchrun may have started; a mistake of the user's is one line, on rank 0, and 2."""
    try:
        with stdout.checked():
            return run()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"simclr-dist: {error}", file=sys.stderr, flush=True)
        return 2
