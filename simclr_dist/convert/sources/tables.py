"""Read images in a column of Parquet files, Arrow files or streams. Hugging Face's `datasets` keeps them so."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_dist.convert.sources.originals import (
    IMAGES_A_CHUNK,
    NO_LABEL,
    OfOneFile,
    Original,
    Problem,
    ReadError,
    Source,
    why_no_bytes,
    why_no_label,
)
from simclr_dist.system.errors import DataError, printable, reason_of

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")

_MAX_PAGE_BYTES = 1 << 29  # a page is read whole, and takes twice its bytes of memory
_VARINT = b"\x15"  # in a Parquet page's header (Thrift): a 32-bit number follows
# A row at a time: it may have many megabytes, and one costs 3 microseconds.
_READ: Any = {"pre_buffer": False, "buffer_size": 1 << 20}  # else a whole row group is read at once


class Columns(NamedTuple):
    """A table's columns; `image` is a column, or `column.bytes` inside a struct."""

    image: str
    label: str | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TableChunk(OfOneFile):
    """Consecutive row groups (Parquet) or record batches (Arrow) of one file. There are `groups`; the first has number `group`.

    `first` is the index of the first row. `first_row` is that row's number in the file `path`, which messages call `name`.
    """

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
        return json.dumps([self.name, self.first_row, self.rows, self.columns]).encode()

    def read(self) -> Iterator[Original]:
        label, image = self.columns.label, self.columns.image.split(".")[0]
        offset = 0
        try:
            for row in self._rows():
                number = row.column(label)[0].as_py() if label else None
                yield self._original(offset, row.column(image)[0].as_py(), -1 if number is None else number)
                offset += 1
        except OSError as error:
            raise ReadError(f"{self.path}: rows from {self.first_row} cannot be read ({reason_of(error)})") from None
        except pa.ArrowException as error:
            raise DataError(f"{self.path}: rows from {self.first_row} cannot be read ({reason_of(error)})") from None
        if offset != self.rows:
            raise DataError(f"{self.path}: has changed while it was being read; shard again when nothing writes to it")

    def _original(self, offset: int, cell: Any, label: int) -> Original:
        content = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
        problem = why_no_bytes(len(content)) if content else "no image bytes"
        problem = why_no_label(label, len(self.columns.classes)) or problem
        return Original(self.first + offset, f"{self.name}#{self.first_row + offset}", label, content, problem=problem)

    def _rows(self) -> Iterator[pa.RecordBatch]:
        start, stop = self.group, self.group + self.groups
        columns = [column for column in (self.columns.image, self.columns.label) if column]
        if self.path.lower().endswith(".parquet"):
            with pq.ParquetFile(self.path, **_READ) as file:
                yield from file.iter_batches(1, row_groups=list(range(start, stop)), columns=columns, use_threads=False)
            return
        with pa.memory_map(self.path) as file:
            for batch in _record_batches(_open_arrow(file), start, stop):
                used = batch.select([column.split(".")[0] for column in columns])
                used.validate(full=True)  # Arrow's reader does not check a file
                yield from (used.slice(row, 1) for row in range(len(used)))


def _open_arrow(file: pa.MemoryMappedFile) -> Any:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def _record_batches(reader: Any, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
    """Read some batches. A stream is passed over up to the first. Nothing is copied."""
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return map(reader.get_batch, range(start, reader.num_record_batches if stop is None else stop))
    return itertools.islice(reader, start, stop)


def table_source(root: Path, names: list[str], image_column: str | None = None, label_column: str | None = None) -> Source:
    """Make a source of .parquet or .arrow files under `root`. It keeps their order. `label_column` 'none' takes no labels.

    Raises DataError for a file that cannot be read, and where it is unclear which columns to take.
    """
    chunks: list[TableChunk] = []
    skipped: list[Problem] = []
    alike: Columns | None = None
    first = 0
    for name in names:
        path, parquet = root / name, name.lower().endswith(".parquet")
        try:
            schema, groups = _layout(path, parquet)
            label = _label_column(path, schema, label_column)
            columns = Columns(_image_column(path, schema, image_column), label, _class_names(schema, label))
            if parquet:
                _check_pages(path, columns.image)
        except (pa.ArrowException, OSError) as error:
            kind = "Parquet" if parquet else "Arrow"
            raise DataError(f"{path}: not a readable {kind} file ({reason_of(error)})") from None
        check_labels(path, columns, root / names[0], alike := alike or columns)
        if not sum(groups):
            skipped.append(Problem(printable(name), "no rows"))
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
    return Source(chunks[0].columns.classes, chunks, skipped=tuple(skipped))


def check_labels(path: Path, columns: "Columns | Paths", first: Path, of_first: "Columns | Paths") -> None:
    """Refuse a table whose labels are not like the first one's. Raises DataError."""
    if columns.label != of_first.label:
        lacking, other = (path, first) if columns.label is None else (first, path)
        cure = f"rename its column of labels, or take none of all with --label-column {NO_LABEL}"
        raise DataError(f"{lacking}: no column {columns.label or of_first.label!r}, which {other.name} has; {cure}")
    if columns.classes != of_first.classes:
        raise DataError(f"{path}: its class names differ from those of {first.name}; shard the files apart")


class Paths(NamedTuple):
    """Rows of a table of paths: path (None: null), label (-1: none)."""

    rows: list[tuple[str | None, int]]
    label: str | None
    classes: tuple[str, ...]


def read_paths(path: Path, image_column: str | None, label_column: str | None) -> Paths | None:
    """Read a table that holds paths and no image bytes. Returns None for any other. Raises DataError as `table_source`."""
    parquet = path.suffix.lower() == ".parquet"
    try:
        schema, _ = _layout(path, parquet)
        usual = (name for name in ("image", "img", *PATH_COLUMNS) if schema.names.count(name) == 1)
        column = next(usual, None) if image_column is None else image_column
        if column is None or column not in schema.names or (image_column is None and set(_byte_columns(schema)) - {column}):
            return None
        kind = schema.field(column).type
        inner = "path" if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else None
        if not _is_text(kind.field(inner).type if inner else kind) or (inner and not _has_no_bytes(path, column, parquet)):
            return None
        label = _label_column(path, schema, label_column)
        if parquet:
            with pq.ParquetFile(path, **_READ) as file:
                names = [f"{column}.{inner}" if inner else column, *filter(None, (label,))]
                table = file.read(names, use_threads=False)
        else:
            with pa.memory_map(str(path)) as file:
                table = pa.Table.from_batches(_record_batches(_open_arrow(file)), schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable {'Parquet' if parquet else 'Arrow'} file ({reason_of(error)})") from None
    paths = table.column(column).to_pylist()
    if inner:
        paths = [cell and cell[inner] for cell in paths]
    labels = table.column(label).to_pylist() if label else [None] * len(paths)
    rows = [(name, -1 if number is None else number) for name, number in zip(paths, labels, strict=True)]
    return Paths(rows, label, _class_names(schema, label))


def _has_no_bytes(path: Path, column: str, parquet: bool) -> bool:
    """Tell whether all `bytes` of a struct are null. A Parquet file's footer says so: they are not read."""
    if parquet:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        used = [(chunk.statistics, chunk.num_values) for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
        return all(statistics is not None and statistics.null_count == values for statistics, values in used)
    with pa.memory_map(str(path)) as file:
        structs = [batch.column(column) for batch in _record_batches(_open_arrow(file))]
        return all(part.type.get_field_index("bytes") < 0 or part.field("bytes").null_count == len(part) for part in structs)


def _layout(path: Path, parquet: bool) -> tuple[pa.Schema, list[int]]:
    """Read the schema, and rows of each row group or record batch. The images themselves are not read."""
    if parquet:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if path.stat().st_size == 0:
        raise OSError("an empty file")
    with pa.memory_map(str(path)) as file:
        reader = _open_arrow(file)
        return reader.schema, [batch.num_rows for batch in _record_batches(reader)]


def _check_pages(path: Path, column: str) -> None:
    """Refuse a column whose pages are too large. Looked at is the first of each kind in a row group."""
    with pq.ParquetFile(path) as file, path.open("rb") as pages:
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema != column or chunk.total_uncompressed_size <= _MAX_PAGE_BYTES:
                    continue
                for place in filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)):
                    if (size := _page_bytes(os.pread(pages.fileno(), 8, place))) > _MAX_PAGE_BYTES:
                        raise DataError(
                            f"{path}: column {column!r}: a row group of {group.num_rows} rows has a page of {size} bytes, and"
                            f" {_MAX_PAGE_BYTES >> 20} MiB is the most; write it with fewer rows a group (row_group_size)"
                        )


def _page_bytes(header: bytes) -> int:
    """Read a page's unpacked size: its header's second number. Returns 0 for an unknown header."""
    if header[:1] + header[2:3] != 2 * _VARINT:
        return 0
    size = 0
    for place, byte in enumerate(header[3:]):
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            break
    return size >> 1


def _byte_columns(schema: pa.Schema) -> dict[str, str]:
    """List columns that may hold image bytes, as `name` or `name.bytes`."""
    columns: dict[str, str] = {}
    for field in schema:
        if "." in field.name or schema.names.count(field.name) > 1:  # not told from a field of a struct, or from another one
            continue
        if _is_binary(field.type):
            columns[field.name] = field.name
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_binary(f.type) for f in field.type):
            columns[field.name] = f"{field.name}.bytes"
    return columns


def _image_column(path: Path, schema: pa.Schema, wanted: str | None) -> str:
    """Find the column that holds image bytes. Returns `name`, or `name.bytes` for a struct."""
    columns = _byte_columns(schema)
    if wanted is not None:
        if wanted not in columns:
            fits = ", ".join(columns) or "none"
            raise DataError(f"{path}: no column {wanted!r} with image bytes (--image-column); of its columns these fit: {fits}")
        return columns[wanted]
    for name in ("image", "img"):
        if name in columns:
            return columns[name]
    if len(columns) != 1:
        cure = "it takes one of type binary, or struct with 'bytes', that is there once and has no dot in its name"
        if columns:
            cure = "name one with --image-column"
        raise DataError(f"{path}: {len(columns)} columns could hold image bytes (of {', '.join(schema.names)}); {cure}")
    return next(iter(columns.values()))


def _label_column(path: Path, schema: pa.Schema, wanted: str | None) -> str | None:
    if wanted == NO_LABEL:
        return None
    if wanted is None and "label" not in schema.names:
        if others := sorted(name for name, feature in _features(schema).items() if feature.get("names")):
            cure = f"choose with --label-column {others[0]}, or --label-column {NO_LABEL}"
            raise DataError(f"{path}: no column 'label', but classes in {', '.join(others)}; {cure}")
        return None
    wanted = "label" if wanted is None else wanted
    if wanted not in schema.names:
        raise DataError(f"{path}: no column {wanted!r} (--label-column); it has {', '.join(schema.names)}")
    if "." in wanted or schema.names.count(wanted) > 1:
        raise DataError(f"{path}: column {wanted!r} comes twice or has a dot in its name; rename it")
    if not pa.types.is_integer(kind := schema.field(wanted).type):
        raise DataError(f"{path}: column {wanted!r} is {kind}; make it an integer, -1 for no label")
    return wanted


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Read each column's feature from Hugging Face's schema metadata. Returns {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    names = _features(schema).get(label, {}).get("names") if label else None
    return tuple(printable(str(name)) for name in names) if isinstance(names, list) else ()
