"""First pass of a conversion: every image is decoded once. A chunk's records, and bytes that its source cannot give again,
are a unit on disk: what is there is not done again."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simclr_dist.convert.partial import Partial, StaleError, put
from simclr_dist.convert.sources.originals import Chunk, Original, Problem, first_line
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import DataError, printable

_ABOUT = b"simclr_dist"
_ROWS_A_BATCH = 1 << 16
_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),  # where the bytes are, when `path` is empty
        ("index", pa.int64()),
        ("name", pa.binary()),  # need not be valid text
        ("label", pa.int64()),
        ("extension", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("path", pa.binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("converted", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Decoder:
    """Makes units; picklable. `settings` is a digest of what the conversion's runs agree on."""

    partial: Partial
    settings: str
    parts: int
    short_side: int | None
    quality: int

    def __call__(self, task: tuple[int, Chunk]) -> tuple[int, int, str]:
        """Make the unit of a chunk with its number, unless it is there; returns good and bad images, and the first bad.

        Raises StaleError for one made with other settings, or from files that have been written to since.
        """
        number, chunk = task
        path = unit_path(self.partial, number)
        stamp = chunk.stamp().hex()
        if (about := _read_about(path)) is not None:
            if about["settings"] != self.settings:
                part = f"(part {number % self.parts + 1}) " if self.parts > 1 else ""
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
        temporary = self.partial.temporary()
        try:
            with temporary.open("xb") as file:
                for original in chunk.read():
                    try:
                        content, row = self._row(number, original, file.tell())
                    except DataError as error:
                        rejected.append(Problem(printable(original.name), str(error)))
                        continue
                    rows.append(row)
                    file.write(content)
                kept = file.tell()
            if kept:
                put(temporary, bytes_path(self.partial, number))
        finally:
            temporary.unlink(missing_ok=True)
        about = {"settings": self.settings, "stamp": stamp, "good": len(rows), "rejected": rejected}
        columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        schema = _SCHEMA.with_metadata({_ABOUT: json.dumps(about).encode()})
        with pa.ipc.new_file(str(temporary), schema) as writer:
            writer.write(pa.record_batch(arrays, schema))
        put(temporary, unit_path(self.partial, number))
        return about

    def _row(self, number: int, original: Original, kept: int) -> tuple[bytes, tuple[Any, ...]]:
        """Bytes to keep in the unit, where `kept` are already, and the record; raises DataError for what is no image."""
        if original.problem is not None:
            raise DataError(original.problem)
        image = prepare_image(original.content, short_side=self.short_side, quality=self.quality)
        converted = image.content is not original.content
        again = original.path is not None and not converted
        path, offset = (original.path, original.offset) if again else ("", kept)
        return b"" if again else image.content, (
            number, original.index, os.fsencode(original.name), original.label, image.extension, image.width, image.height,
            os.fsencode(path or ""), offset, len(image.content), hashlib.sha256(image.content).digest(), converted,
        )  # fmt: skip


def unit_path(partial: Partial, number: int) -> Path:
    """A unit's records; it is there when the unit is done."""
    return partial.units / f"{number:06d}.arrow"


def bytes_path(partial: Partial, number: int) -> Path:
    """The bytes that a unit keeps."""
    return partial.units / f"{number:06d}.bytes"


def _read_about(path: Path) -> dict[str, Any] | None:
    """What a unit says of itself; None when there is none, or none that can be read."""
    try:
        with pa.memory_map(str(path)) as file:
            about: dict[str, Any] = json.loads(pa.ipc.open_file(file).schema.metadata[_ABOUT])
            return about
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Records:
    """What has to be known of all good images at once, in the order of `Partial.records`: arrays over n images.

    `index` and `label` int64, `sha256` as 32 bytes each; `converted` counts those that are stored re-encoded. `stamps`: of each
    unit's chunk, as it was read.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    sha256: NDArray[np.bytes_]
    converted: int
    rejected: tuple[Problem, ...]
    stamps: tuple[str, ...]


def gather(partial: Partial, units: int) -> Records:
    """The records of all units, in one file and, as far as must be, in memory (48 bytes an image)."""
    index, label, sha256, converted = [], [], [], 0
    rejected: list[Problem] = []
    stamps: list[str] = []
    temporary = partial.temporary()
    with pa.ipc.new_file(str(temporary), _SCHEMA) as writer:
        for table in _tables(partial, units, rejected, stamps):
            writer.write_table(table)
            batch = table.combine_chunks().to_batches()
            for part in batch:
                index.append(part.column("index").to_numpy().copy())
                label.append(part.column("label").to_numpy().copy())
                hashes = part.column("sha256")
                start = hashes.offset * 32
                sha256.append(np.frombuffer(hashes.buffers()[1], "S32", len(hashes), start).copy())
                converted += part.column("converted").true_count
    put(temporary, partial.records)
    empty = np.zeros(0, np.int64)
    return Records(
        np.concatenate([empty, *index]),
        np.concatenate([empty, *label]),
        np.concatenate([np.zeros(0, "S32"), *sha256]),
        converted,
        tuple(rejected),
        tuple(stamps),
    )


def _tables(partial: Partial, units: int, rejected: list[Problem], stamps: list[str]) -> Iterator[pa.Table]:
    """The units' records, some ten thousand together; their rejected images go to `rejected`, their stamps to `stamps`."""
    waiting: list[pa.Table] = []
    for number in range(units):
        path = unit_path(partial, number)
        try:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
                about = json.loads(table.schema.metadata[_ABOUT])
                rejected += [Problem(*entry) for entry in about["rejected"]]
                stamps.append(about["stamp"])
                waiting.append(table.replace_schema_metadata(None))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({first_line(error)}); run the same command again") from None
        if sum(map(len, waiting)) >= _ROWS_A_BATCH or number == units - 1:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
