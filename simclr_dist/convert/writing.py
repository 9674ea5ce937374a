"""Run the second pass of a conversion. It reads the records' bytes again, checks them and writes tars."""

import hashlib
import itertools
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simclr_dist.convert.partial import Partial, put
from simclr_dist.convert.sources.tar import tar_members
from simclr_dist.data.index import write_index
from simclr_dist.data.manifest import ROW_SCHEMA, ManifestRow, row_table, write_manifest
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.system.errors import DataError, printable

_BYTES = b"bytes"


class Shard(NamedTuple):
    """A tar to write. `side` ('', train or test) is a folder in the destination; `rows` are places in the records."""

    side: str
    name: str
    rows: NDArray[np.int64]


def cut(sides: dict[str, NDArray[np.int64]], shard_size: int) -> list[Shard]:
    return [
        Shard(side, f"shard-{number:06d}.tar", rows[first : first + shard_size])
        for side, rows in sides.items()
        for number, first in enumerate(range(0, len(rows), shard_size))
    ]


@dataclass(frozen=True)
class Writer:
    """Writes tars. It is picklable."""

    partial: Partial
    classes: tuple[str, ...]

    def __call__(self, shard: Shard) -> int:
        """Write a tar and its manifest rows, unless they are there. Returns the number of images."""
        path = self.partial.out / shard.side / shard.name
        with suppress(OSError, pa.ArrowException, KeyError, TypeError):
            if _read_rows(self.partial, shard).schema.metadata[_BYTES] == str(path.stat().st_size).encode():
                return len(shard.rows)
        with pa.memory_map(str(self.partial.records)) as file:
            records = pa.ipc.open_file(file).read_all().take(pa.array(shard.rows)).to_pylist()
        temporary = self.partial.temporary()
        try:
            self._write_tar(temporary, records)
            offsets = {member.name: member.offset for member in tar_members(temporary)}
            size = temporary.stat().st_size
            rows = row_table([
                ManifestRow(
                    f"{r['index']:09d}", shard.name, offsets[f"{r['index']:09d}.{r['extension']}"],
                    r["size"], r["label"], r["width"], r["height"], r["sha256"],
                )
                for r in records
            ])  # fmt: skip
            put(temporary, path)
            with pa.ipc.new_file(str(temporary), schema := ROW_SCHEMA.with_metadata({_BYTES: str(size)})) as writer:
                writer.write_table(rows.cast(schema))
            put(temporary, _rows_path(self.partial, shard))
        finally:
            temporary.unlink(missing_ok=True)
        return len(records)

    def _write_tar(self, path: Path, records: list[dict[str, Any]]) -> None:
        from webdataset.writer import TarWriter  # brings torch with it, which the first pass needs not wait for

        # An integer mtime keeps tarfile from adding PAX headers; user and group are webdataset's fixed ones.
        with path.open("xb") as file, TarWriter(file, encoder=False, mtime=0, format="USTAR_FORMAT") as tar:
            for record in records:
                width, height, label = record["width"], record["height"], record["label"]
                about: dict[str, object] = {"source": os.fsdecode(record["name"]), "width": width, "height": height}
                members = {"__key__": f"{record['index']:09d}", record["extension"]: self._read_again(record)}
                if label >= 0:
                    members["cls"] = str(label).encode()
                    about |= {"label": label} | ({"class_name": self.classes[label]} if self.classes else {})
                tar.write(members | {"json": json.dumps(about, sort_keys=True).encode()})

    def _read_again(self, record: dict[str, Any]) -> bytes:
        path = os.fsdecode(record["path"]) or self.partial.unit(record["unit"], "bytes")
        try:
            with Path(path).open("rb") as file:
                file.seek(record["offset"])
                content = file.read(record["size"])
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).digest() != record["sha256"]:
            name = printable(os.fsdecode(record["name"]))
            raise DataError(f"{name}: changed, or went, while it was being sharded; shard again when nothing writes to it")
        return content


def write_manifests(partial: Partial, shards: list[Shard], classes: tuple[str, ...], kind: Kind) -> int:
    """Write the manifest of each side. All tars must be there. Returns the bytes of all tars together."""
    total = 0
    for side, tars in itertools.groupby(shards, lambda shard: shard.side):
        tables = {shard.name: _read_rows(partial, shard) for shard in tars}
        total += sum(int(table.schema.metadata[_BYTES]) for table in tables.values())
        rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables.values()])
        write_index(write_manifest(partial.out / side, list(tables), rows, classes, kind))
    return total


def _rows_path(partial: Partial, shard: Shard) -> Path:
    return partial.rows / f"{shard.side}{shard.name}.arrow"


def _read_rows(partial: Partial, shard: Shard) -> pa.Table:
    return pa.ipc.open_file(_rows_path(partial, shard).read_bytes()).read_all()
