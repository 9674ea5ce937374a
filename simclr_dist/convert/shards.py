"""Images to WebDataset shards and a manifest: every image is decoded once, and what is no image is listed and left out.

Two passes. The first reads the source in order and decodes everything, so that the second knows exactly which images exist:
only then can they be shuffled and dealt into full shards in a way that no number of processes can change. Both leave whole
files in DST.partial, so a conversion that was killed goes on, and the first pass can be done in parts on several machines.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from simclr_dist.convert.dealing import SPLIT_NAMES, deal
from simclr_dist.convert.decoding import Decoder, gather, unit_path
from simclr_dist.convert.finished import ShardSummary, has_record, read_record, stamp_of, write_record
from simclr_dist.convert.partial import Partial, StaleError, check, hold, sync
from simclr_dist.convert.sources.find import find_source
from simclr_dist.convert.sources.originals import Problem, ReadError, Source
from simclr_dist.convert.workers import Map, processes_for, workers
from simclr_dist.convert.writing import Writer, cut, write_manifests
from simclr_dist.system.errors import ConfigError, DataError

_FORMAT = 1
_PRELOAD = ("simclr_dist.convert.decoding", "webdataset.writer")


@dataclass(frozen=True)
class ShardSettings:
    """What decides the bytes of a conversion, beside its source; see `write_shards`. Raises ConfigError out of range."""

    shard_size: int = 1000
    seed: int = 0
    short_side: int | None = None
    quality: int = 95
    split: tuple[float, ...] | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        _check_range("shard_size", self.shard_size, 1)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("short_side", self.short_side, 1)
        _check_range("quality", self.quality, 1, 100)
        split = self.split
        if split is not None and (len(split) != 2 or min(split) <= 0 or not abs(sum(split) - 1) <= 1e-6):
            shares = "/".join(f"{share:g}" for share in split)
            raise ConfigError(f"split: {shares} must be two shares above 0, train and test, that add up to 1, like 0.8/0.2")


def _check_range(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        raise ConfigError(f"{name}: {value} is out of range; give {f'{low} to {high}' if high else f'{low} or more'}")


@dataclass(frozen=True)
class PartSummary:
    """What `write_part` did: `good` and `bad` images of its share, and how many of all `parts` are done now."""

    good: int
    bad: int
    first_bad: str
    parts_done: int


def write_shards(
    source: str | Path,
    destination: str | Path,
    *,
    shard_size: int = 1000,
    seed: int = 0,
    short_side: int | None = None,
    quality: int = 95,
    split: tuple[float, ...] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processes: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> ShardSummary:
    """Convert the images of `source` (see `find_source`) to tars of `shard_size` images and a manifest in `destination`.

    Images are shuffled by `seed`; the same input, settings and seed give the same bytes for any number of `processes`
    (None: one for each CPU if there is work for it; with more than one, call this under `if __name__ == "__main__"`).
    `split`, like (0.8, 0.2), writes `destination`/train and /test, stratified by label, images with equal bytes on one side.
    See `prepare_image` for `short_side` and `quality`. Nothing is at `destination` before all of it is; the work is done in
    `destination`.partial, which for tables, zips and converted images takes as much disk again, and where the same call goes
    on after a kill, an interruption or a full disk. `destination`/rejected.jsonl lists what was rejected, conversion.json holds
    the settings: where they, and the source's files, are the same, nothing is done.

    Raises ConfigError for a setting out of range; DataError when no image can be used, when `destination` holds something
    else or cannot be written, when an unfinished conversion beside it had other settings or images, and, if `strict`, when any
    image is rejected.
    """
    settings = ShardSettings(shard_size, seed, short_side, quality, split, image_column, label_column)
    conversion = _Conversion(source, destination, settings, parts=1, processes=processes, progress=progress)
    if (done := conversion.finished(strict=strict)) is not None:
        return done
    with _disk_errors(conversion.destination), hold(conversion.destination, conversion.about) as partial:
        try:
            return conversion.finish(partial, strict=strict)
        except (StaleError, ReadError):
            raise
        except DataError:
            partial.remove()  # nothing to go on with
            raise


def write_part(
    source: str | Path,
    destination: str | Path,
    settings: ShardSettings,
    part: int,
    parts: int,
    *,
    processes: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> PartSummary:
    """Decode the share `part` (from 1) of `parts` of a conversion, into `destination`.partial; `finish_shards` does the rest.

    Parts may run at once and on several machines that share the disk; one that was stopped goes on. Raises as `write_shards`.
    """
    _check_range("parts", parts, 1, 100_000)
    _check_range("part", part, 1, parts)
    conversion = _Conversion(source, destination, settings, parts=parts, processes=processes, progress=progress)
    conversion.check_unused()
    with _disk_errors(conversion.destination), hold(conversion.destination, conversion.about, part) as partial:
        with conversion.workers(share := range(part - 1, len(conversion.source.chunks), parts)) as run:
            good, bad, first_bad = conversion.decode(partial, share, run)
        if strict and bad:
            raise DataError(f"{source}: strict, and {bad} images of part {part} cannot be used; the first: {first_bad}")
        return PartSummary(good, bad, first_bad, parts - len(conversion.missing_parts(partial)))


def finish_shards(
    source: str | Path,
    destination: str | Path,
    settings: ShardSettings,
    *,
    processes: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> ShardSummary:
    """Write the shards of a conversion whose parts are all done: the bytes that `write_shards` gives with the same settings.

    As there, nothing is done where that has been done already.

    Raises DataError that names the parts that are missing; what is in `destination`.partial is left for the next try.
    """
    beside = Partial.of(Path(destination).resolve())
    parts = 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        parts = int(json.loads(beside.settings.read_text(encoding="ascii"))["parts"])
    conversion = _Conversion(source, destination, settings, parts=parts, processes=processes, progress=progress)
    if (done := conversion.finished(strict=strict)) is not None:
        return done
    if not parts:
        raise DataError(f"{destination}: there are no parts of it; begin with --part 1/N ({beside.folder})")
    check(beside, conversion.about)
    with _disk_errors(conversion.destination), hold(conversion.destination, conversion.about) as partial:
        if missing := conversion.missing_parts(partial):
            named = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            raise DataError(
                f"{destination}: of {parts} parts these are not done: {named}; run each, like --part {missing[0]}/{parts}"
            )
        return conversion.finish(partial, strict=strict)


class _Conversion:
    """One source on its way to one destination; raises what `write_shards` raises before anything is done."""

    def __init__(
        self,
        source: str | Path,
        destination: str | Path,
        settings: ShardSettings,
        *,
        parts: int,
        processes: int | None,
        progress: bool,
    ) -> None:
        _check_range("processes", processes, 1)
        self.name, self.settings, self.parts = source, settings, parts
        self.destination = Path(destination).resolve()
        with _disk_errors(self.destination):
            _check_destination(self.destination, Path(source).resolve())
        self.source: Source = find_source(source, image_column=settings.image_column, label_column=settings.label_column)
        self.processes = processes_for(len(self.source)) if processes is None else processes
        self.bar: Callable[..., tqdm[Any]] = bind(tqdm, unit="image", disable=not (progress and sys.stderr.isatty()))
        listing = hashlib.sha256(json.dumps(self.source.classes).encode())
        for chunk in self.source.chunks:
            listing.update(chunk.identity())
        self.about: dict[str, object] = {
            "source": str(Path(source).resolve()), **asdict(settings), "parts": parts, "listing": listing.hexdigest(),
            "format": _FORMAT, "Pillow": PIL.__version__,
        }  # fmt: skip

    def check_unused(self) -> None:
        """Raises DataError when the destination holds something."""
        if self.destination.is_dir() and any(self.destination.iterdir()):
            raise DataError(f"{self.destination}: exists and is not empty; name a new folder")

    def finished(self, *, strict: bool) -> ShardSummary | None:
        """What an earlier run of this conversion has done; None where there is none. Raises as `check_unused` for others."""
        done = None
        if has_record(self.destination):
            about = self._lasting(stamp_of(chunk.stamp().hex() for chunk in self.source.chunks))
            done = read_record(self.destination, about, self.source, SPLIT_NAMES if self.settings.split else ("",))
        if done is None:
            self.check_unused()
            return None
        _check_images(self.name, done.written, done.rejected, strict)
        Partial.of(self.destination).remove()  # of a run that was killed when all was in place
        return done

    def _lasting(self, stamp: str) -> dict[str, object]:
        """What the finished conversion is recognised by: not by paths, parts and versions that change no image."""
        kept = (*asdict(self.settings), "listing", "format")
        return {name: self.about[name] for name in kept} | {"stamp": stamp}

    def workers(self, units: range) -> Any:
        """Processes for so many units."""
        return workers(min(self.processes, len(units)), _PRELOAD)

    def missing_parts(self, partial: Partial) -> list[int]:
        """Parts with a unit that is not there."""
        units = range(len(self.source.chunks))
        return sorted({unit % self.parts + 1 for unit in units if not unit_path(partial, unit).exists()})

    def decode(self, partial: Partial, units: range, run: Map) -> tuple[int, int, str]:
        """First pass over these units; good and bad images, and the first bad one."""
        digest = hashlib.sha256(json.dumps(self.about).encode()).hexdigest()
        decoder = Decoder(partial, digest, self.parts, self.settings.short_side, self.settings.quality)
        good, bad, first_bad = 0, 0, ""
        total = sum(len(self.source.chunks[unit]) for unit in units)
        with self.bar(desc="decoding", total=total) as shown:
            for fine, wrong, first in run(decoder, ((unit, self.source.chunks[unit]) for unit in units)):
                good, bad, first_bad = good + fine, bad + wrong, first_bad or first
                shown.update(fine + wrong)
        return good, bad, first_bad

    def finish(self, partial: Partial, *, strict: bool) -> ShardSummary:
        """What is left of both passes, and the destination in its place."""
        units = range(len(self.source.chunks))
        with self.workers(units) as run:
            self.decode(partial, units, run)
            records = gather(partial, len(units))
            rejected = self.source.rejected + records.rejected
            _check_images(self.name, len(records.index), rejected, strict)
            settings = self.settings
            sides = deal(
                records.index, records.label, records.sha256, total=len(self.source), seed=settings.seed, split=settings.split
            )
            shards = cut(sides, settings.shard_size)
            for side in sides:
                (partial.out / side).mkdir(exist_ok=True)
            with self.bar(desc="writing", total=len(records.index)) as shown:
                for written in run(Writer(partial, self.source.classes), shards):
                    shown.update(written)
        total_bytes = write_manifests(partial, shards, self.source.classes)
        for path in write_record(partial.out, self._lasting(stamp_of(records.stamps)), records.converted, rejected):
            sync(path)
        sync(partial.out)
        partial.out.rename(self.destination)
        sync(self.destination.parent)
        partial.remove()
        return ShardSummary(
            destinations=tuple(self.destination / side for side in sides),
            written=len(records.index),
            shards=len(shards),
            bytes=total_bytes,
            classes=self.source.classes,
            rejected=rejected,
            skipped=self.source.skipped,
            converted=records.converted,
            duplicates=len(records.sha256) - len(np.unique(records.sha256)),
        )


@contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    """One line for a disk that fails and for a process that dies, after which the same command goes on."""
    try:
        yield
    except BrokenProcessPool:
        raise DataError(
            f"{destination}: a worker process died, perhaps for lack of memory; use fewer processes, and it goes on from there"
        ) from None
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error.strerror or error}") from None


def _check_destination(destination: Path, source: Path) -> None:
    if destination.is_relative_to(source) or source.is_relative_to(destination):
        raise DataError(f"{destination}: lies inside the source or holds it; name a folder elsewhere")
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; name a new folder")
    if destination.is_dir() and destination.is_mount():
        raise DataError(f"{destination}: is a mount point, which cannot be put in place at once; name a folder inside it")


def _check_images(source: str | Path, good: int, rejected: tuple[Problem, ...], strict: bool) -> None:
    first = f"{rejected[0].name} ({rejected[0].reason})" if rejected else ""
    if not good:
        raise DataError(f"{source}: none of its {len(rejected)} images can be used; the first: {first}")
    if strict and rejected:
        raise DataError(f"{source}: strict, and {len(rejected)} images cannot be used; the first: {first}")
