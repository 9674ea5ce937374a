"""Read LMDB files of encoded images. A key is a name, its value the image.

The library maps a file and trusts it: what is cut off or damaged may end the process. Here the tree's pages are read and
checked (format 1, of all LMDB before 1.0, as 64-bit little-endian machines write it). Images are read where they are.
"""

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from simclr_dist.convert.sources.archives import archive_chunks
from simclr_dist.convert.sources.folders import labels_by_folder
from simclr_dist.convert.sources.originals import NO_LABEL, Files, Problem, Source
from simclr_dist.system.errors import DataError, printable, refusing

_MAGIC = 0xBEEFC0DE
_HEADER = 16  # of a page: number, padding, flags, end of the pointers, start of the nodes
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_ELSEWHERE, _TABLE = 1, 2 | 4  # flags of a node: its value has pages of its own; is a table, or several values
_DEEPEST = 32


class _Root(NamedTuple):
    page_size: int
    depth: int
    entries: int
    page: int
    changes: int


class _Tree:
    """The tree of an open LMDB file. Raises DataError for what is damaged."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._bytes = os.fstat(descriptor).st_size
        self._visits = 0  # of pages
        first = self._root(0)
        self.root = max(first, self._root(first.page_size), key=lambda root: root.changes)  # the last change that was whole

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self._path}: is damaged or cut off: {why}")

    def _root(self, place: int) -> _Root:
        about = os.pread(self._descriptor, 136, place + _HEADER)
        if len(about) < 136 or struct.unpack_from("<I", about)[0] != _MAGIC:
            raise DataError(f"{self._path}: is no LMDB file of a 64-bit little-endian machine, or is cut off")
        if (version := struct.unpack_from("<I", about, 4)[0]) != 1:
            raise DataError(f"{self._path}: has format {version} of LMDB; copy it with LMDB 0.9, whose format is 1")
        (page_size,) = struct.unpack_from("<I", about, 24)
        _, flags, depth, _, _, _, entries, page = struct.unpack_from("<IHHQQQQQ", about, 72)
        if page_size not in (1 << bits for bits in range(8, 17)) or depth > _DEEPEST:
            raise self._damaged(f"pages of {page_size} bytes, {depth} deep")
        if flags & 4:
            raise DataError(f"{self._path}: has several values a key (dupsort), of which none is the image; write one a key")
        return _Root(page_size, depth, entries, page, struct.unpack_from("<Q", about, 128)[0])

    def images(self) -> Iterator[tuple[bytes, int, int]]:
        """Read key, place and size of each value, by key."""
        if self.root.entries:
            yield from self._below(self.root.page, self.root.depth)

    def _below(self, number: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
        size = self.root.page_size
        page = os.pread(self._descriptor, size, number * size) if number < self._bytes // size else b""
        self._visits += 1
        if self._visits > self._bytes // size:
            raise self._damaged("its pages lead back to each other")
        if len(page) < size or struct.unpack_from("<Q", page)[0] != number:
            raise self._damaged(f"page {number} is not where it should be")
        flags, lower = struct.unpack_from("<HH", page, 10)
        if flags & 7 != (_LEAF if depth == 1 else _BRANCH) or not _HEADER <= lower <= size:
            raise self._damaged(f"page {number} is of another kind")
        for place in struct.unpack_from(f"<{(lower - _HEADER) // 2}H", page, _HEADER):
            low, high, marks, length = struct.unpack("<HHHH", page[place : place + 8].ljust(8, b"\xff"))
            key, start = page[place + 8 : place + 8 + length], place + 8 + length
            if start > size:
                raise self._damaged(f"page {number} has a key beyond its end")
            if depth > 1:
                yield from self._below(low | high << 16 | marks << 32, depth - 1)
            elif marks & _TABLE:
                raise DataError(
                    f"{self._path}: holds tables by name, like {printable(key.decode('latin-1'))!r}; copy one to a file"
                )
            else:
                yield key, *self._value(number, page, start, low | high << 16, elsewhere=bool(marks & _ELSEWHERE))

    def _value(self, number: int, page: bytes, start: int, size: int, *, elsewhere: bool) -> tuple[int, int]:
        place = number * len(page) + start
        if elsewhere:
            (first,) = struct.unpack("<Q", page[start : start + 8].ljust(8, b"\xff"))
            place = first * len(page) + _HEADER
            header = os.pread(self._descriptor, _HEADER, first * len(page)) if place < self._bytes else b""
            if len(header) < _HEADER or not struct.unpack_from("<H", header, 10)[0] & _OVERFLOW:
                raise self._damaged(f"page {first} is of another kind")
        elif start + size > len(page):
            raise self._damaged(f"page {number} has a value beyond its end")
        if place + size > self._bytes:
            raise self._damaged(f"page {number} has a value behind the file's end")
        return place, size


def lmdb_source(files: Files) -> Source:
    """Make a source of one LMDB file, by order of the keys.

    A key like `cat/1.jpg` has its folder as class, as in a folder. Keys like `__len__` are passed over. A key that is no
    printable text is called by its hex digits. Raises DataError for a damaged file, and for one with several tables.
    """
    files.refuse_columns(NO_LABEL)
    if len(files.names) > 1:
        raise DataError(f"{files.source}: holds {len(files.names)} LMDB files; name one, like {files.paths[0]}")
    path, names, places, skipped = files.paths[0], [], array("q"), []
    for key, place, size in _entries(path):
        name = _name(key)
        if name.startswith("__") and name.endswith("__"):
            skipped.append(Problem(f"{files.names[0]}/{name}", "no image's key"))
        else:
            names.append(name)
            places.extend((place, size, size, 0, -1))
    if not names:
        raise DataError(f"{path}: no image in it")
    classes, labels = ((), [-1] * len(names)) if files.label_column else labels_by_folder(path, names)
    chunks = list(archive_chunks(str(path), files.names[0], 0, names, labels, places))
    return Source(classes, chunks, skipped=tuple(skipped))


def _entries(path: Path) -> Iterator[tuple[bytes, int, int]]:
    with refusing(f"{path}: cannot be read"), path.open("rb") as file:
        tree = _Tree(path, file.fileno())
        count = 0
        for count, entry in enumerate(tree.images(), 1):
            if count > tree.root.entries:
                break
            yield entry
        if count != tree.root.entries:
            raise DataError(f"{path}: is damaged: it says {tree.root.entries} keys and holds others")


def _name(key: bytes) -> str:
    text = key.decode("utf-8", "replace")
    return text if text.isprintable() and "\ufffd" not in text else key.hex()
