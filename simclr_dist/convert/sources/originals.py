"""An image as a source has it, and what each kind of source gives: chunks that any process can read, in one fixed order."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from simclr_dist.system.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)
MAX_IMAGE_BYTES = 1 << 30
IMAGES_A_CHUNK = 128

_SPLITS = r"(train|test|dev|val|valid|validation)(?![a-z])"
_SPLIT_FOLDER = re.compile(_SPLITS, re.IGNORECASE)
_SPLIT_FILE = re.compile(rf"(?:^|[-_.]){_SPLITS}", re.IGNORECASE)


class ReadError(DataError):
    """The source could not be read just now, by a disk's fault perhaps; what has been converted is kept."""


class Problem(NamedTuple):
    """An image or file that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Original:
    """One image as the source has it.

    `index` is its place in the source, `name` what the source calls it: a relative path, `photos.tar/cat/1.jpg` in an archive,
    `file.parquet#row` in a table. `path` is a file that holds `content` at `offset`, None where no file holds just these
    bytes. `problem` says why there is no content.
    """

    index: int
    name: str
    label: int
    content: bytes
    path: str | None = None
    offset: int = 0
    problem: str | None = None


class Chunk(Protocol):
    """Consecutive images of a source, to be read in any process; `first` is the index of the first."""

    @property
    def first(self) -> int:
        """Index of the first image."""
        ...

    def __len__(self) -> int: ...

    def identity(self) -> bytes:
        """Which images these are: names, labels and places."""
        ...

    def stamp(self) -> bytes:
        """Sizes and times of change of the files that are read: others when one has been written to since."""
        ...

    def read(self) -> Iterator[Original]:
        """Each image's bytes, in order; raises DataError when what holds them is damaged."""
        ...


@dataclass(frozen=True)
class Source:
    """All images of a source, in order. `rejected`: names and links that are not followed. `skipped`: files that claim to be
    no image."""

    classes: tuple[str, ...]
    chunks: Sequence[Chunk]
    rejected: tuple[Problem, ...] = ()
    skipped: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)


def pack_names(names: Iterable[str]) -> bytes:
    """Names in one object, as a million small ones take three times the memory."""
    return b"\0".join(map(os.fsencode, names))


def unpack_names(packed: bytes) -> list[str]:
    """The names that `pack_names` was given, one or more."""
    return [os.fsdecode(name) for name in packed.split(b"\0")]


def file_stamp(path: str) -> bytes:
    """Size and time of change of a file; b"" for one that is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116 (a name need not be valid text)
    except OSError:
        return b""
    return f"{found.st_size} {found.st_mtime_ns}\n".encode()


def is_image_name(name: str) -> bool:
    """Whether a file's extension claims that it is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (a name need not be valid text)


def split_names(names: Iterable[str], *, folders: bool) -> list[str]:
    """The splits (train, test, ...) that names of folders stand for, or that paths of files mention; sorted."""
    if folders:
        return sorted(name for name in names if _SPLIT_FOLDER.fullmatch(name))
    return sorted({match[1].lower() for name in names for part in name.split("/") if (match := _SPLIT_FILE.search(part))})


def first_line(error: Exception) -> str:
    """An error's first line, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
