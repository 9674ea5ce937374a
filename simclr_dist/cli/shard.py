"""Run the verb `shard`: turn any pile of images into shards. Or write the manifest of other people's tars; verify shards."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.cli.options import add_settings, at_least, settings_from
from simclr_dist.convert.settings import ShardSettings
from simclr_dist.run.commands import command, printed
from simclr_dist.system.errors import ConfigError, DataError
from simclr_dist.system.machine import cores

if TYPE_CHECKING:
    from simclr_dist.convert.finished import ShardSummary
    from simclr_dist.convert.sources.originals import Problem

HELP = "turn images into shards; --index tars of others, --verify shards, their --statistics"
_SHOWN = 10
_ALWAYS = ("source", "destination", "verb", "processes")
_WITH = {  # the options that each mode takes beside those
    "index": ("index", "strict", "channels", "bit_depth"),
    "verify": ("verify", "decode"),
    "statistics": ("statistics",),
    "part": ("part", "strict", *(field.name for field in dataclasses.fields(ShardSettings))),
    "parts": ("strict", *(field.name for field in dataclasses.fields(ShardSettings))),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist shard`."""
    add = parser.add_argument
    add("source", nargs="?", metavar="SRC", help="where the images are")
    add("destination", nargs="?", metavar="DST", help="folder to write; must not exist")
    add_settings(parser, ShardSettings, short_side="PIXELS", split="SHARES", image_column="NAME", label_column="NAME")
    add("--processes", type=at_least(1), default=cores(), metavar="N", help="(default: all cores)")
    add("--strict", action="store_true", help="refuse when a file is not an image, instead of leaving it out")
    add("--part", metavar="I/N", help="only the I-th of N parts of the decoding, into DST.partial")
    add("--finish", action="store_true", help="write the shards of a conversion whose parts are all done")
    add("--index", metavar="DIR", help="write a manifest beside WebDataset tars of others")
    add("--verify", metavar="DST", help="read all shards of DST again and compare them with the manifest")
    add("--statistics", metavar="DST", help="measure mean and standard deviation of each channel, for views.mean and views.std")
    add("--decode", action="store_true", help="with --verify: decode every image, too")


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Do what the options say; return the exit code. Raises UserError."""
    for mode, work in (("index", _index), ("verify", _verify), ("statistics", _statistics)):
        if getattr(arguments, mode) is not None:
            refuse_others(arguments, mode)
            return work(arguments)
    if arguments.source is None or arguments.destination is None:
        raise ConfigError(
            "usage: simclr-dist shard SRC DST, or --index DIR, or --verify DST, or --statistics DST; --help has examples"
        )
    if arguments.decode:
        raise ConfigError("--decode: has an effect with --verify only")
    settings = settings_from(ShardSettings, arguments)
    if arguments.part is not None:
        refuse_others(arguments, "part")
        return _part(arguments, settings)
    from simclr_dist.convert import shards

    source, destination = arguments.source, arguments.destination
    how: dict[str, Any] = {"processes": arguments.processes, "strict": arguments.strict, "progress": True}
    if arguments.finish:
        summary = shards.finish_shards(source, destination, settings, **how)
    else:
        summary = shards.write_shards(source, destination, **vars(settings), **how)
    _report(summary, Path(destination))
    return 0


def refuse_others(arguments: argparse.Namespace, mode: str) -> None:
    """Refuse options that this mode would pass over."""
    if mode not in ("part", "parts") and arguments.source is not None:
        raise ConfigError(f"--{mode}: takes its folder alone; {arguments.source!r} is one too many")
    for name, value in vars(arguments).items():
        if value is not None and value is not False and name not in _ALWAYS and name not in _WITH[mode]:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect with --{mode}")


def _report(summary: "ShardSummary", destination: Path) -> None:
    if summary.already:
        print(f"{destination}: was done already, with the same settings from the same files; nothing is written")
    classes = ", ".join(summary.classes[:_SHOWN]) + (", ..." if len(summary.classes) > _SHOWN else "")
    classes = f"{len(summary.classes)} classes: {classes}" if classes else "no names of classes"  # labels may be without
    print(f"{summary.written} images in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB, {classes}")
    links = f", {summary.links} links followed" * bool(summary.links)
    print(f"{summary.converted} re-encoded, {summary.duplicates} duplicates kept{links}")
    for kind, count in summary.changes.items():
        print(f"re-encoded: {count} ({kind})")
    for name, reason in summary.copies[:_SHOWN]:
        print(f"duplicate: {name}: {reason}")
    if summary.copies:
        print(f"duplicates: {len(summary.copies)} in all, listed in {destination / 'duplicates.jsonl'}")
    _report_left_out(summary.rejected, summary.skipped, destination)
    after = command(
        "train", "CONFIG", "--data.shards", destination / summary.destinations[0].relative_to(destination.resolve())
    )
    shares = (f"{folder} ({images} images)" for folder, images in zip(summary.destinations, summary.images, strict=True))
    print(f"written to {', '.join(shares)}{printed(after)}")


def _report_left_out(rejected: "tuple[Problem, ...]", skipped: "tuple[Problem, ...]", folder: Path) -> None:
    from simclr_dist.convert.sources.originals import lines_of

    for line in lines_of(rejected, skipped):
        print(line)
    if rejected:
        print(f"left out: {len(rejected)} in all, listed in {folder / 'rejected.jsonl'}")


def _part(arguments: argparse.Namespace, settings: ShardSettings) -> int:
    part, slash, parts = arguments.part.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--part: {arguments.part!r} is not I/N, a part and the number of parts, like 3/8")
    from simclr_dist.convert.shards import write_part

    done = write_part(
        arguments.source, arguments.destination, settings, int(part), int(parts),
        processes=arguments.processes, strict=arguments.strict, progress=True,
    )  # fmt: skip
    bad = f"{done.bad} left out: {done.first_bad}" if done.bad else "0 left out"
    print(f"part {arguments.part}: {done.good} images decoded, {bad}")
    print(f"{done.parts_done} of {parts} parts are done" + ("; go on with --finish" if done.parts_done == int(parts) else ""))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from simclr_dist.convert.index import index_shards

    how: dict[str, Any] = {"processes": arguments.processes, "strict": arguments.strict, "progress": True}
    summary = index_shards(arguments.index, kind=settings_from(ShardSettings, arguments).kind, **how)
    print(f"{summary.images} images in {summary.shards} shards, {summary.labelled} with a label")
    _report_left_out(summary.rejected, summary.skipped, Path(arguments.index))
    print(f"written to {summary.manifest}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from simclr_dist.convert.verify import verify_shards

    how: dict[str, Any] = {"decode": arguments.decode, "processes": arguments.processes}
    summary = verify_shards(arguments.verify, **how, progress=True, report=print)
    if summary.unlisted:
        print(f"{summary.unlisted} images lie in the tars and are not in the manifest")
    if summary.lines:
        raise DataError(f"{arguments.verify}: {summary.bad} of {summary.images} images differ from the manifest")
    print(f"{summary.images} images in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB: all as the manifest says")
    return 0


def _statistics(arguments: argparse.Namespace) -> int:
    from simclr_dist.convert.statistics import measure

    measured = measure(arguments.statistics, processes=arguments.processes, progress=True)
    print(f"# {measured.images} images, {measured.kind}; on the scale 0-1, each image counts alike")
    print("views:")
    for name in ("mean", "std"):
        print(f"  {name}: [{', '.join(f'{value:.6g}' for value in getattr(measured, name))}]")
    return 0
