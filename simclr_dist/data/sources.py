"""Where images come from: class folders, a flat folder, or Parquet files, listed in one fixed order and read in chunks."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_dist.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)

_MAX_FILE_BYTES = 1 << 30
_FILES_A_CHUNK = 32
_ROWS_A_BATCH = 64
_SPLIT_NAME = re.compile(r"(train|test|dev|val|valid|validation)(?![a-z])", re.IGNORECASE)


class Problem(NamedTuple):
    """An image or file that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Original:
    """One image as the source has it.

    `index` is its place in the source, `name` its relative path (`file.parquet#row` for Parquet), `path` a file that holds
    exactly `content`, None for Parquet. `problem` says why there is no content.
    """

    index: int
    name: str
    label: int
    content: bytes
    path: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class FileChunk:
    """Consecutive image files under `root`: (relative path, label) each; `first` is the index of the first."""

    root: str
    first: int
    files: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self) -> Iterator[Original]:
        """Each file's bytes, in order."""
        for index, (name, label) in enumerate(self.files, self.first):
            path = os.path.join(self.root, name)  # noqa: PTH118 (a name need not be valid text)
            try:
                with open(path, "rb") as file:  # noqa: PTH123
                    size = os.fstat(file.fileno()).st_size
                    problem = "an empty file" if size == 0 else "larger than 1 GiB" if size > _MAX_FILE_BYTES else None
                    content = b"" if problem else file.read()
            except OSError as error:
                content, problem = b"", error.strerror or "cannot be read"
            yield Original(index, name, label, content, path, problem)


@dataclass(frozen=True)
class RowGroupChunk:
    """One row group of a Parquet file; `first` is the index of its first row, `first_row` that row's number in the file."""

    path: str
    name: str
    group: int
    rows: int
    first: int
    first_row: int
    image_column: str
    has_label: bool
    class_count: int

    def __len__(self) -> int:
        return self.rows

    def read(self) -> Iterator[Original]:
        """Each row's image bytes, in order; raises DataError when Parquet itself is damaged."""
        column = self.image_column.split(".")[0]
        columns = [self.image_column, *(["label"] if self.has_label else [])]
        offset = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS_A_BATCH, row_groups=[self.group], columns=columns, use_threads=False):
                    labels = batch.column("label").to_pylist() if self.has_label else [None] * len(batch)
                    for cell, label in zip(batch.column(column).to_pylist(), labels, strict=True):
                        yield self._original(offset, cell, -1 if label is None else label)
                        offset += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: row group {self.group} cannot be read ({_first_line(error)})") from None

    def _original(self, offset: int, cell: Any, label: int) -> Original:
        content = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
        problem = None if content else "no image bytes"
        if label < -1 or (self.class_count and label >= self.class_count):
            problem = f"label {label} is not one of {self.class_count or 'the'} classes"
        return Original(self.first + offset, f"{self.name}#{self.first_row + offset}", label, content, problem=problem)


@dataclass(frozen=True)
class Source:
    """All images of a source, in order. `rejected`: links that are not followed. `skipped`: files that claim to be no image."""

    classes: tuple[str, ...]
    chunks: Sequence[FileChunk | RowGroupChunk]
    rejected: tuple[Problem, ...] = ()
    skipped: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)


def find_source(source: str | Path) -> Source:
    """List the images of `source` without reading them.

    `source` is a folder with a folder for each class (labels by sorted name), a flat folder of images (label -1), a Parquet
    file, a folder of Parquet files, or a pattern for Parquet files such as `data/train-*.parquet`. Parquet is read as Hugging
    Face writes it: image bytes in `image` or `img`, an integer `label` (null and -1: none), class names in the schema.

    Raises DataError when there is nothing to read or when it is unclear what to read.
    """
    source = Path(source)
    if not source.exists() and "*" in source.name:
        found = sorted(source.parent.glob(source.name))
        if not found or any(path.suffix != ".parquet" for path in found):
            raise DataError(f"{source}: this pattern must match .parquet files and nothing else; it matches {len(found)} files")
        return _parquet_source(source.parent.resolve(), [path.name for path in found])
    root = source.resolve()
    if root.is_file() and root.suffix == ".parquet":
        return _parquet_source(root.parent, [root.name])
    if not root.is_dir():
        raise DataError(f"{source}: no such folder of images or .parquet file")
    names, rejected, skipped = _walk(root)
    parquet = [name for name in names if name.endswith(".parquet")]
    if parquet:
        splits = sorted(
            {match[1].lower() for name in parquet for part in name.split("/") if (match := _SPLIT_NAME.match(part))}
        )
        if len(splits) > 1:
            raise DataError(
                f"{source}: holds several splits ({', '.join(splits)}); name one, like '{source}/{splits[0]}*.parquet'"
            )
        return _parquet_source(root, parquet)
    return _folder_source(source, root, names, rejected, skipped)


def _walk(root: Path) -> tuple[list[str], list[Problem], list[Problem]]:
    """Relative paths of all regular files under root, sorted; links that lead out and hidden names are left out."""
    names: list[str] = []
    rejected: list[Problem] = []
    skipped: list[Problem] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = list(scan)
        except OSError as error:
            raise DataError(f"{root / folder}: cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = folder + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                skipped.append(Problem(printable(name), "hidden"))
            elif entry.is_symlink() and (reason := _why_not_followed(root, Path(entry.path))):
                rejected.append(Problem(printable(name), reason))
            elif entry.is_dir():
                folders.append(name + "/")
            elif entry.is_file():
                names.append(name)
            else:
                skipped.append(Problem(printable(name), "not a regular file"))
    return sorted(names), sorted(rejected), sorted(skipped)


def _why_not_followed(root: Path, link: Path) -> str | None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a broken link"
    if not target.is_relative_to(root):
        return "a link out of the source folder; copy the file, or shard the folder that holds it"
    return "a link to a folder; only real folders are entered" if target.is_dir() else None


def _folder_source(source: Path, root: Path, names: list[str], rejected: list[Problem], skipped: list[Problem]) -> Source:
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122
    chosen = set(images)
    skipped = skipped + [Problem(printable(name), "no image's file extension") for name in names if name not in chosen]
    if not images:
        raise DataError(f"{source}: no image found (of {len(names)} files none ends in {', '.join(sorted(IMAGE_SUFFIXES))})")
    flat = [name for name in images if "/" not in name]
    folders = sorted({name.split("/")[0] for name in images if "/" in name})
    if flat and folders:
        raise DataError(
            f"{source}: holds both images ({printable(flat[0])}) and folders of images ({printable(folders[0])}); "
            "put every image into a class folder, or none"
        )
    if len(folders) > 1 and all(_SPLIT_NAME.fullmatch(folder) for folder in folders):
        raise DataError(f"{source}: holds the splits {', '.join(folders)}, not classes; shard each, like {source / folders[0]}")
    label = {folder: i for i, folder in enumerate(folders)}
    files = [(name, label.get(name.split("/")[0], -1)) for name in images]
    chunks = [
        FileChunk(str(root), first, tuple(files[first : first + _FILES_A_CHUNK]))
        for first in range(0, len(files), _FILES_A_CHUNK)
    ]
    return Source(tuple(printable(folder) for folder in folders), chunks, tuple(rejected), tuple(skipped))


def _parquet_source(root: Path, names: list[str]) -> Source:
    chunks: list[RowGroupChunk] = []
    classes: tuple[str, ...] | None = None
    first = 0
    for name in names:
        path = root / name
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
        image_column = _image_column(path, schema)
        has_label = "label" in schema.names
        if has_label and not pa.types.is_integer(schema.field("label").type):
            raise DataError(f"{path}: column 'label' is {schema.field('label').type}; make it an integer, -1 for no label")
        named = _class_names(schema)
        if classes is not None and classes != named:
            raise DataError(f"{path}: its class names differ from those of {names[0]}; shard the files apart")
        classes = named
        first_row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            chunks.append(RowGroupChunk(str(path), name, group, rows, first, first_row, image_column, has_label, len(classes)))
            first, first_row = first + rows, first_row + rows
    if not first:
        raise DataError(f"{root / names[0]}: has no rows")
    return Source(classes or (), chunks)


def _image_column(path: Path, schema: pa.Schema) -> str:
    """`name`, or `name.bytes` for a struct, of the column that holds image bytes."""
    columns: dict[str, str] = {}
    for field in schema:
        if _is_binary(field.type):
            columns[field.name] = field.name
        elif pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_binary(f.type) for f in field.type):
            columns[field.name] = f"{field.name}.bytes"
    for name in ("image", "img"):
        if name in columns:
            return columns[name]
    if len(columns) != 1:
        raise DataError(
            f"{path}: {len(columns)} columns could hold image bytes (of {', '.join(schema.names)}); name the right one 'image'"
        )
    return next(iter(columns.values()))


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """Names by label from Hugging Face's schema metadata; () when it has none."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(printable(str(name)) for name in names) if isinstance(names, list) else ()


def printable(name: str) -> str:
    """The name in one printable line: file names may hold line ends and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
