"""Images in a column: Parquet files, and Arrow files or streams, among them those that Hugging Face's `datasets` keeps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_dist.convert.sources.originals import IMAGES_A_CHUNK, Original, ReadError, Source, file_stamp, first_line
from simclr_dist.system.errors import DataError, printable

NO_LABEL = "none"

_ROWS_A_BATCH = 64
_ARROW_FILE = b"ARROW1"


class Columns(NamedTuple):
    """Where a table has its images and labels: `image` is a column, or `column.bytes` inside a struct."""

    image: str
    label: str | None
    classes: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """The columns to read."""
        return [self.image, *([self.label] if self.label else [])]


@dataclass(frozen=True)
class TableChunk:
    """Consecutive row groups of a Parquet file, or record batches of an Arrow file: `groups` of them, from number `group`.

    `first` is the index of the first row, `first_row` that row's number in the file `path`, which messages call `name`.
    """

    path: str
    name: str
    group: int
    groups: int
    rows: int
    first: int
    first_row: int
    columns: Columns

    def __len__(self) -> int:
        return self.rows

    def identity(self) -> bytes:
        """Which rows of which file, and which columns."""
        return json.dumps([self.name, self.first_row, self.rows, self.columns]).encode()

    def stamp(self) -> bytes:
        """The file's size and time of change."""
        return file_stamp(self.path)

    def read(self) -> Iterator[Original]:
        """Each row's image bytes, in order; raises DataError when the file itself is damaged."""
        batches = _parquet_batches if self.path.lower().endswith(".parquet") else _arrow_batches
        offset = 0
        try:
            for batch in batches(self):
                label = self.columns.label
                labels = batch.column(label).to_pylist() if label else [None] * len(batch)
                images = batch.column(self.columns.image.split(".")[0]).to_pylist()
                for cell, number in zip(images, labels, strict=True):
                    yield self._original(offset, cell, -1 if number is None else number)
                    offset += 1
        except OSError as error:
            raise ReadError(f"{self.path}: rows from {self.first_row} cannot be read ({first_line(error)})") from None
        except pa.ArrowException as error:
            raise DataError(f"{self.path}: rows from {self.first_row} cannot be read ({first_line(error)})") from None
        if offset != self.rows:
            raise DataError(f"{self.path}: has changed while it was being read; shard again when nothing writes to it")

    def _original(self, offset: int, cell: Any, label: int) -> Original:
        content = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
        problem = None if content else "no image bytes"
        classes = len(self.columns.classes)
        if not -1 <= label < (classes or 2**31):
            problem = f"label {label} is not one of {classes or 'the'} classes"
        return Original(self.first + offset, f"{self.name}#{self.first_row + offset}", label, content, problem=problem)


def _parquet_batches(chunk: TableChunk) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(chunk.path) as file:
        groups = list(range(chunk.group, chunk.group + chunk.groups))
        yield from file.iter_batches(_ROWS_A_BATCH, row_groups=groups, columns=chunk.columns.read, use_threads=False)


def _arrow_batches(chunk: TableChunk) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(chunk.path) as file:
        for batch in _record_batches(file, chunk.group, chunk.groups):
            used = batch.select([column.split(".")[0] for column in chunk.columns.read])
            used.validate(full=True)  # Arrow trusts a file's offsets, and would read past the end with wrong ones
            for first in range(0, len(used), _ROWS_A_BATCH):
                yield used.slice(first, _ROWS_A_BATCH)


def _record_batches(file: pa.MemoryMappedFile, start: int, count: int) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file, or of a stream, which has to be passed over up to the first; nothing is copied."""
    if _is_arrow_file(file):
        reader = pa.ipc.open_file(file)
        for number in range(start, start + count):
            yield reader.get_batch(number)
        return
    stream = pa.ipc.open_stream(file)
    for number in range(start + count):
        batch = stream.read_next_batch()
        if number >= start:
            yield batch


def _is_arrow_file(file: pa.MemoryMappedFile) -> bool:
    magic = file.read(len(_ARROW_FILE))
    file.seek(0)
    return bool(magic == _ARROW_FILE)


def table_source(root: Path, names: list[str], image_column: str | None = None, label_column: str | None = None) -> Source:
    """The rows of these .parquet or .arrow files under `root`, in the order given; `label_column` 'none' takes no labels.

    Raises DataError for a file that cannot be read, and where it is unclear which columns to take.
    """
    chunks: list[TableChunk] = []
    classes: tuple[str, ...] | None = None
    first = 0
    for name in names:
        path = root / name
        try:
            schema, groups = _parquet_layout(path) if name.lower().endswith(".parquet") else _arrow_layout(path)
        except (pa.ArrowException, OSError) as error:
            kind = "Parquet" if name.lower().endswith(".parquet") else "Arrow"
            raise DataError(f"{path}: not a readable {kind} file ({first_line(error)})") from None
        columns = _columns(path, schema, image_column, label_column)
        if classes is not None and classes != columns.classes:
            raise DataError(f"{path}: its class names differ from those of {names[0]}; shard the files apart")
        classes = columns.classes
        first_row = group = 0
        while group < len(groups):
            count, rows = 1, groups[group]
            while group + count < len(groups) and rows + groups[group + count] <= IMAGES_A_CHUNK:
                rows += groups[group + count]
                count += 1
            if rows:
                chunks.append(TableChunk(str(path), name, group, count, rows, first, first_row, columns))
            first, first_row, group = first + rows, first_row + rows, group + count
    if not first:
        raise DataError(f"{root / names[0]}: has no rows")
    return Source(classes or (), chunks)


def _parquet_layout(path: Path) -> tuple[pa.Schema, list[int]]:
    """Schema, and rows of each row group."""
    with pq.ParquetFile(path) as file:
        return file.schema_arrow, [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


def _arrow_layout(path: Path) -> tuple[pa.Schema, list[int]]:
    """Schema, and rows of each record batch; the images themselves are not read."""
    if path.stat().st_size == 0:
        raise OSError("an empty file")
    with pa.memory_map(str(path)) as file:
        if _is_arrow_file(file):
            reader = pa.ipc.open_file(file)
            return reader.schema, [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        stream = pa.ipc.open_stream(file)
        return stream.schema, [batch.num_rows for batch in stream]


def _columns(path: Path, schema: pa.Schema, image_column: str | None, label_column: str | None) -> Columns:
    label = _label_column(path, schema, label_column)
    return Columns(_image_column(path, schema, image_column), label, _class_names(schema, label))


def _image_column(path: Path, schema: pa.Schema, wanted: str | None) -> str:
    """`name`, or `name.bytes` for a struct, of the column that holds image bytes."""
    columns: dict[str, str] = {}
    for field in schema:
        if "." in field.name or schema.names.count(field.name) > 1:  # not told from a field of a struct, or from another one
            continue
        if _is_binary(field.type):
            columns[field.name] = field.name
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_binary(f.type) for f in field.type):
            columns[field.name] = f"{field.name}.bytes"
    if wanted is not None:
        if wanted not in columns:
            fits = ", ".join(columns) or "none"
            raise DataError(f"{path}: no column {wanted!r} with image bytes (--image-column); of its columns these fit: {fits}")
        return columns[wanted]
    for name in ("image", "img"):
        if name in columns:
            return columns[name]
    if len(columns) != 1:
        cure = (
            "name one with --image-column"
            if columns
            else "it takes one of type binary, or struct with 'bytes', that is there once and has no dot in its name"
        )
        raise DataError(f"{path}: {len(columns)} columns could hold image bytes (of {', '.join(schema.names)}); {cure}")
    return next(iter(columns.values()))


def _label_column(path: Path, schema: pa.Schema, wanted: str | None) -> str | None:
    if wanted == NO_LABEL:
        return None
    if wanted is None:
        others = sorted(
            name for name, feature in _features(schema).items() if isinstance(feature, dict) and feature.get("names")
        )
        if "label" not in schema.names and others:
            raise DataError(
                f"{path}: no column 'label', but classes in {', '.join(others)}; choose with --label-column {others[0]}, "
                f"or --label-column {NO_LABEL}"
            )
        wanted = "label" if "label" in schema.names else None
    elif wanted not in schema.names:
        raise DataError(f"{path}: no column {wanted!r} (--label-column); it has {', '.join(schema.names)}")
    if wanted and ("." in wanted or schema.names.count(wanted) > 1):
        raise DataError(f"{path}: column {wanted!r} comes twice or has a dot in its name; rename it")
    if wanted and not pa.types.is_integer(schema.field(wanted).type):
        kind = schema.field(wanted).type
        raise DataError(f"{path}: column {wanted!r} is {kind}; make it an integer, -1 for no label")
    return wanted


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's schema metadata says of each column; {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Names by label; () when the schema has none."""
    feature = _features(schema).get(label) if label else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(printable(str(name)) for name in names) if isinstance(names, list) else ()
