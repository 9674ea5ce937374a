"""Features as a Parquet file: key, label and embedding of each image, and what they are features of. Needs no torch."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simclr_dist.atomic import write_atomically
from simclr_dist.errors import DataError

FORMAT = "simclr_dist features 1"

_METADATA_KEY = b"simclr_dist"
_ROW_GROUP_BYTES = 64 * 2**20
_MEANINGS = {
    "encoder_sha256": "the encoder's sha256",
    "shape": "the encoder's shape",
    "layer": "the layer",
    "image_size": "the image size",
    "precision": "the precision",
    "data_digest": "the images' digest",
    "classes": "the classes",
}


@dataclass(frozen=True)
class About:
    """What features are features of; two files with the same `About` hold the same numbers, up to rounding.

    `encoder_sha256` is that of the encoder's file, hex; `shape` what its card says of its architecture, as JSON knows it;
    `layer` what was taken from it ("h"); `image_size` the side of the view in pixels; `precision` "fp32" or "bf16", of the
    computation (what is stored is float32); `data_digest` that of the images, hex; `classes` names by label, () without.
    """

    encoder_sha256: str
    shape: Mapping[str, Any]
    layer: str
    image_size: int
    precision: str
    data_digest: str
    classes: tuple[str, ...] = field(default=())


class FeatureTable(NamedTuple):
    """`key` of each of the n images, `label` int64 [n] (-1: none), `embedding` float32 [n, d] (read-only)."""

    key: tuple[str, ...]
    label: NDArray[np.int64]
    embedding: NDArray[np.float32]
    about: About


def write_features(
    path: str | Path, key: Sequence[str], label: NDArray[np.int64], embedding: NDArray[np.float32], about: About
) -> None:
    """Write `path` atomically: columns key (string), label (int64, null for -1), embedding (fixed-size list of float32).

    `label` is [n], `embedding` [n, d]; `about` goes into the schema's metadata as JSON, under "simclr_dist". The same input
    gives the same bytes. The file is built in memory, so the embedding is there twice for a moment.

    Raises DataError for no image, for two images of one key, and when the disk does not take the file.
    """
    path = Path(path)
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    assert embedding.ndim == 2, "one embedding a row"
    assert len(key) == len(label) == len(embedding), "one key and one label a row"
    if not len(key):
        raise DataError(f"{path}: there are no features to write")
    if len(set(key)) != len(key):
        seen: set[str] = set()
        double = next(k for k in key if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise DataError(f"{path}: the key {double!r} stands for two images; rename one of them")
    size = embedding.shape[1]
    schema = _schema(size).with_metadata({_METADATA_KEY: json.dumps({"format": FORMAT, **asdict(about)}).encode()})
    columns = [
        pa.array(key, type=pa.string()),
        pa.array(label, type=pa.int64(), mask=label < 0),
        pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), type=schema.field("embedding").type),
    ]
    target = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        target,
        row_group_size=max(1, _ROW_GROUP_BYTES // (4 * size)),
        use_dictionary=["label"],  # type: ignore[arg-type, unused-ignore]
        compression={"key": "zstd", "label": "zstd", "embedding.list.element": "none"},  # which gains nothing on floats
        write_page_checksum=True,
    )
    try:
        write_atomically(path, target.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot write the features: {error.strerror or error}") from None


def read_features(path: str | Path, expected: About | None = None) -> FeatureTable:
    """Read and check what `write_features` wrote; with `expected`, only features of exactly that.

    Raises DataError when the file is missing, is not one of ours, is damaged (every page has a checksum), or differs from
    `expected`, naming the first difference.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of features; make it with `simclr-dist embed ENCODER SRC {path}`")
    try:
        # In one thread, for the reason that data.manifest gives.
        content = pa.BufferReader(path.read_bytes())
        with pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True) as file:
            about = _read_about(path, file.schema_arrow)
            table = file.read(use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable file of features ({_first_line(error)}); embed the images again") from None
    if expected is not None:
        _compare(path, about, expected)
    kind = table.schema.field("embedding").type
    if not table.schema.remove_metadata().equals(_schema(getattr(kind, "list_size", 0))) or not table.num_rows:
        raise _foreign(path)
    label = table.column("label").fill_null(-1).to_numpy()
    embedding = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(table.num_rows, kind.list_size)
    if label.min() < -1 or (about.classes and label.max() >= len(about.classes)) or table.column("key").null_count:
        raise DataError(f"{path}: it has a label or a key that cannot be; embed the images again")
    return FeatureTable(tuple(table.column("key").to_pylist()), label, embedding, about)


def is_feature_file(path: str | Path) -> bool:
    """Whether `path` is, by its schema, a file that `write_features` wrote; False also where nothing is."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _read_about(Path(path), file.schema_arrow)
    except (pa.ArrowException, OSError, DataError):
        return False
    return True


def _schema(size: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), size), nullable=False),
        ]
    )


def _read_about(path: Path, schema: pa.Schema) -> About:
    try:
        about: dict[str, Any] = json.loads((schema.metadata or {})[_METADATA_KEY])
        found = about.pop("format")
        if not str(found).startswith("simclr_dist features"):
            raise KeyError(found)
        if found != FORMAT:
            raise DataError(f"{path}: its format is {found!r}, this simclr-dist reads {FORMAT!r}; embed the images again")
        return About(**about | {"classes": tuple(about["classes"])})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _foreign(path) from None


def _foreign(path: Path) -> DataError:
    return DataError(f"{path}: not a file of features; make one with `simclr-dist embed ENCODER SRC OUT.parquet`")


def _compare(path: Path, about: About, expected: About) -> None:
    for name, meaning in _MEANINGS.items():
        found, wanted = getattr(about, name), getattr(expected, name)
        if found != wanted:
            raise DataError(
                f"{path}: {meaning} is {_short(found)}, not {_short(wanted)}: features of something else; "
                "embed the images again, or name another file"
            )


def _short(value: Any) -> str:
    text = str(dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 120 else text[:117] + "..."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
