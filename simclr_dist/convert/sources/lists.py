"""Read lists of images and labels: a CSV file, tables of paths."""

import csv
import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from simclr_dist.convert.sources.archives import plain_path, why_unsafe
from simclr_dist.convert.sources.folders import file_chunks
from simclr_dist.convert.sources.originals import NO_LABEL, Problem, Source, why_no_label
from simclr_dist.convert.sources.tables import PATH_COLUMNS, check_labels, read_paths
from simclr_dist.system.errors import DataError, printable

LABEL_COLUMNS = ("label", "class")

_LONGEST_LABEL = 20
_MOST_BYTES = 1 << 30  # some 15 million lines; they take several times as much memory


def list_source(path: Path, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Make a source of a CSV file (UTF-8, commas), in its order. Paths are relative to its folder, of a link to the link's.

    The first row is a header when one of its cells is in `PATH_COLUMNS`, or when a column is named. Without a header the
    columns are path and label, or path alone. Labels are integers from -1 (or empty: none), or names of classes, numbered in
    sorted order. Paths that are absolute or lead out of the folder, and repeated paths, are rejected. Raises DataError for
    another file, where it is unclear which column is the label, and for labels that are partly numbers, partly names.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: {size} bytes are too many for a list, which has at most 1 GiB; convert it in parts")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file in UTF-8 ({error})") from None
    if not rows:
        raise DataError(f"{path}: is empty")
    width = len(rows[0][1])
    image, label = 0, 1 if width > 1 else None
    if image_column or label_column not in (None, NO_LABEL) or any(cell.lower() in PATH_COLUMNS for cell in rows[0][1]):
        image, label = _header(path, rows[0][1], image_column, label_column)
        rows = rows[1:]
    elif width > 2:
        raise DataError(f"{path}: {width} columns and no header; name the columns in a first row, like path,label")
    elif label_column == NO_LABEL:
        label = None
    for line, row in rows:
        if len(row) != width:
            raise DataError(f"{path}: line {line} has {len(row)} columns, the first line {width}")
    classes, labels = _labels(path, [(line, row[label].strip()) for line, row in rows] if label is not None else [])
    numbers = labels or itertools.repeat(-1)
    listed = ((f"{path.name}:{line}", row[image], number) for (line, row), number in zip(rows, numbers, strict=False))
    return _listed(path, path.parent.resolve(), listed, classes)


def path_table_source(root: Path, names: list[str], image_column: str | None, label_column: str | None) -> Source | None:
    """Make a source of the files that tables under `root` name. Returns None where the first one holds image bytes.

    Paths are relative to `root`, or absolute and below it: `datasets` writes those. Others are rejected, for a table may be
    anybody's. Raises DataError as `tables.table_source` does.
    """
    if (first := read_paths(root / names[0], image_column, label_column)) is None:
        return None
    tables = [first, *(read_paths(root / name, image_column, label_column) for name in names[1:])]
    rows: list[tuple[str, str, int]] = []
    for name, table in zip(names, tables, strict=True):
        if table is None:
            raise DataError(f"{root / name}: has image bytes, which {names[0]} has not; shard the files apart")
        check_labels(root / name, table, root / names[0], first)
        rows += ((f"{name}#{number}", path or "", label) for number, (path, label) in enumerate(table.rows))
    return _listed(root / names[0], root, rows, first.classes)


def _listed(path: Path, root: Path, rows: Iterable[tuple[str, str, int]], classes: tuple[str, ...]) -> Source:
    """Make a source of files under `root`. Rows are a place in the list, a path and a label."""
    files: list[tuple[str, int]] = []
    rejected: list[Problem] = []
    seen: set[str] = set()
    real = functools.cache(os.path.realpath)
    for place, given, label in rows:
        inside = given.removeprefix(f"{root}/")
        if inside.startswith("/") and "\0" not in inside:  # it may lead there by links, as the user's own name of the root does
            folder, slash, name = inside.rpartition("/")
            inside = f"{real(folder)}{slash}{name}".removeprefix(f"{root}/")
        name = plain_path(inside)
        reason = why_unsafe(inside) or ("no path" if not name else "listed twice" if name in seen else None)
        reason = why_no_label(label, len(classes)) or reason
        if reason:
            rejected.append(Problem(printable(f"{place}: {given}"), reason))
        else:
            seen.add(name)
            files.append((name, label))
    if not files:
        raise DataError(f"{path}: lists no image that can be used" + (f"; the first: {rejected[0]}" if rejected else ""))
    return Source(classes, file_chunks(str(root), files), tuple(rejected))


def _header(path: Path, header: list[str], image_column: str | None, label_column: str | None) -> tuple[int, int | None]:
    """Return the numbers of the path's and the label's column."""
    names = [cell.strip() for cell in header]
    lower = [name.lower() for name in names]

    def place(wanted: str | None, option: str, usual: Sequence[str]) -> int | None:
        if wanted is not None and wanted not in names:
            raise DataError(f"{path}: no column {wanted!r} ({option}); its first line has {', '.join(names)}")
        return names.index(wanted) if wanted is not None else next((lower.index(name) for name in usual if name in lower), None)

    image = place(image_column, "--image-column", PATH_COLUMNS)
    if image is None:
        raise DataError(f"{path}: which column is the path? Name one of {', '.join(names)} with --image-column")
    if label_column == NO_LABEL:
        return image, None
    label = place(label_column, "--label-column", LABEL_COLUMNS)
    if label is None and len(names) > 1:
        others = ", ".join(name for number, name in enumerate(names) if number != image)
        raise DataError(f"{path}: which column is the label? Choose with --label-column (of {others}, or {NO_LABEL})")
    return image, label


def _labels(path: Path, cells: list[tuple[int, str]]) -> tuple[tuple[str, ...], list[int]]:
    """Read labels from (line, text). Returns class names, () for integers, and the labels."""
    numbers = [(line, text) for line, text in cells if text.removeprefix("-").isdecimal()]
    names = [(line, text) for line, text in cells if text and not text.removeprefix("-").isdecimal()]
    if not names:
        labels = [int(text[:_LONGEST_LABEL]) if text else -1 for _, text in cells]
        for (line, text), label in zip(cells, labels, strict=True):
            if not -1 <= label < 2**31 or len(text) > _LONGEST_LABEL:
                raise DataError(f"{path}: line {line}: {text[:_LONGEST_LABEL]} is no label; it takes an integer from 0, or -1")
        return (), labels
    if numbers:
        (line, name), (other, digits) = names[0], numbers[0]
        raise DataError(
            f"{path}: line {line}: label {printable(name)!r} is a name, and {digits[:_LONGEST_LABEL]} in line {other} a number;"
            " give numbers to all or names to all (like 'class 7'), and leave the cell empty for no label"
        )
    classes = sorted({text for _, text in cells if text})
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return tuple(map(printable, classes)), [number[text] for _, text in cells]
