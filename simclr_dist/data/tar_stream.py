"""Read the files of a tar from front to back. The tar may be compressed; memory is bounded."""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from tarfile import EOFHeaderError, HeaderError, InvalidHeaderError, ReadError  # type: ignore[attr-defined]  # typeshed lacks them
from typing import Any, BinaryIO, ClassVar, Self, cast

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What `tar_files`, and a tar of `StrictHeader`s, raise for a tar that cannot be read to its end."""
MAX_FILE_BYTES = 1 << 28

_HEADERS_OF_A_FILE = 10
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class StrictHeader(tarfile.TarInfo):
    """A `tarinfo` for tarfile that refuses damaged, missing and boundless headers.

    Behind the first header, tarfile itself takes a damaged or missing one for the end of the tar, without a word. It also reads
    into memory all that a header says is a header.
    """

    longest: ClassVar[int] = 1 << 16
    """The most bytes of an extended header."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        # tarfile itself also calls this for the header behind an extended one.
        depth = tar.__dict__["depth"] = tar.__dict__.get("depth", 0) + 1
        at = tar.fileobj.tell()
        try:
            if depth > _HEADERS_OF_A_FILE:
                raise ReadError(f"has more than {_HEADERS_OF_A_FILE} headers for one file")
            return super().fromtarfile(tar)
        except EOFHeaderError:  # the end mark
            raise
        except HeaderError as error:
            damaged = isinstance(error, InvalidHeaderError)
            why = "is damaged, or no tar" if damaged else "ends without an end mark; it may have been cut off"
            raise ReadError(f"{why} (at byte {at})") from None
        finally:
            tar.__dict__["depth"] -= 1

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > cls.longest):
            raise ReadError(f"has a header of {header.size} bytes")
        if bytes(buf[257:263]) != b"ustar\0":  # GNU's differs, and has times where tarfile sees the first part of a name
            header.name = tarfile.nts(buf[:100], encoding, errors)  # type: ignore[attr-defined]  # typeshed lacks it
        return header

    def _proc_sparse(self, *_: Any) -> Any:
        raise ReadError("has a sparse file, whose map may be of any length")

    _proc_gnusparse_10 = _proc_sparse


def tar_files(file: BinaryIO) -> Iterator[tuple[str, bytes | None]]:
    """Read name and bytes of each regular file. Bytes are None above `MAX_FILE_BYTES`. Raises TAR_ERRORS."""
    with tarfile.open(fileobj=_unpacked(file), mode="r|", tarinfo=StrictHeader) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps each one; typeshed lacks it
            if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > StrictHeader.longest:
                raise ReadError("has shared headers that are too long")
            if not member.isreg():
                continue
            if member.size > MAX_FILE_BYTES:
                yield member.name, None
                continue
            content = tar.extractfile(member)
            assert content is not None, "a regular file"
            yield member.name, content.read()


class _Raw(io.RawIOBase):
    """Wraps an object that has only `read`, such as webdataset's pipe. A buffer can then lie over it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        content = self._file.read(len(into))
        into[: len(content)] = content
        return len(content)


def _unpacked(file: BinaryIO) -> BinaryIO:
    """Unpack a stream by its first bytes. tarfile's `r|*` does not bound what it unpacks at once."""
    packed = io.BufferedReader(_Raw(file), 1 << 16)
    start = packed.peek(10)[:10]
    if start.startswith(b"\x1f\x8b\x08"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=packed))
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return cast(BinaryIO, bz2.BZ2File(packed))
    if start.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")):
        return cast(BinaryIO, lzma.LZMAFile(packed))
    return packed
