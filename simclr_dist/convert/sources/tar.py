"""Read a tar's members by their headers alone. A name is what the tar says, and nothing is ever opened by it."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from simclr_dist.data.tar_stream import TAR_ERRORS, StrictHeader
from simclr_dist.system.errors import DataError, printable, reason_of

_AFTER_THE_END = 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_OTHERS = {
    tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


class TarMember(NamedTuple):
    """A member's `name` and place. `problem` names its kind when it is no plain file."""

    name: str
    offset: int
    size: int
    problem: str | None


def tar_members(path: Path, inside: TarMember | None = None) -> Iterator[TarMember]:
    """Read all members of the tar at `path` but folders, in order. Or of a tar that is a member of it, `inside`.

    Raises DataError for a tar that cannot be read, is compressed, is damaged, or has no end mark (cut off).
    """
    shown = path if inside is None else Path(f"{path}/{printable(inside.name)}")
    try:
        with path.open("rb") as file:
            if inside is None:
                yield from _members(path, file, os.fstat(file.fileno()).st_size)
                return
            for member in _members(shown, _Part(file, inside), inside.size):
                yield member._replace(offset=inside.offset + member.offset)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from None
    except TAR_ERRORS as error:
        raise DataError(f"{shown}: {printable(reason_of(error))}") from None


class _Header(StrictHeader):
    """A header of a seekable tar. It passes over maps of sparse files, and checks pax records."""

    longest = 1 << 20

    def _proc_pax(self, tar: Any) -> Any:
        at = tar.fileobj.tell()
        _check_pax_records(tar.fileobj.read(self.size), at)
        tar.fileobj.seek(at)
        return super()._proc_pax(tar)  # type: ignore[misc]  # tarfile calls it; typeshed lacks it

    def _proc_sparse(self, tar: Any) -> Any:
        more = self.__dict__.pop("_sparse_structs")[1]
        while more:
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            more = len(block) == tarfile.BLOCKSIZE and block[504]
        self.offset_data = tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]  # typeshed lacks it
        return self

    def _proc_gnusparse_10(self, following: Any, *_: Any) -> Any:
        following.sparse = []


def _check_pax_records(content: bytes, place: int) -> None:
    """Check pax records, `length key=value\\n`. tarfile may leave out damaged ones. Raises ReadError."""
    at = 0
    while at < len(content) and content[at]:
        length, _, _ = content[at : at + 20].partition(b" ")  # of all that follows it would be quadratic
        size = int(length) if length.isdigit() else 0
        _, equals, value = content[at + len(length) + 1 : at + max(size - 1, 0)].partition(b"=")
        if not equals or b"\0" in value or content[at + size - 1 : at + size] != b"\n":
            raise tarfile.ReadError(f"has a damaged header (at byte {place})")
        at += size


class _Part(io.RawIOBase):
    """A member of an open file, as a file."""

    def __init__(self, file: BinaryIO, member: TarMember) -> None:
        self._file, self._first, self._size, self._at = file, member.offset, member.size, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        content = os.pread(self._file.fileno(), left if size < 0 else min(size, left), self._first + self._at)
        self._at += len(content)
        return content


def _members(path: Path, file: Any, end: int) -> Iterator[TarMember]:
    if packed := _COMPRESSED.get(file.read(2)):
        raise DataError(f"{path}: is compressed ({packed}); unpack that first: images are read by their place in the tar")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps each one; typeshed lacks it
            if tar.offset > end:
                raise DataError(f"{path}: ends in the middle of {printable(member.name)} (at byte {member.offset})")
            if member.isdir() or (member.isreg() and member.name.endswith("/")):
                continue
            problem = _OTHERS.get(member.type, None if member.isreg() else "not a regular file")
            yield TarMember(member.name, member.offset_data, member.size, "a sparse file" if member.issparse() else problem)
        at = tar.offset
    # Zeros fill up the last record. Other readers pass over anything else behind the end mark without a word.
    file.seek(at)
    if any(file.read(_AFTER_THE_END)):
        cure = f"pack it anew (at byte {at})"
        raise DataError(f"{path}: holds more behind its end mark, as when tars are put behind one another; {cure}")
