"""What `simclr-dist embed` can be told, and what of it can be refused before torch is imported."""

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.encoder.names import check_is_file
from simclr_dist.evaluate.options import PRECISIONS
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError, DataError

if TYPE_CHECKING:
    from simclr_dist.convert.sources.originals import Source

BATCH_SIZE = 256
WORKERS = 2

_STOPPED = "simclr-dist: stopped by {signal}, nothing is written; the same command starts again"


@dataclass(frozen=True)
class EmbedSettings:
    """How features are made; raises ConfigError for the first value out of its range.

    `batch_size` is of images that the encoder sees at a time on each rank, `workers` of reading processes beside each rank;
    `layer` is one that `export.load_encoder` knows, which refuses others.
    """

    batch_size: int = BATCH_SIZE
    workers: int = WORKERS
    precision: str = "fp32"
    skip_bad: bool = False
    layer: str = "h"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}: {value}: must be {least} or more")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: {self.precision!r}: must be one of {', '.join(PRECISIONS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist embed`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="an exported encoder: RUN/encoders/step-XXXXXXXX.safetensors")
    add("source", metavar="SRC", nargs="+", help="folder of shards, folder of images (flat, or class folders), or image files")
    add("out", metavar="OUT.parquet", help="the file of features; an older one is replaced")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images that the encoder sees at a time (%(default)s)")
    add("--workers", type=int, default=WORKERS, help="reading processes beside each rank (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (%(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of the computation; features are stored as fp32 (%(default)s)")
    add("--layer", default="h", help="h, projector.N or z: the last two need the projector beside the encoder (%(default)s)")
    add("--skip-bad", action="store_true", help="leave out and count images that cannot be read, instead of refusing")


def check_arguments(arguments: argparse.Namespace) -> "tuple[EmbedSettings, str | Path | Source]":
    """The settings among `add_arguments`' options, and what they name as SRC (`find_images`).

    Raises ConfigError and DataError for what is out of range, is not there, or could not be written.
    """
    settings = EmbedSettings(arguments.batch_size, arguments.workers, arguments.precision, arguments.skip_bad, arguments.layer)
    check_is_file(arguments.encoder)
    found = find_images(arguments.source)
    check_out(arguments.out, arguments.source)
    return settings, found


def check_out(out: str | Path, sources: Sequence[str | Path]) -> None:
    """Make the folder of `out` and try to write there; raises DataError where the features could not, or must not, go."""
    from simclr_dist.data.manifest import MANIFEST_NAME  # pyarrow: every verb's --help waits for what stands at the top
    from simclr_dist.evaluate.features.file import is_feature_file

    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; name the file of features, like {out / 'features.parquet'}")
    # Also a guard: when OUT is forgotten, the last image stands in its place.
    if out.suffix != ".parquet":
        raise DataError(f"{out}: the file of features comes last, and must end in .parquet")
    if out.exists() and not is_feature_file(out):
        raise DataError(f"{out}: is there, and is no file of features; it is not overwritten: name another one")
    for source in map(Path, sources):
        # A folder that holds Parquet files is read as one of images inside Parquet files.
        if source.is_dir() and not (source / MANIFEST_NAME).is_file() and out.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{out}: is inside {source}, whose images it would be taken for; name a file outside of it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DataError(f"{out}: its folder cannot be written to: {error.strerror}") from None


def find_images(sources: Sequence[str | Path]) -> "str | Path | Source":
    """What is to be embedded: shards (a folder's path; as text a URL, or tars by braces), or image files,
    listed without reading them.

    One folder of images (`convert.sources.find_source`: labels by class folder), or one or more files in the order of their
    paths, without labels. Raises DataError where there is nothing, or not one of these.
    """
    from simclr_dist.convert.sources.find import find_source
    from simclr_dist.convert.sources.folders import FileChunk
    from simclr_dist.convert.sources.originals import Source
    from simclr_dist.data.manifest import MANIFEST_NAME
    from simclr_dist.data.remote.fetch import is_url
    from simclr_dist.system.errors import printable

    if len(sources) == 1 and (is_url(sources[0]) or "{" in str(sources[0])) and not Path(sources[0]).exists():
        return str(sources[0])  # shards elsewhere, or tars by braces: `data.collection`
    paths = [Path(source) for source in sources]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if any(folder.glob(MANIFEST_NAME)) or any(folder.glob(f"*/{MANIFEST_NAME}")):
            return folder  # of shards; or of folders of shards, of which the reader will ask for one
        source = find_source(folder)
        if not all(isinstance(chunk, FileChunk) for chunk in source.chunks):
            raise DataError(
                f"{folder}: holds images inside tables or archives; make shards of it with `simclr-dist shard` first"
            )
        return source
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, and {len(paths) - 1} more are named; embed one folder, or image files only")
        if not path.is_file():
            raise DataError(f"{printable(str(path))}: no such file or folder of images")
        if path.suffix in (".parquet", ".tar"):
            raise DataError(f"{path}: is no image; name the folder of shards, or make one with `simclr-dist shard`")
    names = sorted(map(os.fspath, paths))
    if double := next((a for a, b in itertools.pairwise(names) if a == b), None):
        raise DataError(f"{printable(double)}: is named twice; name each image once")
    return Source((), [FileChunk.of("", 0, [(name, -1) for name in names])])


def run(arguments: argparse.Namespace) -> int:
    """Do what `add_arguments` were told; returns the exit code.

    Raises UserError, and SystemExit(75) when a stop signal comes: nothing is written before all is done.
    """
    settings, found = check_arguments(arguments)
    signals.leave_at_once(PREEMPTED, _STOPPED)
    from simclr_dist.evaluate.embed import run_checked

    signals.exit_when_asked(PREEMPTED, _STOPPED)
    return run_checked(arguments.encoder, found, arguments.out, settings, device=arguments.device)
