"""Run the verb `neighbours`: find the images nearest to some pictures."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, check_is_file, encoder_of
from simclr_dist.evaluate.settings import NeighbourSettings, check_alone
from simclr_dist.evaluate.sources import check_page_folder, find_images
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError, say

HELP = "find a collection's images that are nearest to your pictures"
_STOPPED = "simclr-dist: stopped by {signal}, no page is written; the same command starts again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist neighbours`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", type=encoder_of, help=f"an encoder, or a run (its newest): {PATTERN}")
    add("images", metavar="IMAGE", nargs="+", help="pictures to ask for: image files, or one folder of them")
    add("--among", required=True, metavar="SHARDS", help="shards that the neighbours are looked for in")
    add_settings(parser, NeighbourSettings, features="FOLDER", layer="LAYER")
    add_device(parser)
    add("--out", metavar="DIR", default="neighbours", help="folder of the page and the table (default: %(default)s)")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Find neighbours; return the exit code. Raises UserError, and SystemExit(75) when a stop signal comes."""
    settings = settings_from(NeighbourSettings, arguments)
    check_alone("neighbours")
    check_is_file(arguments.encoder)
    source = find_images(arguments.images)
    if isinstance(source, str | Path):
        raise ConfigError(
            f"neighbours: {str(source)!r} is shards; name image files, or a folder of them, and shards by --among"
        )
    out = check_page_folder(arguments.out, "neighbours")
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.neighbours import neighbours
        from simclr_dist.method.distributed import process_group
    with process_group(arguments.device) as world:
        neighbours(world, arguments.encoder, source, arguments.among, out, settings, partial(say, before=""))
    print(f"written: {out[0]} and {out[1].name}")
    return 0
