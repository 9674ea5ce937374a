"""Run the first pass of a conversion. It decodes every image once, and each chunk becomes a unit on disk."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simclr_dist.convert.partial import Partial, StaleError, part_of, put
from simclr_dist.convert.sources.originals import Chunk, Original, Problem
from simclr_dist.data.manifest import row_table
from simclr_dist.data.pixels.channels import prepare
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.system.errors import DataError, printable, reason_of

_ABOUT = b"simclr_dist"
_ROWS_A_BATCH = 1 << 16
# The bytes are in `path`, or in `unit` when that is empty. `name` and `path` need not be valid text.
_SCHEMA = pa.schema([
    ("unit", pa.int32()), ("index", pa.int64()), ("name", pa.binary()), ("label", pa.int64()), ("extension", pa.string()),
    ("width", pa.int32()), ("height", pa.int32()), ("path", pa.binary()), ("offset", pa.int64()), ("size", pa.int64()),
    ("sha256", pa.binary(32)), ("converted", pa.bool_()),
])  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """Makes units. It is picklable. `settings` is a digest of what the conversion's runs agree on."""

    partial: Partial
    settings: str
    parts: int
    short_side: int | None
    quality: int
    kind: Kind

    def __call__(self, task: tuple[int, Chunk]) -> tuple[int, int, str]:
        """Make a chunk's unit unless it is there. Returns the numbers of good and bad images, and the first bad.

        Raises StaleError for a unit made with other settings, or from files that have been written to since.
        """
        number, chunk = task
        path = self.partial.unit(number)
        stamp = chunk.stamp().hex()
        if (about := _read_about(path)) is not None:
            if about["settings"] != self.settings:
                part = f"(part {part_of(number, self.parts)}) " if self.parts > 1 else ""
                raise StaleError(
                    f"{path}: {part}was made with other settings; remove that file, and its .bytes, to make it anew"
                )
            if about["stamp"] != stamp:
                (first, *_) = chunk.read()
                raise StaleError(
                    f"{printable(first.name)}, or one of the {len(chunk) - 1} after it: has changed since the conversion in "
                    f"{self.partial.folder} was begun; remove that folder to start anew"
                )
        else:
            about = self._make(number, chunk, stamp)
        rejected = about["rejected"]
        return about["good"], len(rejected), ": ".join(rejected[0]) if rejected else ""

    def _make(self, number: int, chunk: Chunk, stamp: str) -> dict[str, Any]:
        rows: list[tuple[Any, ...]] = []
        rejected: list[Problem] = []
        changes: Counter[str] = Counter()
        temporary = self.partial.temporary()
        try:
            with temporary.open("xb") as file:
                for original in chunk.read():
                    try:
                        content, row, changed = self._row(number, original, file.tell())
                    except DataError as error:
                        rejected.append(Problem(printable(original.name), str(error)))
                        continue
                    rows.append(row)
                    changes.update(changed)
                    file.write(content)
                kept = file.tell()
            if kept:
                put(temporary, self.partial.unit(number, "bytes"))
        finally:
            temporary.unlink(missing_ok=True)
        about = {"settings": self.settings, "stamp": stamp, "good": len(rows), "rejected": rejected, "changes": changes}
        table = row_table(rows, _SCHEMA.with_metadata({_ABOUT: json.dumps(about).encode()}))
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)
        put(temporary, self.partial.unit(number))
        return about

    def _row(self, number: int, original: Original, kept: int) -> tuple[bytes, tuple[Any, ...], tuple[str, ...]]:
        """Make the record. Returns bytes to keep in the unit (which has `kept`), it, and what was changed. Raises DataError."""
        if original.problem is not None:
            raise DataError(original.problem)
        image = prepare(original.content, self.kind, short_side=self.short_side, quality=self.quality)
        converted = image.content is not original.content
        readable = original.path is not None and not converted  # the source gives the same bytes again
        path, offset = (original.path, original.offset) if readable else ("", kept)
        return b"" if readable else image.content, (
            number, original.index, os.fsencode(original.name), original.label, image.extension, image.width, image.height,
            os.fsencode(path or ""), offset, len(image.content), hashlib.sha256(image.content).digest(), converted,
        ), image.changes  # fmt: skip


def _read_about(path: Path) -> dict[str, Any] | None:
    """Read a unit's metadata. Returns None when there is no unit, or none that can be read."""
    try:
        with pa.memory_map(str(path)) as file:
            about: dict[str, Any] = json.loads(pa.ipc.open_file(file).schema.metadata[_ABOUT])
            return about
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Records:
    """All good images, in the order of `Partial.records`. `sha256` has 32 bytes each.

    `converted` counts those that are stored re-encoded, `changes` why, by kind. `stamps` has that of each unit's chunk, as it
    was read.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    sha256: NDArray[np.bytes_]
    converted: int
    changes: dict[str, int]
    rejected: tuple[Problem, ...]
    stamps: tuple[str, ...]


def names_of(partial: Partial, rows: NDArray[np.int64]) -> list[str]:
    """Return printable names of records. `rows` are their places in `Partial.records`."""
    with pa.memory_map(str(partial.records)) as file:
        names = pa.ipc.open_file(file).read_all().column("name").take(pa.array(rows))
        return [printable(os.fsdecode(name)) for name in names.to_pylist()]


def gather(partial: Partial, units: int) -> Records:
    """Gather the records of all units in one file. 48 bytes an image stay in memory."""
    rejected: list[Problem] = []
    stamps: list[str] = []
    changes: Counter[str] = Counter()
    waiting: list[pa.Table] = []
    temporary = partial.temporary()
    with pa.ipc.new_file(str(temporary), _SCHEMA) as writer:
        for number in range(units):
            path = partial.unit(number)
            try:
                with pa.memory_map(str(path)) as file:
                    table = pa.ipc.open_file(file).read_all()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: cannot be read ({reason_of(error)}); run the same command again") from None
            about = json.loads(table.schema.metadata[_ABOUT])
            rejected += [Problem(*entry) for entry in about["rejected"]]
            stamps.append(about["stamp"])
            changes.update(about.get("changes", {}))  # a unit of an earlier version has none
            waiting.append(table.replace_schema_metadata(None))
            if sum(map(len, waiting)) >= _ROWS_A_BATCH or number == units - 1:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
    put(temporary, partial.records)
    with pa.memory_map(str(partial.records)) as file:
        table = pa.ipc.open_file(file).read_all()
        hashes = table.column("sha256").combine_chunks()
        return Records(
            table.column("index").to_numpy().copy(),
            table.column("label").to_numpy().copy(),
            np.frombuffer(hashes.buffers()[1], "S32", len(hashes)).copy() if len(hashes) else np.zeros(0, "S32"),
            pc.sum(table.column("converted"), min_count=0).as_py(),
            dict(changes),
            tuple(rejected),
            tuple(stamps),
        )
