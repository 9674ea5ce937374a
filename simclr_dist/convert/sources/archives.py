"""Images in tars and zips that stay packed. A name in an archive is only a name: nothing is opened or written by it."""

import os
import re
import stat
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.convert.sources.folders import is_hidden, labels_by_folder
from simclr_dist.convert.sources.originals import (
    IMAGES_A_CHUNK,
    MAX_IMAGE_BYTES,
    Original,
    Problem,
    ReadError,
    Source,
    file_stamp,
    first_line,
    is_image_name,
    pack_names,
    unpack_names,
)
from simclr_dist.convert.sources.tar import tar_members
from simclr_dist.system.errors import DataError, printable

_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = 30
_LONGEST_LABEL = 20
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class ArchiveChunk:
    """Consecutive images of the archive at `path`, which messages call `name`; arrays run over its n images.

    `places` int64 [n, 5]: where an image begins, its size, and in a zip its packed size, method and CRC-32 (in a tar the
    packed size is the size, the method 0 and the CRC -1); in a zip it begins with its local header. `labels` int64 [n].
    """

    path: str
    name: str
    first: int
    names: bytes
    labels: NDArray[np.int64]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> bytes:
        """Names, labels and places."""
        return os.fsencode(self.name) + b"\0" + self.names + self.labels.tobytes() + self.places.tobytes()

    def stamp(self) -> bytes:
        """The archive's size and time of change."""
        return file_stamp(self.path)

    def read(self) -> Iterator[Original]:
        """Each image's bytes, in order; raises DataError when the archive cannot be read any more."""
        rows = zip(unpack_names(self.names), self.labels.tolist(), self.places.tolist(), strict=True)
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 (a name need not be valid text)
                for index, (name, label, place) in enumerate(rows, self.first):
                    content, problem = _content(file.fileno(), *place)
                    path = self.path if place[4] < 0 else None  # a tar's bytes can be read again where they are
                    yield Original(index, f"{self.name}/{name}", label, content, path, place[0], problem)
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read: {error.strerror}") from None


def _content(descriptor: int, start: int, size: int, packed: int, method: int, crc: int) -> tuple[bytes, str | None]:
    """An image's bytes, or b"" and why there are none."""
    if size == 0:
        return b"", "an empty file"
    if size > MAX_IMAGE_BYTES or packed > MAX_IMAGE_BYTES:
        return b"", "larger than 1 GiB"
    if crc < 0:
        content = os.pread(descriptor, size, start)
        return (content, None) if len(content) == size else (b"", "cut off")
    header = os.pread(descriptor, _LOCAL_HEADER, start)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        return b"", "the zip is damaged where it should be"
    start += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = os.pread(descriptor, packed, start)
    if len(content) < packed:
        return b"", "cut off"
    if method == _DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            # One byte more than the zip says is enough to know that it lies; a bomb unfolds no further.
            content = unpacker.decompress(content, size + 1)
        except zlib.error as error:
            return b"", f"cannot be unpacked ({error})"
    if len(content) != size:
        return b"", f"unpacks to {'more' if len(content) > size else 'fewer'} bytes than the {size} that the zip says"
    return (content, None) if zlib.crc32(content) == crc else (b"", "its bytes do not fit its CRC")


@dataclass
class _Listing:
    """What an archive holds: its images by columns, since a million objects would not be small."""

    names: list[str] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))
    labels: dict[str, int] | None = None
    rejected: list[Problem] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def add(self, archive: str, name: str, problem: str | None, place: Sequence[int]) -> None:
        """Take an entry for an image, or say why not."""
        plain = _plain(name)
        shown = printable(f"{archive}/{name}")
        reason = problem or why_unsafe(name) or ("twice in the archive" if plain in self.seen else None)
        if _is_hidden_path(plain):
            self.skipped.append(Problem(shown, "hidden"))
        elif not is_image_name(plain) and (problem is None or not reason):
            self.skipped.append(Problem(shown, "no image's file extension"))
        elif reason:
            self.rejected.append(Problem(shown, reason))
        else:
            self.seen.add(plain)
            self.names.append(plain)
            self.places.extend(place)


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _is_hidden_path(plain: str) -> bool:
    return any(is_hidden(part) for part in plain.split("/") if part != "..")


def why_unsafe(name: str) -> str | None:
    """Why an archive's or a list's name for a file is refused; None when it stays inside."""
    if name.startswith("/") or _DRIVE.match(name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads out ('..')"
    return "a name with a zero byte" if "\0" in name else None


def archive_source(source: Path, archives: Sequence[Path]) -> Source:
    """The images of tars and zips, in the order of `archives` and within each in the archive's own.

    Labels: of a tar's `KEY.cls` members (WebDataset) if there are any, -1 for an image without one; else by class folder, as
    in a folder, after folders that hold everything; -1 where there are none. Links, devices, absolute names, names with '..'
    and encrypted entries are rejected. Raises DataError for a damaged archive and one without images.
    """
    listings = [_list_zip(path) if path.suffix.lower() == ".zip" else _list_tar(path) for path in archives]
    names = [name for listing in listings for name in listing.names]
    rejected = tuple(problem for listing in listings for problem in listing.rejected)
    if not names:
        more = f"; the first of {len(rejected)} that are refused: {rejected[0].name} ({rejected[0].reason})" if rejected else ""
        raise DataError(f"{source}: no image found in it{more}")
    classes: tuple[str, ...] = ()
    if any(listing.labels for listing in listings):
        labels = [(listing.labels or {}).get(webdataset_key(name), -1) for listing in listings for name in listing.names]
    else:
        classes, labels = labels_by_folder(source, _without_common_folders(names))
    chunks: list[ArchiveChunk] = []
    first = 0
    for path, listing in zip(archives, listings, strict=True):
        places = np.array(listing.places, dtype=np.int64).reshape(-1, 5)
        for start in range(0, len(listing.names), IMAGES_A_CHUNK):
            part = slice(start, start + IMAGES_A_CHUNK)
            packed = pack_names(listing.names[part])
            own = np.array(labels[first + start : first + start + len(places[part])], dtype=np.int64)
            chunks.append(ArchiveChunk(str(path), path.name, first + start, packed, own, places[part].copy()))
        first += len(listing.names)
    return Source(classes, chunks, rejected, tuple(problem for listing in listings for problem in listing.skipped))


def _without_common_folders(names: list[str]) -> list[str]:
    """Names without the folders that hold all of them: those are the archive's, and no class."""
    first = names[0].split("/")[:-1]
    shared = 0
    for depth in range(1, len(first) + 1):
        prefix = "/".join(first[:depth]) + "/"
        if not all(name.startswith(prefix) for name in names):
            break
        shared = len(prefix)
    return [name[shared:] for name in names]


def webdataset_key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def is_label(name: str) -> bool:
    """Whether a member is a WebDataset sample's label: `KEY.cls` in any case, and not `KEY.coarse.cls`."""
    return name.removeprefix(webdataset_key(name)).lower() == ".cls"


def _list_tar(path: Path) -> _Listing:
    listing = _Listing()
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for member in tar_members(path):
            name = _plain(member.name)
            if is_label(name) and member.problem is None and not _is_hidden_path(name):
                text = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset)
                labels.setdefault(webdataset_key(name), parse_label(text, f"{path}: {printable(member.name)}"))
            else:
                listing.add(path.name, member.name, member.problem, (member.offset, member.size, member.size, _STORED, -1))
    listing.labels = labels
    return listing


def parse_label(text: bytes, where: str) -> int:
    """A label as WebDataset stores it, decimal digits or -1; raises DataError that begins with `where`."""
    try:
        label = int(text.decode("ascii").strip())
        if -1 <= label < 2**31:
            return label
    except ValueError:
        pass
    raise DataError(f"{where}: {printable(text.decode('ascii', 'replace'))!r} is no label; it takes an integer from 0, or -1")


def _list_zip(path: Path) -> _Listing:
    listing = _Listing()
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: not a readable zip ({first_line(error)})") from None
    if sum(entry.compress_size for entry in entries) > path.stat().st_size:
        raise DataError(f"{path}: its entries overlap, as in a zip bomb; it is not unpacked")
    for entry in entries:
        name = entry.filename.replace("\\", "/")  # what some Windows programs write; the format asks for slashes
        if name.endswith("/"):
            continue
        kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == 3 else 0
        problem = None
        if kind == stat.S_IFLNK:
            problem = "a link"
        elif kind not in (0, stat.S_IFREG):
            problem = "not a regular file"
        elif entry.flag_bits & 1:
            problem = "encrypted; unpack the zip with its password, and shard the folder"
        elif entry.compress_type not in (_STORED, _DEFLATED):
            problem = f"packed by method {entry.compress_type}; pack the zip again with 'deflate'"
        place = (entry.header_offset, entry.file_size, entry.compress_size, entry.compress_type, entry.CRC)
        if max(place) >= 2**63:
            problem = "a place or size that no file has"
        listing.add(path.name, name, problem, place)
    return listing
