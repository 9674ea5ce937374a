"""Read images in tars and zips, which stay packed. Nothing is opened or written by a name in them."""

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
    NO_LABEL,
    OfOneFile,
    Original,
    Problem,
    ReadError,
    Source,
    pack_names,
    unpack_names,
    why_no_bytes,
    why_no_image,
)
from simclr_dist.convert.sources.tar import TarMember, tar_members
from simclr_dist.system.errors import DataError, printable, reason_of, refusing

_STORED, _DEFLATED = 0, 8
_LOCAL_HEADER = 30
_LONGEST_LABEL = 64
_SYNSET = re.compile(r"(?:^|/)(n\d{8})\.tar$")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class ArchiveChunk(OfOneFile):
    """Consecutive images of the archive at `path`. Messages call it `name`. Arrays run over its n images.

    `places` int64 [n, 5]: where an image begins, its size, and in a zip its packed size, method and CRC-32. In a tar the
    packed size is the size, the method 0 and the CRC -1. In a zip an image begins with its local header. `labels` int64 [n].
    """

    name: str
    first: int
    names: bytes
    labels: NDArray[np.int64]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> bytes:
        return os.fsencode(self.name) + b"\0" + self.names + self.labels.tobytes() + self.places.tobytes()

    def read(self) -> Iterator[Original]:
        rows = zip(unpack_names(self.names), self.labels.tolist(), self.places.tolist(), strict=True)
        with refusing(f"{self.path}: cannot be read", ReadError), Path(self.path).open("rb") as file:
            for index, (name, label, place) in enumerate(rows, self.first):
                content, problem = _content(file.fileno(), *place)
                path = self.path if place[4] < 0 else None  # a tar's bytes can be read again where they are
                yield Original(index, f"{self.name}/{name}", label, content, path, place[0], problem)


def _content(descriptor: int, start: int, size: int, packed: int, method: int, crc: int) -> tuple[bytes, str | None]:
    """Read an image's bytes. Returns (bytes, None), or (b"", why there are none)."""
    if problem := why_no_bytes(size and max(size, packed)):
        return b"", problem
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
    """An archive's images by columns. A million objects would take much memory. `names` are in order."""

    names: dict[str, None] = field(default_factory=dict)
    places: "array[int]" = field(default_factory=lambda: array("q"))
    labels: dict[str, int] = field(default_factory=dict)
    rejected: list[Problem] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)

    def add(self, archive: str, name: str, problem: str | None, place: Sequence[int]) -> None:
        plain = plain_path(name)
        shown = printable(f"{archive}/{name}")
        reason = problem or why_unsafe(name) or ("twice in the archive" if plain in self.names else None)
        if _is_hidden_path(plain):
            self.skipped.append(Problem(shown, "hidden"))
        elif problem is None and (by_name := why_no_image(plain)):
            self.skipped.append(Problem(shown, by_name))
        elif reason:
            self.rejected.append(Problem(shown, reason))
        else:
            self.names[plain] = None
            self.places.extend(place)


def plain_path(name: str) -> str:
    """Leave out empty parts and '.' of a path."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _is_hidden_path(plain: str) -> bool:
    return any(is_hidden(part) for part in plain.split("/") if part != "..")


def why_unsafe(name: str) -> str | None:
    """Say why a file's name in an archive or list is refused. Returns None when it stays inside."""
    if name.startswith("/") or _DRIVE.match(name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads out ('..')"
    return "a name with a zero byte" if "\0" in name else None


def archive_source(source: Path, archives: Sequence[Path], *, labelled: bool = True) -> Source:
    """Make a source of tars and zips. It keeps the order of `archives` and of each archive.

    Labels come from a tar's `KEY.cls` members (WebDataset) if there are any, -1 for an image without one. Else they come by
    class folder, as in a folder, after folders that hold everything; -1 where there are none. A tar in a tar that is named by a
    WordNet id (`n01440764.tar`) is such a folder. With `labelled` False all have -1. Links, devices, absolute names, names with
    '..' and encrypted entries are rejected. Raises DataError for a damaged archive and for one without images.
    """
    listings = [_list_zip(path) if path.suffix.lower() == ".zip" else _list_tar(path, labelled) for path in archives]
    names = [name for listing in listings for name in listing.names]
    rejected = tuple(problem for listing in listings for problem in listing.rejected)
    skipped = tuple(problem for listing in listings for problem in listing.skipped)
    if not names:
        others = rejected + skipped
        more = f"; the first of {len(others)} that are left out: {others[0]}" if others else ""
        raise DataError(f"{source}: no image found in it{more}")
    classes: tuple[str, ...] = ()
    if not labelled:
        labels = [-1] * len(names)
    elif any(listing.labels for listing in listings):
        labels = [listing.labels.get(webdataset_key(name), -1) for listing in listings for name in listing.names]
    else:
        # A folder that holds all images belongs to the archive, and is no class.
        shared = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071 (cut at a slash)
        classes, labels = labels_by_folder(source, [name[shared:] for name in names])
    chunks: list[ArchiveChunk] = []
    first = 0
    for path, listing in zip(archives, listings, strict=True):
        of_it = slice(first, first := first + len(listing.names))
        chunks += archive_chunks(str(path), path.name, of_it.start, names[of_it], labels[of_it], listing.places)
    return Source(classes, chunks, rejected, skipped)


def archive_chunks(
    path: str, name: str, first: int, names: list[str], labels: list[int], places: "array[int]"
) -> Iterator[ArchiveChunk]:
    """Cut an archive's images into chunks. `first` is the index of the first; an image has five `places`."""
    rows = np.array(places, dtype=np.int64).reshape(-1, 5)
    for start in range(0, len(names), IMAGES_A_CHUNK):
        part = slice(start, start + IMAGES_A_CHUNK)
        numbers = np.array(labels[part], dtype=np.int64)
        yield ArchiveChunk(path, name, first + start, pack_names(names[part]), numbers, rows[part].copy())


def webdataset_key(name: str) -> str:
    """Return WebDataset's key: the path to the file name's first dot."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def is_label(name: str) -> bool:
    """Tell whether a member is a WebDataset sample's label. That is `KEY.cls` in any case, and not `KEY.coarse.cls`."""
    return name.removeprefix(webdataset_key(name)).lower() == ".cls"


def _list_tar(path: Path, labelled: bool) -> _Listing:
    listing, cure = _Listing(), f"; or take none with --label-column {NO_LABEL}"
    with refusing(f"{path}: cannot be read"), path.open("rb") as file:
        for member in tar_members(path):
            name = plain_path(member.name)
            if member.problem is None and (synset := _SYNSET.search(name)):
                for image in tar_members(path, member):  # ImageNet's training images: a tar for each class
                    place = (image.offset, image.size, image.size, _STORED, -1)
                    listing.add(path.name, f"{synset[1]}/{image.name}", image.problem, place)
            elif is_label(name) and member.problem is None and not _is_hidden_path(name):
                if labelled:
                    label = parse_label(read_label(file.fileno(), member), f"{path}: {printable(member.name)}", cure)
                    listing.labels.setdefault(webdataset_key(name), label)
            else:
                listing.add(path.name, member.name, member.problem, (member.offset, member.size, member.size, _STORED, -1))
    return listing


def read_label(descriptor: int, member: TarMember) -> bytes:
    """Read a label's text. `parse_label` needs no more than the start."""
    return os.pread(descriptor, min(member.size, _LONGEST_LABEL), member.offset)


def parse_label(text: bytes, where: str, cure: str = "") -> int:
    """Parse a label as WebDataset stores it: digits or -1. Raises DataError from `where` to `cure`."""
    try:
        label = int(text.decode("ascii").strip())
        if -1 <= label < 2**31:
            return label
    except ValueError:
        pass
    what = f"{printable(text.decode('ascii', 'replace'))!r} is no label; it takes an integer from 0, or -1"
    raise DataError(f"{where}: {what}{cure}")


def _list_zip(path: Path) -> _Listing:
    listing = _Listing()
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: not a readable zip ({reason_of(error)})") from None
    if sum(entry.compress_size for entry in entries) > path.stat().st_size:
        raise DataError(f"{path}: its entries overlap, as in a zip bomb; it is not unpacked")
    for entry in entries:
        name = entry.filename.replace("\\", "/")  # some Windows programs write "\"; the format asks for slashes
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
