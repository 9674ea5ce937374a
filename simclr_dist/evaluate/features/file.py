"""Write and read features as a Parquet file, without torch. It has each image's key, label and embedding, and their `About`.

Those that a user asked for have its class and source, too. They may go into a .npz, which is only written.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simclr_dist.evaluate.space import empty
from simclr_dist.system.errors import DataError, reason_of, refusing
from simclr_dist.system.files import fitting, replacing

FORMAT = "simclr_dist features 1"

Embedding = NDArray[np.float32] | NDArray[np.uint8]

_MARK = "simclr_dist"  # what describes the features: metadata of a Parquet file, or an array
_ROW_GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class About:
    """The origin of features. Two files with the same `About` hold the same numbers, up to rounding.

    `encoder_sha256` is of the encoder's file (or of its weights), hex; `shape` its architecture, as plain JSON; `image_size`
    the side of the view in pixels; `precision` "fp32", "tf32" or "bf16" (stored as float32), of raw pixels "uint8" (stored so);
    `data_digest` of the images, hex; `classes` names by label, () without.
    """

    encoder_sha256: str
    shape: Mapping[str, Any]
    layer: str
    image_size: int
    precision: str
    data_digest: str
    classes: tuple[str, ...] = field(default=())

    @classmethod
    def of_card(
        cls, card: Mapping[str, Any], sha256: str, *, precision: str, data_digest: str, classes: Sequence[str], **shape: Any
    ) -> "About":
        """Describe features of the encoder with this `card` and digest. `shape` is what else they depend on."""
        shape = {name: card[name] for name in ("encoder", "width", "stem", "feature_size")} | shape
        if weights := card.get("weights"):  # of a file that holds more than the encoder, and not its colours
            shape |= {"prefix": weights["prefix"], "mean": card["mean"], "std": card["std"]}
        shape = json.loads(json.dumps(shape))  # as it is read again
        return cls(sha256, shape, card["layer"], card["image_size"], precision, data_digest, tuple(classes))

    def digest(self) -> str:
        """Return the hex sha256 of all fields. It names the file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class FeatureTable(NamedTuple):
    """Keys, labels, embeddings of n images. `label`: int64 [n] (-1: none). `embedding`: float32 [n, d] (raw pixels: uint8)."""

    key: tuple[str, ...]
    label: NDArray[np.int64]
    embedding: Embedding
    about: About


def write_features(
    path: str | Path, key: Sequence[str], label: NDArray[np.int64], embedding: Embedding, about: About,
    source: Sequence[str | None] | None = None,
) -> None:  # fmt: skip
    """Write features atomically. Columns: key (string), label (int64, null for -1), embedding (fixed-size list of float32).

    With `source`, names of files, two more follow: class_name and source (strings or null).
    `label` is [n], `embedding` [n, d] (uint8 stays uint8); `about` goes into the schema's metadata as JSON, under
    "simclr_dist". The same input gives the same bytes. It goes to disk 64 MiB at a time. A `path` that ends in .npz gets
    arrays of the same names, "" for null; nothing in it is pickled.

    Raises DataError for no image, for two images of one key, and when the disk does not take the file.
    """
    path = Path(path)
    kind: type[Any] = np.uint8 if embedding.dtype == np.uint8 else np.float32
    embedding = np.ascontiguousarray(embedding, dtype=kind)
    assert embedding.ndim == 2, "one embedding a row"
    assert len(key) == len(label) == len(embedding), "one key and one label a row"
    if not len(key):
        raise DataError(f"{path}: there are no features to write")
    double, times = Counter(key).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: the key {double!r} stands for two images; rename one of them")
    described = json.dumps({"format": FORMAT, **asdict(about)})
    classes = dict(enumerate(about.classes))
    if path.suffix == ".npz":
        texts = (
            {"key": key} if source is None else {"key": key, "class_name": map(classes.get, label.tolist()), "source": source}
        )
        arrays = {name: np.array([text or "" for text in column]) for name, column in texts.items()}
        arrays = {_MARK: np.array(described), **arrays, "label": label, "embedding": embedding}
        with refusing(f"{path}: cannot write the features"), replacing(path) as target:
            np.savez(target, allow_pickle=False, **arrays)
        return
    rows, size = max(1, _ROW_GROUP_BYTES // embedding[0].nbytes), embedding.shape[1]
    schema = _schema(size, pa.from_numpy_dtype(embedding.dtype), named=source is not None)
    schema = schema.with_metadata({_MARK: described})
    packed = "none" if embedding.dtype == np.float32 else "zstd"  # which gains nothing on floats
    compression = dict.fromkeys(schema.names, "zstd") | {"embedding.list.element": packed}
    del compression["embedding"]
    options: dict[str, Any] = {
        "use_dictionary": ["label", "class_name"],
        "compression": compression,
        "write_page_checksum": True,
    }
    refused = refusing(f"{path}: cannot write the features")
    with refused, replacing(path) as target, pq.ParquetWriter(target, schema, **options) as writer:
        for start in range(0, len(key), rows):
            part = slice(start, start + rows)
            columns = [
                pa.array(key[part], type=pa.string()),
                pa.array(label[part], type=pa.int64(), mask=label[part] < 0),
                pa.FixedSizeListArray.from_arrays(pa.array(embedding[part].reshape(-1)), type=schema.types[2]),
            ]
            if source is not None:
                columns.append(pa.array([classes.get(number) for number in label[part].tolist()], pa.string()))
                columns.append(pa.array(source[part], pa.string()))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=rows)


def read_features(path: str | Path) -> FeatureTable:
    """Read and check a file of `write_features`.

    Raises DataError when the file is missing, is not one of ours, or is damaged (every page has a checksum).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of features; make it with `simclr-dist embed ENCODER SRC {path}`")
    try:
        # In one thread, for the reason that data.index gives.
        with path.open("rb") as content, pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True) as file:
            about = _read_about(path, file.schema_arrow)
            kind: Any = file.schema_arrow.field("embedding").type if "embedding" in file.schema_arrow.names else None
            size, values = getattr(kind, "list_size", 0), getattr(kind, "value_type", None)
            schema = file.schema_arrow.remove_metadata()
            ours = values in (pa.float32(), pa.uint8()) and any(
                schema.equals(_schema(size, values, named=n)) for n in (False, True)
            )
            if not ours or not file.metadata.num_rows:
                raise _foreign(path)
            embedding = empty(file.metadata.num_rows, size, kind.value_type.to_pandas_dtype())
            parts, start = [], 0
            for number in range(file.num_row_groups):  # one at a time: memory for one more than what is returned
                table = file.read_row_group(number, use_threads=False).combine_chunks()
                rows = table.column("embedding").combine_chunks().flatten().to_numpy()
                if not np.isfinite(rows).all():
                    raise ValueError("it has numbers that are not finite")
                embedding[start : start + len(table)] = rows.reshape(len(table), size)
                parts.append(table.select(["key", "label"]))
                start += len(table)
            rest = pa.concat_tables(parts)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: not a readable file of features ({reason_of(error)}); embed the images again") from None
    label = rest.column("label").fill_null(-1).to_numpy()
    if label.min() < -1 or (about.classes and label.max() >= len(about.classes)) or rest.column("key").null_count:
        raise DataError(f"{path}: it has a label or a key that cannot be; embed the images again")
    return FeatureTable(tuple(rest.column("key").to_pylist()), label, embedding, about)


def read_about(path: str | Path) -> About:
    """Read the `About` of `path` from its header alone. Raises DataError for a file that is not ours."""
    path = Path(path)
    try:
        with path.open("rb") as content, pq.ParquetFile(content, pre_buffer=False) as file:
            return _read_about(path, file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable file of features ({reason_of(error)})") from None


def is_feature_file(path: str | Path) -> bool:
    """Tell whether `path` is a file of `write_features`. Its header says it."""
    if Path(path).suffix == ".npz":
        with suppress(OSError), Path(path).open("rb") as file:
            return file.read(64)[30:].startswith(f"{_MARK}.npy".encode())  # a zip's first name comes after 30 bytes
        return False
    with suppress(DataError):
        read_about(path)
        return True
    return False


def _schema(size: int, kind: pa.DataType, *, named: bool) -> pa.Schema:
    embedding = pa.list_(pa.field("element", kind, nullable=False), size)
    key, label = pa.field("key", pa.string(), nullable=False), pa.field("label", pa.int64())
    names = [pa.field(name, pa.string()) for name in ("class_name", "source")] if named else []
    return pa.schema([key, label, pa.field("embedding", embedding, nullable=False), *names])


def _read_about(path: Path, schema: pa.Schema) -> About:
    try:
        about = fitting(json.loads((schema.metadata or {})[_MARK.encode()]), {"format": str})
        version = about.pop("format")
        if not version.startswith("simclr_dist features"):
            raise KeyError(version)
        if version != FORMAT:
            raise DataError(f"{path}: its format is {version!r}, this simclr-dist reads {FORMAT!r}; embed the images again")
        kinds = {"shape": dict, "image_size": int, "classes": list}
        fitting(about, {one.name: kinds.get(one.name, str) for one in fields(About)})
        return About(**about | {"classes": tuple(about["classes"])})
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _foreign(path) from None


def _foreign(path: Path) -> DataError:
    return DataError(f"{path}: not a file of features; make one with `simclr-dist embed ENCODER SRC OUT.parquet`")
