"""Run the verb `embed`: write features of a user's images. Ranks that torchrun has started share the work."""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, check_is_file, encoder_of
from simclr_dist.evaluate.settings import EmbedSettings
from simclr_dist.evaluate.sources import check_out, find_images
from simclr_dist.run.commands import printed, typed
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED
from simclr_dist.system.ranks import read_place

if TYPE_CHECKING:
    from simclr_dist.convert.sources.originals import Source
    from simclr_dist.evaluate.embed import Embedded

HELP = "write an encoder's features of your own images to a Parquet or NumPy file"
_STOPPED = "simclr-dist: stopped by {signal}, nothing is written; the same command starts again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist embed`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", type=encoder_of, help=f"an encoder, or a run (its newest): {PATTERN}")
    add("source", metavar="SRC", nargs="+", help="folder of shards, folder of images (flat, or class folders), or image files")
    add("out", metavar="OUT.parquet", help="the file of features, .parquet or .npz; an older one is replaced")
    add_settings(parser, EmbedSettings)
    add_device(parser)


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Embed images; return the exit code. Raises UserError, and SystemExit(75) when a stop signal comes: nothing is written."""
    read_place()
    settings, images, out = checked(arguments)
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.embed import embed_within
        from simclr_dist.method.distributed import process_group
    begin = time.perf_counter()
    with process_group(arguments.device) as world:
        embedded = embed_within(world, arguments.encoder, images, out, settings)
    if world.is_main:
        _report(images, embedded, out, time.perf_counter() - begin)
    return 0


def checked(arguments: argparse.Namespace) -> "tuple[EmbedSettings, str | Path | Source, Path]":
    """Check what needs no torch. Return settings, images and the file to write."""
    settings = settings_from(EmbedSettings, arguments)
    check_is_file(arguments.encoder)
    images, out = find_images(arguments.source), Path(arguments.out)
    check_out(out, arguments.source, settings.map)
    return settings, images, out


def _report(source: "str | Path | Source", embedded: "Embedded", out: Path, seconds: float) -> None:
    if not isinstance(source, str | Path):
        from simclr_dist.convert.sources.originals import lines_of

        for line in lines_of(source.rejected, source.skipped):
            print(line)
        if source.rejected:
            print(f"links that are left out: {len(source.rejected)} in all")
    for reason in embedded.reasons:
        print(f"left out: {reason}")
    if embedded.left_out:
        print(f"images that cannot be read and are left out: {embedded.left_out}")
    size = out.stat().st_size / 2**20
    read = f"numpy; print(numpy.load({str(out)!r})['embedding'])"
    read = read if out.suffix == ".npz" else f"pyarrow.parquet as p; print(p.read_table({str(out)!r}))"
    after = f"{typed('python')} -c {shlex.quote(f'import {read}')}"
    line = f"{embedded.images} images, {embedded.size} numbers each, {size:.1f} MiB in {seconds:.1f} s; written: {out}"
    print(line, printed(after), sep="")
