"""The members of a tar, by their headers alone. Strict: what is damaged or cut off is refused, never taken for the end.

Python's tarfile ends without a word at a damaged header, and keeps an object for every member. Formats: POSIX.1-1988 ustar,
POSIX.1-2001 pax, GNU. A name is what the tar says, and nothing is ever opened by it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from simclr_dist.system.errors import DataError, printable

_BLOCK = 512
_LONGEST_HEADER = 1 << 20
_AFTER_THE_END = 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_FILE, _FOLDER = (b"0", b"\0", b"7"), b"5"
_OTHERS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


class TarMember(NamedTuple):
    """A member's `name`, and where its `size` bytes are; `problem` says what it is when it is no plain file."""

    name: str
    offset: int
    size: int
    problem: str | None


def tar_members(path: Path) -> Iterator[TarMember]:
    """Everything in the tar at `path` but folders, in order.

    Raises DataError, one line, for a tar that cannot be read, is compressed, is damaged, or has no end mark (cut off).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        yield from _members(path, descriptor)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _members(path: Path, descriptor: int) -> Iterator[TarMember]:
    end, at = os.fstat(descriptor).st_size, 0
    shared: dict[str, str] = {}
    extra: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, _BLOCK, at)
        if len(header) < _BLOCK:
            raise _damaged(path, at, "ends without an end mark; it may have been cut off")
        if not any(header):
            return _check_end(path, descriptor, at)
        if at == 0 and (packed := _COMPRESSED.get(header[:2])):
            raise DataError(f"{path}: is compressed ({packed}); unpack that first: images are read by their place in the tar")
        try:
            _check_sum(header)
            size = _number(header[124:136])
            kind = header[156:157]
            records = shared | extra
            if kind not in (b"x", b"g", b"L", b"K") and "size" in records:
                size = int(records["size"])
        except ValueError:
            raise _damaged(path, at, "is damaged, or no tar") from None
        start = at + _BLOCK
        name = records.get("path") or _name(header)
        if kind == b"S":
            start = _after_sparse_headers(descriptor, header, start)
        holds_data = kind not in (b"1", b"2", b"3", b"4", _FOLDER, b"6")
        if size < 0 or start + (size if holds_data else 0) > end:
            raise _damaged(path, at, f"ends in the middle of {printable(name)}")
        at = start + (-(-size // _BLOCK) * _BLOCK if holds_data else 0)
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _LONGEST_HEADER:
                raise _damaged(path, start, f"has a header of {size} bytes")
            content = os.pread(descriptor, size, start)
            try:
                if kind == b"L":
                    extra["path"] = os.fsdecode(content.split(b"\0", 1)[0])
                elif kind == b"x":
                    extra |= _pax_records(content)
                elif kind == b"g":
                    shared |= _pax_records(content)
            except ValueError:
                raise _damaged(path, start, "has a damaged header") from None
            continue
        if kind != _FOLDER and not (kind in _FILE and name.endswith("/")):
            problem = None if kind in _FILE else _OTHERS.get(kind, "not a regular file")
            if any(key.startswith("GNU.sparse") for key in records):
                problem = "a sparse file"
            yield TarMember(name, start, size, problem)
        extra = {}


def _damaged(path: Path, at: int, what: str) -> DataError:
    return DataError(f"{path}: {what} (at byte {at})")


def _check_sum(header: bytes) -> None:
    """Raises ValueError where the header's checksum is another one; old tars took bytes for signed numbers."""
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 32
    if _number(header[148:156]) not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest)):
        raise ValueError


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU: eight bits a byte, for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":  # GNU's magic differs, and has times in this place
        name = prefix + b"/" + name
    return os.fsdecode(name)


def _pax_records(content: bytes) -> dict[str, str]:
    """`length key=value\\n` records; raises ValueError for others."""
    records = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at)
        length = int(content[at:space])
        key, equals, value = content[space + 1 : at + length - 1].partition(b"=")
        if not equals or b"\0" in value or length <= 0 or content[at + length - 1 : at + length] != b"\n":
            raise ValueError
        records[os.fsdecode(key)] = os.fsdecode(value)
        at += length
    return records


def _after_sparse_headers(descriptor: int, header: bytes, start: int) -> int:
    more = header[482]
    while more:
        block = os.pread(descriptor, _BLOCK, start)
        more = block[504] if len(block) == _BLOCK else 0
        start += _BLOCK
    return start


def _check_end(path: Path, descriptor: int, at: int) -> None:
    """Zeros fill up the last record; anything else behind the end mark is what other readers pass over without a word."""
    if any(os.pread(descriptor, _AFTER_THE_END, at)):
        raise _damaged(path, at, "holds more behind its end mark, as when tars are put behind one another; pack it anew")
