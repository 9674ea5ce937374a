"""Write and read the manifest. This Parquet table beside the shards has each image's place, label, size in pixels and hash."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simclr_dist.data.columns import Keys
from simclr_dist.data.index import FORMAT_VERSION, INDEX_NAME, KIND_VERSION, METADATA_KEY, SCHEMA, Parquet, open_index
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.system.errors import DataError, refusing
from simclr_dist.system.files import replacing

MANIFEST_NAME = "manifest.parquet"


@dataclass(frozen=True)
class Manifest:
    """All images of a folder of shards. Arrays run over the n images, shard after shard; they are views of a mapped file.

    `shards` are file names inside `folder`; `shard_sizes` int64 [s] counts the images of each, `shard_bytes` int64 [s] has the
    sizes of the tars. `offset` and `size` int64 [n] locate the image's bytes inside the tar. `label` int64 [n] is -1 where
    there is none; `sha256` uint8 [n, 32] is of the image's bytes. `classes` are names by label, () when the source has none
    (labels may exist all the same). `digest` is the hex sha256 of the content (keys, hashes, labels, classes), whatever the
    folder. `short_side` is the median of the images' shorter sides, `pixels` the sum over all images. `kind` is
    what all are when they are read. `folder` is a text when
    it is a URL (`data.collection`).
    """

    folder: Path | str
    shards: tuple[str, ...]
    shard_sizes: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    key: Keys
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    sha256: NDArray[np.uint8]
    classes: tuple[str, ...]
    digest: str
    short_side: float
    pixels: int
    kind: Kind = RGB8

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def shard_ends(self) -> NDArray[np.int64]:
        """Rows before each shard's end, int64 [s]."""
        return self.shard_sizes.cumsum()

    @property
    def shard(self) -> NDArray[np.int32]:
        """Make each image's index into `shards`, int32 [n]. `shard_of` is for one image."""
        return np.repeat(np.arange(len(self.shards), dtype=np.int32), self.shard_sizes)

    @property
    def identity(self) -> str:
        """Return a digest of the images and their order. The same images in other shards are read in another order."""
        return hashlib.sha256(self.digest.encode() + self.shard_sizes.tobytes()).hexdigest()

    def shard_of(self, row: int) -> int:
        return int(self.shard_ends.searchsorted(row, side="right"))


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


ROW_SCHEMA = pa.schema([SCHEMA.field(name) for name in ManifestRow._fields])


def row_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema = ROW_SCHEMA) -> pa.Table:
    """Put rows into a table. It takes a tenth of their memory."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def write_manifest(
    folder: Path, shards: Sequence[str], rows: Sequence[ManifestRow] | pa.Table, classes: Sequence[str], kind: Kind = RGB8
) -> Path:
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
        "version": FORMAT_VERSION if kind == RGB8 else KIND_VERSION,
        "shards": [{"name": name, "bytes": (folder / name).stat().st_size, "samples": counts.get(name, 0)} for name in shards],
        "classes": list(classes),
        **(kind._asdict() if kind != RGB8 else {}),
    }
    arrays = [columns[field.name] for field in SCHEMA]
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(about, sort_keys=True).encode()})
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


def read_manifest(folder: Path, *, cache: Path | None = None, fresh: bool = False) -> Manifest:
    """Read `folder`/manifest.parquet like `load_manifest`, but do not look at the shards.

    By its index (`data.index`), which is made if need be: in `folder`, or in the folder `cache`. `fresh` takes none.
    """
    path = folder / MANIFEST_NAME
    of_images = f"if it holds images, `simclr-dist shard {folder} DST` makes shards of them, and DST is what to name"
    if not os.path.isdir(folder):
        cure = of_images if os.path.exists(folder) else f"make one with `simclr-dist shard SRC {folder}`"
        cure = f"name its folder, {folder.parent}" if folder.name == MANIFEST_NAME else cure
        raise DataError(f"{folder}: no such folder of shards; {cure}")
    if not path.is_file():
        cure = of_images if any(folder.glob("*")) else f"make it with `simclr-dist shard SRC {folder}`"
        if any(folder.glob("*.tar")):
            cure = f"for tars of others `simclr-dist shard --index {folder}` writes one"
        if inner := sorted(str(p.parent) for p in folder.glob(f"*/{MANIFEST_NAME}")):
            cure = f"name one of {', '.join(inner)}"
        raise DataError(f"{folder}: has no {MANIFEST_NAME}; {cure}")
    with refusing(f"{path}: cannot be read"), path.open("rb") as file:
        beside = None if fresh else folder / INDEX_NAME
        return Manifest(folder, **open_index(Parquet(file, str(path)), beside, cache))


def check_shards(manifest: Manifest) -> None:
    """Check that the manifest's (local) folder has each shard. The size must fit, too. Raises DataError."""
    cure = "copy it here or shard the images again"
    for name, recorded in zip(manifest.shards, manifest.shard_bytes.tolist(), strict=True):
        shard = f"{manifest.folder}/{name}"
        try:
            size = os.stat(shard).st_size  # noqa: PTH116 (a Path costs as much again, and there may be many)
        except OSError as error:
            raise DataError(f"{shard}: in {MANIFEST_NAME}, but {error.strerror}; {cure}") from None
        if size != recorded:
            raise DataError(f"{shard}: has {size} bytes, {MANIFEST_NAME} says {recorded}; {cure}")
