"""Convert images to WebDataset shards and a manifest. What is no image is listed and left out.

Two passes. The first reads the source in order and decodes everything. So the second knows exactly which images exist:
only then can they be shuffled and dealt into full shards in a way that no number of processes can change. Both leave whole
files in DST.partial. So a conversion that was killed goes on, and several machines can do parts of the first pass.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from simclr_dist.config.ranges import Range
from simclr_dist.convert.dealing import SPLIT_NAMES, deal, find_copies
from simclr_dist.convert.decoding import Decoder, Records, gather, names_of
from simclr_dist.convert.finished import RECORD_NAME, ShardSummary, read_record, write_info, write_record
from simclr_dist.convert.partial import Partial, StaleError, check, hold, part_of
from simclr_dist.convert.settings import ShardSettings
from simclr_dist.convert.sources.find import find_source
from simclr_dist.convert.sources.originals import Problem, ReadError, Source, split_names
from simclr_dist.convert.workers import Map, processes_for, workers
from simclr_dist.convert.writing import Writer, cut, write_manifests
from simclr_dist.data.manifest import read_manifest
from simclr_dist.data.pixels import tiff
from simclr_dist.system.errors import ConfigError, DamagedError, DataError, refusing
from simclr_dist.system.files import read_object, sync
from simclr_dist.system.progress import Progress

_FORMAT = 1


def _check_range(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is not None and (why := Range(least=least, most=most).refusal(value)):
        raise ConfigError(f"{name}: {value} {why}")


@dataclass(frozen=True)
class PartSummary:
    """The result of `write_part`: `good` and `bad` images of its share. `parts_done` counts all parts that are done now."""

    good: int
    bad: int
    first_bad: str
    parts_done: int


def write_shards(
    source: str | Path, destination: str | Path,
    *, processes: int | None = None, strict: bool = False, progress: bool = False, **settings: Any,
) -> ShardSummary:  # fmt: skip
    """Convert the images of `source` to tars and a manifest. `source` is as in `find_source`, the result in `destination`.

    `settings` are those of `ShardSettings`, by name. The same input and settings give the same bytes for any number of
    `processes` (None: one for each CPU if there is work for it; with more than one, call this under `if __name__ ==
    "__main__"`). `split`, like (0.8, 0.2), writes `destination`/train and /test, images with equal bytes on one side. Nothing
    is at `destination` before all of it is. The work is done in `destination`.partial, which for tables, zips and converted
    images takes as much disk again. There the same call goes on after a kill, an interruption or a full disk.
    `destination`/rejected.jsonl lists what was rejected; conversion.json holds the settings, and counts of what was left out.
    Where settings and the source's files are the same, nothing is done.

    Raises ConfigError for a setting out of range; DataError when no image can be used, when `destination` holds something
    else or cannot be written, when an unfinished conversion beside it had other settings or images, and, if `strict`, when any
    image is rejected.
    """
    conversion = _Conversion(source, destination, ShardSettings(**settings), parts=1, processes=processes, progress=progress)
    if (done := conversion.finished(strict=strict)) is not None:
        return done
    with hold(conversion.destination, conversion.about) as partial:
        try:
            return conversion.finish(partial, strict=strict)
        except (StaleError, ReadError):
            raise
        except DataError:
            partial.remove()  # nothing to go on with
            raise


def parts_left(source: str | Path, destination: str | Path, settings: ShardSettings, parts: int) -> list[int] | None:
    """List the parts that are not done. Return None where the shards are. Nothing is written. Raises as `write_part`."""
    conversion = _Conversion(source, destination, settings, parts=parts, processes=1, progress=False)
    if conversion.finished(strict=False) is not None:
        return None
    partial = Partial(conversion.destination)
    if os.path.lexists(partial.folder):
        partial.check_ours()
    if partial.settings.exists():
        check(partial, conversion.about)
    return conversion.missing_parts(partial)


def write_part(
    source: str | Path, destination: str | Path, settings: ShardSettings, part: int, parts: int,
    *, processes: int | None = None, strict: bool = False, progress: bool = False,
) -> PartSummary:  # fmt: skip
    """Decode share `part` (from 1) of `parts` into `destination`.partial. `finish_shards` does the rest.

    Parts may run at once and on several machines that share the disk. A stopped part goes on. Raises as `write_shards`.
    """
    _check_range("parts", parts, 1, 100_000)
    _check_range("part", part, 1, parts)
    conversion = _Conversion(source, destination, settings, parts=parts, processes=processes, progress=progress)
    conversion.check_unused()
    with hold(conversion.destination, conversion.about, part) as partial:
        with conversion.workers(share := range(part - 1, len(conversion.source.chunks), parts)) as run:
            good, bad, first_bad = conversion.decode(partial, share, run)
        if strict and bad:
            raise DataError(f"{source}: strict, and {bad} images of part {part} cannot be used; the first: {first_bad}")
        return PartSummary(good, bad, first_bad, parts - len(conversion.missing_parts(partial)))


def finish_shards(
    source: str | Path, destination: str | Path, settings: ShardSettings,
    *, processes: int | None = None, strict: bool = False, progress: bool = False,
) -> ShardSummary:  # fmt: skip
    """Write the shards of a conversion whose parts are all done. The bytes are those of `write_shards`.

    As there, nothing is done twice. Raises DataError that names missing parts. `destination`.partial is left for the next try.
    """
    beside = Partial(Path(destination).resolve())
    parts = 0
    with suppress(DamagedError):
        parts = read_object(beside.settings, {"parts": int}).get("parts", 0)
    conversion = _Conversion(source, destination, settings, parts=parts, processes=processes, progress=progress)
    if (done := conversion.finished(strict=strict)) is not None:
        return done
    if not parts:
        raise DataError(f"{destination}: there are no parts of it; begin with --part 1/N ({beside.folder})")
    check(beside, conversion.about)
    with hold(conversion.destination, conversion.about) as partial:
        if missing := conversion.missing_parts(partial):
            named = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            cure = f"run each, like --part {missing[0]}/{parts}"
            raise DataError(f"{destination}: of {parts} parts these are not done: {named}; {cure}")
        return conversion.finish(partial, strict=strict)


class _Conversion:
    """One source on its way to one destination. Raises what `write_shards` raises before anything is done."""

    def __init__(
        self, source: str | Path, destination: str | Path, settings: ShardSettings,
        *, parts: int, processes: int | None, progress: bool,
    ) -> None:  # fmt: skip
        _check_range("processes", processes, 1)
        self.name, self.settings, self.parts = source, settings, parts
        self.destination = Path(destination).resolve()
        with refusing(f"{self.destination}: cannot be written"):
            _check_destination(self.destination, Path(source).resolve())
        self.source: Source = find_source(source, image_column=settings.image_column, label_column=settings.label_column)
        self.processes = processes_for(len(self.source)) if processes is None else processes
        self.progress = progress
        listing = hashlib.sha256(json.dumps(self.source.classes).encode())
        for chunk in self.source.chunks:
            listing.update(chunk.identity())
        self.about: dict[str, object] = {
            "source": str(Path(source).resolve()), **settings.described(), "parts": parts, "listing": listing.hexdigest(),
            "format": _FORMAT, "Pillow": PIL.__version__, **tiff.reader(),
        }  # fmt: skip

    def check_unused(self) -> None:
        if self.destination.is_dir() and any(self.destination.iterdir()):
            raise DataError(f"{self.destination}: exists and is not empty; name a new folder")

    def finished(self, *, strict: bool) -> ShardSummary | None:
        """Read the result of an earlier run of this conversion. Returns None without one. Refuses any other content."""
        done = None
        if (self.destination / RECORD_NAME).exists():  # stamps of all files take a while
            about = self._lasting(chunk.stamp().hex() for chunk in self.source.chunks)
            done = read_record(self.destination, about, self.source, SPLIT_NAMES[len(self.settings.split or ())])
        if done is None:
            self.check_unused()
            return None
        _check_images(self.name, done.written, done.rejected, strict)
        if Partial(self.destination).folder.exists():  # left by a run that was killed when all was in place
            with suppress(DataError, OSError), hold(self.destination, self.about) as partial:
                partial.remove()
        return done

    def _lasting(self, stamps: Iterable[str]) -> dict[str, object]:
        """Return the settings that identify the finished conversion. Paths, parts and versions change no image: left out."""
        kept = {name: self.about[name] for name in (*self.settings.described(), "listing", "format")}
        return kept | {"stamp": hashlib.sha256("".join(stamps).encode()).hexdigest()}

    def workers(self, units: range, *more: str) -> Any:
        preload, cure = ("simclr_dist.convert.decoding", *more), "use fewer processes, and it goes on from there"
        return workers(min(self.processes, len(units)), preload, self.destination, cure)

    def missing_parts(self, partial: Partial) -> list[int]:
        """List the parts with a unit that is not there."""
        units = range(len(self.source.chunks))
        return sorted({part_of(unit, self.parts) for unit in units if not partial.unit(unit).exists()})

    def decode(self, partial: Partial, units: range, run: Map) -> tuple[int, int, str]:
        """Do the first pass over these units. Returns the numbers of good and bad images, and the first bad one."""
        digest = hashlib.sha256(json.dumps(self.about).encode()).hexdigest()
        decoder = Decoder(partial, digest, self.parts, self.settings.short_side, self.settings.quality, self.settings.kind)
        good, bad, first_bad = 0, 0, ""
        total = sum(len(self.source.chunks[unit]) for unit in units)
        with Progress("decoding", total, "images", shown=self.progress) as shown:
            for fine, wrong, first in run(decoder, ((unit, self.source.chunks[unit]) for unit in units)):
                good, bad, first_bad = good + fine, bad + wrong, first_bad or first
                shown.done += fine + wrong
        return good, bad, first_bad

    def finish(self, partial: Partial, *, strict: bool) -> ShardSummary:
        """Do what is left of both passes. Then put the destination in its place."""
        units = range(len(self.source.chunks))
        with self.workers(units, "webdataset.writer") as run:
            self.decode(partial, units, run)
            records = gather(partial, len(units))
            rejected = self.source.rejected + records.rejected
            _check_images(self.name, len(records.index), rejected, strict)
            settings, total = self.settings, len(self.source)
            sides = deal(records.index, records.label, records.sha256, total=total, seed=settings.seed, split=settings.split)
            shards = cut(sides, settings.shard_size)
            sizes = {side: {shard.name: len(shard.rows) for shard in shards if shard.side == side} for side in sides}
            for side in sides:
                (partial.out / side).mkdir(exist_ok=True)
            with Progress("writing", len(records.index), "images", shown=self.progress) as shown:
                for written in run(Writer(partial, self.source.classes), shards):
                    shown.done += written
        total_bytes = write_manifests(partial, shards, self.source.classes, self.settings.kind)
        copies = self._copies(partial, records)
        about = self._lasting(records.stamps)
        for path in write_record(partial.out, about, records.converted, records.changes, rejected, self.source.skipped, copies):
            sync(path)
        for path in write_info(partial.out, sizes):
            sync(path)
        sync(partial.out)
        partial.out.rename(self.destination)
        sync(self.destination.parent)
        partial.remove()
        return ShardSummary(
            tuple(self.destination / side for side in sides), tuple(sum(sizes[side].values()) for side in sides),
            shards=len(shards), bytes=total_bytes,
            classes=self.source.classes, rejected=rejected, skipped=self.source.skipped, converted=records.converted,
            changes=records.changes, duplicates=len(records.sha256) - len(np.unique(records.sha256)), copies=copies,
            links=self.source.links,
        )  # fmt: skip

    def _copies(self, partial: Partial, records: Records) -> tuple[Problem, ...]:
        """Name images that the other side of a split has, sharded before. Those that come twice in this one follow."""
        copies: list[Problem] = []
        sides = split_names((path.name for path in self.destination.parent.iterdir()), folders=True)
        for side in sides if split_names([self.destination.name], folders=True) else ():
            with suppress(DataError):  # not in shards yet, or not of ours
                other = read_manifest(self.destination.with_name(side))
                shared = np.flatnonzero(np.isin(records.sha256, other.sha256.view("S32")))
                why = f"the same bytes as an image of {other.folder}, so on both sides of the split"
                copies += [Problem(name, why) for name in names_of(partial, shared)]
        pairs = zip(*(names_of(partial, rows) for rows in find_copies(records.sha256)), strict=True)
        return *copies, *(Problem(name, f"the same bytes as {first}") for name, first in pairs)


def _check_destination(destination: Path, source: Path) -> None:
    if destination.is_relative_to(source) or source.is_relative_to(destination):
        raise DataError(f"{destination}: lies inside the source or holds it; name a folder elsewhere")
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; name a new folder")
    if destination.is_dir() and destination.is_mount():
        raise DataError(f"{destination}: is a mount point, which cannot be put in place at once; name a folder inside it")


def _check_images(source: str | Path, good: int, rejected: tuple[Problem, ...], strict: bool) -> None:
    if not good:
        raise DataError(f"{source}: none of its {len(rejected)} images can be used; the first: {rejected[0]}")
    if strict and rejected:
        raise DataError(f"{source}: strict, and {len(rejected)} images cannot be used; the first: {rejected[0]}")
