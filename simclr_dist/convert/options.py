"""What `simclr-dist shard` can be told, and what it prints; quick to import."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.config.arguments import at_least
from simclr_dist.system.errors import ConfigError, DataError

if TYPE_CHECKING:
    from simclr_dist.convert.finished import ShardSummary
    from simclr_dist.convert.shards import ShardSettings
    from simclr_dist.convert.sources.originals import Problem

DESCRIPTION = """Write WebDataset tars and a Parquet manifest. Every image is decoded once; what is not an image is listed with
its reason and left out. The same input, settings and seed give the same bytes, for any number of processes and parts.
A run that was killed goes on when the same command is typed again."""

EXAMPLES = """SRC is a folder of images, or of class folders; a .tar or .zip of one; a .parquet or .arrow file (Hugging Face's
layout); a folder of such files, or a pattern in quotes; a .csv of path,label.

examples:
  simclr-dist shard PHOTOS data/mine --split 0.8/0.2
  simclr-dist shard photos.zip data/mine --short-side 256
  simclr-dist shard 'cifar/train-*.parquet' data/cifar --image-column img --label-column fine_label
  simclr-dist shard list.csv data/mine                   # path,label; paths relative to the list's folder
  simclr-dist shard SRC DST --part 3/8                   # on 8 machines (launch/shard_array.sbatch), then once:
  simclr-dist shard SRC DST --finish                     # the same bytes as without parts
  simclr-dist shard --index /data/tars                   # tars of others: writes the manifest beside them, copies nothing
  simclr-dist shard --verify data/mine                   # every byte against the manifest; exit code 2 when any differs"""

_SHOWN = 10
_ALWAYS = ("source", "destination", "verb", "run", "processes")
_WITH = {
    "index": ("index", "strict"),
    "verify": ("verify", "decode"),
    "part": ("part", "shard_size", "seed", "short_side", "quality", "split", "image_column", "label_column", "strict"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist shard`."""
    add = parser.add_argument
    add("source", nargs="?", metavar="SRC", help="where the images are")
    add("destination", nargs="?", metavar="DST", help="folder to write; must not exist")
    add("--shard-size", type=at_least(1), default=1000, metavar="N", help="images a shard (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the shuffle and the split (default: %(default)s)")
    add("--short-side", type=at_least(8), metavar="PIXELS", help="shrink images to this short side")
    add("--quality", type=at_least(1), default=95, metavar="N", help="JPEG quality of re-encoded images (default: %(default)s)")
    add("--split", metavar="SHARES", help="like 0.8/0.2: write DST/train and DST/test, stratified by label")
    add(
        "--image-column", metavar="NAME", help="of a table: image bytes (default: image, img, or the only one); of a list: path"
    )
    add("--label-column", metavar="NAME", help="of a table or list (default: label); 'none': take no labels")
    add("--processes", type=at_least(1), default=os.cpu_count(), metavar="N", help="(default: all cores)")
    add("--strict", action="store_true", help="refuse when a file is not an image, instead of leaving it out")
    add("--part", metavar="I/N", help="only the I-th of N parts of the decoding, into DST.partial")
    add("--finish", action="store_true", help="write the shards of a conversion whose parts are all done")
    add("--index", metavar="DIR", help="write a manifest beside WebDataset tars of others")
    add("--verify", metavar="DST", help="read all shards of DST again and compare them with the manifest")
    add("--decode", action="store_true", help="with --verify: decode every image, too")
    parser.set_defaults(defaults=vars(parser.parse_args([])))


def run(arguments: argparse.Namespace) -> int:
    """Do what `add_arguments` were told; returns the exit code, raises UserError."""
    if arguments.index is not None:
        _refuse_others(arguments, "index")
        return _index(arguments)
    if arguments.verify is not None:
        _refuse_others(arguments, "verify")
        return _verify(arguments)
    if arguments.source is None or arguments.destination is None:
        raise ConfigError("usage: simclr-dist shard SRC DST, or --index DIR, or --verify DST; --help has examples")
    if arguments.decode:
        raise ConfigError("--decode: has an effect with --verify only")
    settings = _settings(arguments)
    if arguments.part is not None:
        _refuse_others(arguments, "part")
        return _part(arguments, settings)
    from simclr_dist.convert import shards

    if arguments.finish:
        summary = shards.finish_shards(
            arguments.source, arguments.destination, settings,
            processes=arguments.processes, strict=arguments.strict, progress=True,
        )  # fmt: skip
    else:
        summary = shards.write_shards(
            arguments.source, arguments.destination, **settings.__dict__,
            processes=arguments.processes, strict=arguments.strict, progress=True,
        )  # fmt: skip
    _report(summary, Path(arguments.destination))
    return 0


def _refuse_others(arguments: argparse.Namespace, mode: str) -> None:
    """No option may be given that this mode would pass over."""
    if mode != "part" and arguments.source is not None:
        raise ConfigError(f"--{mode}: takes its folder alone; {arguments.source!r} is one too many")
    for name, default in arguments.defaults.items():
        if name in _ALWAYS or name in _WITH[mode]:
            continue
        if getattr(arguments, name, default) != default:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect with --{mode}")


def _settings(arguments: argparse.Namespace) -> "ShardSettings":
    from simclr_dist.convert.shards import ShardSettings

    split = None
    if arguments.split is not None:
        try:
            split = tuple(float(part) for part in arguments.split.split("/"))
        except ValueError:
            split = ()
        if len(split) != 2 or min(split) <= 0 or not abs(sum(split) - 1) <= 1e-9:
            raise ConfigError(f"--split: {arguments.split!r} is not two shares that add up to 1, like 0.8/0.2")
    return ShardSettings(
        arguments.shard_size, arguments.seed, arguments.short_side, arguments.quality, split,
        arguments.image_column, arguments.label_column,
    )  # fmt: skip


def _report(summary: "ShardSummary", destination: Path) -> None:
    if summary.already:
        print(f"{destination}: was done already, with the same settings from the same files; nothing is written")
    classes = ", ".join(summary.classes[:_SHOWN]) + (", ..." if len(summary.classes) > _SHOWN else "")
    print(
        f"{summary.written} images in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB, {len(summary.classes)} classes"
        + (f": {classes}" if classes else "")
    )
    print(f"{summary.converted} re-encoded, {summary.duplicates} duplicates kept")
    if summary.skipped:
        print(f"passed over by their names: {len(summary.skipped)} files, like {summary.skipped[0].name}")
    _report_left_out(summary.rejected, destination)
    print(f"written to {', '.join(map(str, summary.destinations))}")


def _report_left_out(rejected: "tuple[Problem, ...]", folder: Path) -> None:
    for problem in rejected[:_SHOWN]:
        print(f"left out: {problem.name}: {problem.reason}")
    if rejected:
        print(f"left out: {len(rejected)} in all, listed in {folder / 'rejected.jsonl'}")


def _part(arguments: argparse.Namespace, settings: "ShardSettings") -> int:
    part, slash, parts = arguments.part.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--part: {arguments.part!r} is not I/N, a part and the number of parts, like 3/8")
    from simclr_dist.convert.shards import write_part

    done = write_part(
        arguments.source, arguments.destination, settings, int(part), int(parts),
        processes=arguments.processes, strict=arguments.strict, progress=True,
    )  # fmt: skip
    print(
        f"part {arguments.part}: {done.good} images decoded, {done.bad} left out" + (f": {done.first_bad}" if done.bad else "")
    )
    print(f"{done.parts_done} of {parts} parts are done" + ("; go on with --finish" if done.parts_done == int(parts) else ""))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from simclr_dist.convert.index import index_shards

    summary = index_shards(arguments.index, processes=arguments.processes, strict=arguments.strict, progress=True)
    print(f"{summary.images} images in {summary.shards} shards, {summary.labelled} with a label")
    _report_left_out(summary.rejected, Path(arguments.index))
    print(f"written to {summary.manifest}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from simclr_dist.convert.verify import verify_shards

    summary = verify_shards(
        arguments.verify, decode=arguments.decode, processes=arguments.processes, progress=True, report=print
    )
    if summary.unlisted:
        print(f"{summary.unlisted} images lie in the tars and are not in the manifest")
    if summary.lines:
        raise DataError(f"{arguments.verify}: {summary.bad} of {summary.images} images differ from the manifest")
    print(f"{summary.images} images in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB: all as the manifest says")
    return 0
