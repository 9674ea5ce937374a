"""Run the verb `finetune`: train an encoder further with labels."""

import argparse
from collections.abc import Sequence
from functools import partial

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, RESULT_PATTERN, encoder_of
from simclr_dist.evaluate.settings import FinetuneSettings, check_alone
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, say

HELP = "train an encoder further with labels, all or a part of them"
_STOPPED = "simclr-dist: stopped by {signal}; the same command starts the finetuning again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist finetune`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", type=encoder_of, help=f"an encoder, or a run (its newest): {PATTERN}; it stays as it is")
    add("--train", required=True, metavar="SHARDS", help="folder of labelled shards to train on")
    add("--test", required=True, metavar="SHARDS", help="folder of labelled shards, seen once, after the last epoch")
    add_settings(parser, FinetuneSettings, start="WEIGHTS")
    add_device(parser)
    add(
        "--out",
        metavar="JSON",
        help=f"the result's file (default: {RESULT_PATTERN.removesuffix('.json')}.finetune-START-LABELS.json)",
    )


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Finetune an encoder; return the exit code. Raises UserError, and SystemExit(75) at a stop signal: nothing is saved."""
    check_alone("finetune")
    settings = settings_from(FinetuneSettings, arguments)
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.finetune import finetune, finetune_path, table
        from simclr_dist.evaluate.result.file import UnwrittenError
    try:
        result = finetune(
            arguments.encoder, arguments.train, arguments.test, settings, out=arguments.out, device=arguments.device,
            say=partial(say, before=""),
        )  # fmt: skip
    except UnwrittenError as error:  # the table is worth hours
        print(table(error.result))
        raise
    print(table(result))
    print(f"written: {finetune_path(arguments.encoder, settings, arguments.out)}")
    return 0
