"""Write and read the manifest. This Parquet table beside the shards has each image's place, label, size in pixels and hash."""

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

from simclr_dist.system.errors import DataError, reason_of
from simclr_dist.system.files import replacing

MANIFEST_NAME = "manifest.parquet"
FORMAT_VERSION = 1

_METADATA_KEY = b"simclr_dist"
_COLUMNS = {
    "key": pa.string(), "shard": pa.string(), "offset": pa.int64(), "size": pa.int64(), "label": pa.int64(),
    "class_name": pa.string(), "width": pa.int32(), "height": pa.int32(), "sha256": pa.binary(32),
}  # fmt: skip
_SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "class_name") for name, kind in _COLUMNS.items()])


@dataclass(frozen=True)
class Manifest:
    """All images of a folder of shards. Arrays run over the n images, shard after shard.

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

    @property
    def short_side(self) -> float:
        """Return the median of the images' shorter sides, in pixels."""
        return float(np.median(np.minimum(self.width, self.height)))


class ManifestRow(NamedTuple):
    """One image as `write_manifest` takes it. `shard` is the tar's file name; `sha256` has 32 bytes."""

    key: str
    shard: str
    offset: int
    size: int
    label: int
    width: int
    height: int
    sha256: bytes


ROW_SCHEMA = pa.schema([_SCHEMA.field(name) for name in ManifestRow._fields])


def row_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema = ROW_SCHEMA) -> pa.Table:
    """Put rows into a table. It takes a tenth of their memory."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def write_manifest(folder: Path, shards: Sequence[str], rows: Sequence[ManifestRow] | pa.Table, classes: Sequence[str]) -> Path:
    """Write `folder`/manifest.parquet for the tars `shards`. The tars must be there already. Returns its path.

    `rows` come in shard order, as a sequence or as a table of `ROW_SCHEMA`. The same input gives the same bytes.
    """
    table = (rows if isinstance(rows, pa.Table) else row_table(rows)).combine_chunks()
    label = table.column("label").to_numpy()
    named = (
        pa.array(classes, pa.string()).take(pa.array(label, mask=label < 0)) if classes else pa.nulls(len(label), pa.string())
    )
    columns = {name: table.column(name) for name in table.column_names} | {"class_name": named}
    counts = {entry["values"]: entry["counts"] for entry in table.column("shard").value_counts().to_pylist()}
    about = {
        "format": "simclr_dist.manifest",
        "version": FORMAT_VERSION,
        "shards": [{"name": name, "bytes": (folder / name).stat().st_size, "samples": counts.get(name, 0)} for name in shards],
        "classes": list(classes),
    }
    arrays = [columns[field.name] for field in _SCHEMA]
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(about, sort_keys=True).encode()})
    path = folder / MANIFEST_NAME
    with replacing(path) as file:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd")
    return path


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/manifest.parquet.

    Raises DataError when the manifest is missing, foreign or contradicts itself. Raises it, too, when a shard is missing or has
    another size than recorded.
    """
    manifest = read_manifest(Path(folder))
    check_shards(manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.parquet like `load_manifest`, but do not look at the shards."""
    path = folder / MANIFEST_NAME
    of_images = f"if it holds images, `simclr-dist shard {folder} DST` makes shards of them, and DST is what to name"
    if not os.path.isdir(folder):  # noqa: PTH112 (Path's raises for a name that is too long)
        cure = of_images if os.path.exists(folder) else f"make one with `simclr-dist shard SRC {folder}`"  # noqa: PTH110 (the same)
        raise DataError(f"{folder}: no such folder of shards; {cure}")
    if not path.is_file():
        cure = of_images if any(folder.glob("*")) else f"make it with `simclr-dist shard SRC {folder}`"
        if any(folder.glob("*.tar")):
            cure = f"for tars of others `simclr-dist shard --index {folder}` writes one"
        if inner := sorted(str(p.parent) for p in folder.glob(f"*/{MANIFEST_NAME}")):
            cure = f"name one of {', '.join(inner)}"
        raise DataError(f"{folder}: has no {MANIFEST_NAME}; {cure}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(content, folder)


def parse_manifest(content: bytes, folder: Path | str) -> Manifest:
    """Parse a manifest's bytes. `folder` is a path or a URL. Raises DataError for a bad one."""
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        # No threads of pyarrow's: with them some 8 % of short commands ended with 134 (pyarrow 26.0). read_table starts one
        # whatever it is told.
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
            table = file.read(use_threads=False).combine_chunks()
        table.validate(full=True)  # texts that are no UTF-8, for one
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({reason_of(error)}); shard the images again") from None
    names, counts, classes = _read_about(folder, path, table)
    shard_bytes, sizes = counts.T.copy()

    column = {name: table.column(name).to_numpy() for name in ("offset", "size", "label", "width", "height")}
    index = {name: i for i, name in enumerate(names)}
    shard = np.array([index.get(name, -1) for name in table.column("shard").to_pylist()], dtype=np.int32)
    if sizes.sum() != len(shard) or not np.array_equal(shard, np.repeat(np.arange(len(names)), sizes)):
        raise DataError(f"{path}: its rows do not follow its own list of shards; shard the images again")
    # Subtracting, not adding: offset + size of a damaged manifest may overflow.
    inside = (column["size"] > 0) & (column["offset"] >= 0) & (column["offset"] <= shard_bytes[shard] - column["size"])
    labels_known = (column["label"] >= -1) & ((column["label"] < len(classes)) if classes else True)
    possible = inside & labels_known & (column["width"] > 0) & (column["height"] > 0)
    if not possible.all():
        row = int(possible.argmin())
        raise DataError(f"{path}: row {row} has an impossible offset, size or label; shard the images again")

    keys = table.column("key").to_pylist()
    hashes = np.frombuffer(b"".join(table.column("sha256").to_pylist()), dtype=np.uint8).reshape(-1, 32)
    return Manifest(
        folder, shards=names, shard_sizes=sizes, shard_bytes=shard_bytes, classes=classes, shard=shard, **column,
        key=np.array(keys, dtype=np.str_), sha256=hashes, digest=content_digest(keys, classes, hashes, column["label"]),
    )  # fmt: skip


def content_digest(keys: Sequence[str], classes: Sequence[str], sha256: NDArray[np.uint8], label: NDArray[np.int64]) -> str:
    """Compute `Manifest.digest` of these images."""
    digest = hashlib.sha256(json.dumps([list(keys), list(classes)]).encode())
    digest.update(sha256.tobytes())
    digest.update(label.astype("<i8").tobytes())
    return digest.hexdigest()


def check_shards(manifest: Manifest) -> None:
    """Check that the manifest's (local) folder has each shard. The size must fit, too. Raises DataError."""
    cure = "copy it here or shard the images again"
    for name, recorded in zip(manifest.shards, manifest.shard_bytes.tolist(), strict=True):
        shard = Path(manifest.folder, name)
        try:
            size = shard.stat().st_size
        except OSError as error:
            raise DataError(f"{shard}: in {MANIFEST_NAME}, but {error.strerror}; {cure}") from None
        if size != recorded:
            raise DataError(f"{shard}: has {size} bytes, {MANIFEST_NAME} says {recorded}; {cure}")


def _read_about(folder: Path | str, path: str, table: pa.Table) -> tuple[tuple[str, ...], NDArray[np.int64], tuple[str, ...]]:
    """Read shards and classes from the schema's metadata. Returns shard names, int64 [s, 2] (bytes, samples), class names."""
    foreign = DataError(
        f"{path}: not a manifest of simclr-dist; move it away, and `simclr-dist shard --index {folder}` writes one"
    )
    try:
        about: Any = json.loads(table.schema.metadata[_METADATA_KEY])
        version = about["version"]
        entries = [(str(s["name"]), int(s["bytes"]), int(s["samples"])) for s in about["shards"]]
        counts = np.array([sizes for _, *sizes in entries], dtype=np.int64).reshape(-1, 2)
        classes = tuple(str(name) for name in about["classes"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise foreign from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: manifest version {version}, this simclr-dist reads {FORMAT_VERSION}; shard the images again")
    same = table.schema.remove_metadata().equals(_SCHEMA)
    if not same or any(table.column(field.name).null_count for field in _SCHEMA if not field.nullable):
        raise foreign
    if table.num_rows == 0:
        raise DataError(f"{path}: lists no image; shard the images again")
    names = tuple(name for name, _, _ in entries)
    # A name with a folder in it would make the reader open files outside the folder of shards.
    strange = any(Path(name).name != name or name == ".." or "\0" in name or samples < 1 for name, _, samples in entries)
    if strange or len(set(names)) != len(names):
        raise foreign
    return names, counts, classes
