"""Run the verb `duplicates`: find near-duplicates in a set, or between two."""

import argparse
from collections.abc import Sequence
from functools import partial

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, check_is_file, encoder_of
from simclr_dist.evaluate.settings import DuplicateSettings, check_alone
from simclr_dist.evaluate.sources import check_page_folder
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, say

HELP = "find images of a set that are alike, or test images that were trained on"
_STOPPED = "simclr-dist: stopped by {signal}, no page is written; the same command starts again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist duplicates`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", type=encoder_of, help=f"an encoder, or a run (its newest): {PATTERN}")
    add("shards", metavar="SHARDS", help="shards whose images are compared with each other")
    add(
        "--among", metavar="SHARDS", help="other shards: compare with their images instead, as test images with training images"
    )
    add_settings(parser, DuplicateSettings, features="FOLDER", layer="LAYER")
    add_device(parser)
    add("--out", metavar="DIR", default="duplicates", help="folder of the page and the table (default: %(default)s)")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Find duplicates; return the exit code. Raises UserError, and SystemExit(75) when a stop signal comes."""
    settings = settings_from(DuplicateSettings, arguments)
    check_alone("duplicates")
    check_is_file(arguments.encoder)
    out = check_page_folder(arguments.out, "duplicates")
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.duplicates import duplicates
        from simclr_dist.method.distributed import process_group
    with process_group(arguments.device) as world:
        lines = duplicates(world, arguments.encoder, arguments.shards, arguments.among, out, settings, partial(say, before=""))
    print(*lines, f"written: {out[0]} and {out[1].name}", sep="\n")
    return 0
