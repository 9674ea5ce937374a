"""The manifest: a Parquet table beside the shards that says where each image lies, what it is, and what its bytes hash to."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simclr_dist.system.errors import DataError

MANIFEST_NAME = "manifest.parquet"
FORMAT_VERSION = 1

_METADATA_KEY = b"simclr_dist"
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """Every image of a folder of shards; arrays run over the n images, a shard's images next to each other, in shard order.

    `shards` are file names inside `folder`; `shard_sizes` int64 [s] counts the images of each. `shard` int32 [n] is an index
    into `shards`; `offset` and `size` int64 [n] locate the image's bytes inside the tar. `label` int64 [n] is -1 where there
    is none; `sha256` uint8 [n, 32] is of the image's bytes. `classes` are names by label, () when the source has none (labels
    may exist all the same). `digest` is the hex sha256 of the content (keys, hashes, labels, classes), whatever the folder.
    `folder` is a text when it is a URL (`data.collection`). `shard_bytes` int64 [s] are the sizes of the tars.
    """

    folder: Path | str
    shards: tuple[str, ...]
    shard_sizes: NDArray[np.int64]
    key: NDArray[np.str_]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    sha256: NDArray[np.uint8]
    classes: tuple[str, ...]
    digest: str
    shard_bytes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.key)


class ManifestRow(NamedTuple):
    """One image as `write_manifest` takes it; `shard` is the tar's file name, `sha256` 32 bytes."""

    key: str
    shard: str
    offset: int
    size: int
    label: int
    width: int
    height: int
    sha256: bytes


ROW_SCHEMA = pa.schema([_SCHEMA.field(name) for name in ManifestRow._fields])


def row_table(rows: Sequence[ManifestRow]) -> pa.Table:
    """Rows as a table, which takes a tenth of their memory."""
    columns = zip(*rows, strict=True) if rows else [()] * len(ROW_SCHEMA)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)], ROW_SCHEMA)


def write_manifest(folder: Path, shards: Sequence[str], rows: Sequence[ManifestRow] | pa.Table, classes: Sequence[str]) -> Path:
    """Write `folder`/manifest.parquet for the tars `shards`, which must be there already; return its path.

    `rows` come in shard order, as they are or as a table of `ROW_SCHEMA`. The same input gives the same bytes.
    """
    table = (rows if isinstance(rows, pa.Table) else row_table(rows)).combine_chunks()
    label = table.column("label").to_numpy()
    named = (
        pa.array(classes, pa.string()).take(pa.array(label, mask=label < 0)) if classes else pa.nulls(len(label), pa.string())
    )
    columns = {name: table.column(name) for name in table.column_names} | {"class_name": named}
    counts = dict.fromkeys(shards, 0)
    for entry in table.column("shard").value_counts().to_pylist():
        counts[entry["values"]] = entry["counts"]
    about = {
        "format": "simclr_dist.manifest",
        "version": FORMAT_VERSION,
        "shards": [{"name": name, "bytes": (folder / name).stat().st_size, "samples": counts[name]} for name in shards],
        "classes": list(classes),
    }
    arrays = [columns[field.name] for field in _SCHEMA]
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(about, sort_keys=True).encode()})
    path = folder / MANIFEST_NAME
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/manifest.parquet.

    Raises DataError when the folder or manifest is missing or not one of ours, when it contradicts itself, and when a shard
    is missing or has another byte size than recorded.
    """
    folder = Path(folder)
    manifest = parse_manifest(read_manifest_file(folder), folder)
    check_shards(manifest)
    return manifest


def read_manifest_file(folder: Path) -> bytes:
    """The bytes of `folder`/manifest.parquet; raises DataError when there is none."""
    path = folder / MANIFEST_NAME
    _require_file(folder, path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse_manifest(content: bytes, folder: Path | str) -> Manifest:
    """The manifest whose file, found in `folder` (a path or a URL), has these bytes; raises DataError for a bad one.

    Whether the shards are there is not looked at.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        # pyarrow's threads would make some 8 % of the commands that end soon after abort on their way out (134); read_table
        # starts one whatever it is told.
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
            table = file.read(use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); shard the images again") from None
    names, counts, classes = _read_about(folder, path, table)

    column = {name: table.column(name).to_numpy() for name in ("offset", "size", "label", "width", "height")}
    index = {name: i for i, name in enumerate(names)}
    shard = np.array([index.get(name, -1) for name in table.column("shard").to_pylist()], dtype=np.int32)
    sizes = np.array([samples for _, samples in counts], dtype=np.int64)
    shard_bytes = np.array([size for size, _ in counts], dtype=np.int64)
    if sizes.sum() != len(shard) or not np.array_equal(shard, np.repeat(np.arange(len(names)), sizes)):
        raise DataError(f"{path}: its rows do not follow its own list of shards; shard the images again")
    # Subtracting, not adding: offset + size of a damaged manifest may overflow.
    inside = (column["size"] > 0) & (column["offset"] >= 0) & (column["offset"] <= shard_bytes[shard] - column["size"])
    labels_known = (column["label"] >= -1) & ((column["label"] < len(classes)) if classes else True)
    positive = (column["width"] > 0) & (column["height"] > 0)
    if not (inside & labels_known & positive).all():
        row = int(np.flatnonzero(~(inside & labels_known & positive))[0])
        raise DataError(f"{path}: row {row} has an impossible offset, size or label; shard the images again")

    keys = table.column("key").to_pylist()
    hashes = np.frombuffer(b"".join(table.column("sha256").to_pylist()), dtype=np.uint8).reshape(-1, 32)
    return Manifest(
        folder=folder,
        shards=names,
        shard_sizes=sizes,
        key=np.array(keys, dtype=np.str_),
        shard=shard,
        sha256=hashes,
        classes=classes,
        digest=content_digest(keys, classes, hashes, column["label"]),
        shard_bytes=shard_bytes,
        **column,
    )


def content_digest(keys: Sequence[str], classes: Sequence[str], sha256: NDArray[np.uint8], label: NDArray[np.int64]) -> str:
    """`Manifest.digest` of these images."""
    digest = hashlib.sha256(json.dumps([list(keys), list(classes)]).encode())
    digest.update(sha256.tobytes())
    digest.update(label.astype("<i8").tobytes())
    return digest.hexdigest()


def check_shards(manifest: Manifest) -> None:
    """Raises DataError when a shard in the manifest's (local) folder is missing or has another size than recorded."""
    for name, recorded in zip(manifest.shards, manifest.shard_bytes.tolist(), strict=True):
        shard = Path(manifest.folder, name)
        try:
            found = shard.stat().st_size
        except OSError as error:
            raise DataError(
                f"{shard}: in {MANIFEST_NAME}, but {error.strerror}; copy it here or shard the images again"
            ) from None
        if found != recorded:
            raise DataError(
                f"{shard}: has {found} bytes, {MANIFEST_NAME} says {recorded}; copy it here or shard the images again"
            )


def _require_file(folder: Path, path: Path) -> None:
    if not os.path.isdir(folder):  # noqa: PTH112 (Path's raises for a name that is too long)
        raise DataError(f"{folder}: no such folder of shards; make one with `simclr-dist shard SRC {folder}`")
    if not path.is_file():
        inner = sorted(str(p.parent) for p in folder.glob(f"*/{MANIFEST_NAME}"))
        cure = f"name one of {', '.join(inner)}" if inner else f"make it with `simclr-dist shard SRC {folder}`"
        if not inner and any(folder.glob("*.tar")):
            cure = f"for tars of others `simclr-dist shard --index {folder}` writes one"
        raise DataError(f"{folder}: has no {MANIFEST_NAME}; {cure}")


def _read_about(
    folder: Path | str, path: str, table: pa.Table
) -> tuple[tuple[str, ...], list[tuple[int, int]], tuple[str, ...]]:
    """Shard names, (bytes, samples) of each, and class names from the schema's metadata."""
    foreign = DataError(f"{path}: not a manifest of simclr-dist; make one with `simclr-dist shard SRC {folder}`")
    text = (table.schema.metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise foreign
    try:
        about: Any = json.loads(text)
        version = about["version"]
        entries = [(str(s["name"]), int(s["bytes"]), int(s["samples"])) for s in about["shards"]]
        classes = tuple(str(name) for name in about["classes"])
    except (ValueError, TypeError, KeyError):
        raise foreign from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: manifest version {version}, this simclr-dist reads {FORMAT_VERSION}; shard the images again")
    if not table.schema.remove_metadata().equals(_SCHEMA) or any(c.null_count for c in _required_columns(table)):
        raise foreign
    if table.num_rows == 0:
        raise DataError(f"{path}: lists no image; shard the images again")
    names = tuple(name for name, _, _ in entries)
    # A name with a folder in it would make the reader open files outside the folder of shards.
    if len(set(names)) != len(names) or any(
        Path(name).name != name or name == ".." or samples < 1 for name, _, samples in entries
    ):
        raise foreign
    return names, [(size, samples) for _, size, samples in entries], classes


def _required_columns(table: pa.Table) -> list[pa.ChunkedArray]:
    return [table.column(field.name) for field in _SCHEMA if not field.nullable]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
