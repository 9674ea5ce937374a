"""The files of a tar that is read from front to back, compressed or not: nothing is passed over in silence, and memory stays
bounded whatever the tar claims."""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from tarfile import EmptyHeaderError, EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]  # typeshed lacks them
from typing import Any, BinaryIO, Self, cast

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What `tar_files` raises for a tar that cannot be read to its end."""
MAX_FILE_BYTES = 1 << 28

_LONGEST_HEADER = 1 << 16
_HEADERS_OF_A_FILE = 10
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def tar_files(file: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of each regular file in the tar; None for one of more than `MAX_FILE_BYTES`. Raises TAR_ERRORS."""
    with tarfile.open(fileobj=_unpacked(file), mode="r|", tarinfo=_StrictHeader) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps each one; typeshed lacks it
            if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > _LONGEST_HEADER:
                raise ReadError("its shared headers are too long")
            if not member.isreg():
                continue
            if member.size > MAX_FILE_BYTES:
                yield member.name, None
                continue
            content = tar.extractfile(member)
            assert content is not None, "a regular file"
            yield member.name, content.read()


class _Raw(io.RawIOBase):
    """What has a `read`, as a pipe of webdataset has, for a buffer over it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        content = self._file.read(len(into))
        into[: len(content)] = content
        return len(content)


def _unpacked(file: BinaryIO) -> BinaryIO:
    """Not tarfile's `r|*`, which unpacks 10 KiB at once to whatever they become: of bzip2, 10 GiB."""
    packed = io.BufferedReader(_Raw(file), 1 << 16)
    start = packed.peek(10)[:10]
    if start.startswith(b"\x1f\x8b\x08"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=packed))
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return cast(BinaryIO, bz2.BZ2File(packed))
    if start.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")):
        return cast(BinaryIO, lzma.LZMAFile(packed))
    return packed


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged or missing header behind the first for the end of the tar, without a word; and reads into memory
    all that a header says is a header."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        # tarfile calls it for the header behind an extended one, too, from within.
        depth = tar.__dict__["depth"] = tar.__dict__.get("depth", 0) + 1
        try:
            if depth > _HEADERS_OF_A_FILE:
                raise ReadError(f"more than {_HEADERS_OF_A_FILE} headers for one file")
            return super().fromtarfile(tar)
        except EOFHeaderError:  # the end mark
            raise
        except HeaderError as error:
            why = "ends without an end mark; it may have been cut off" if isinstance(error, EmptyHeaderError) else str(error)
            raise ReadError(why) from None
        finally:
            tar.__dict__["depth"] -= 1

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _LONGEST_HEADER):
            raise ReadError(f"a header of {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise ReadError("a sparse file, whose map may be of any length")
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise ReadError("a sparse file, whose map may be of any length")
