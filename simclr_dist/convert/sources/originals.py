"""Define what a source gives: chunks of images in a fixed order. Any process can read them."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from simclr_dist.data.tar_stream import MAX_FILE_BYTES
from simclr_dist.system.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)
PACKED_SUFFIXES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
IMAGES_A_CHUNK = 128
_SHOWN = 10

NO_LABEL = "none"

_SPLITS = r"(train|test|dev|val|valid|validation|unlabell?ed)(?![a-z])"
_SPLIT_FOLDER = re.compile(_SPLITS, re.IGNORECASE)
_SPLIT_FILE = re.compile(rf"(?:^|[-_.]){_SPLITS}", re.IGNORECASE)


class ReadError(DataError):
    """A disk or a process failed while the source was read. What has been converted is kept."""


class Problem(NamedTuple):
    """An image or file that is left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    return dict(Counter(problem.reason for problem in problems))


def lines_of(rejected: Sequence[Problem], skipped: Sequence[Problem]) -> Iterator[str]:
    """Say what is left out. Of `skipped` a line for each reason, of `rejected` one for each of the first."""
    for reason, count in count_reasons(skipped).items():
        first = next(problem.name for problem in skipped if problem.reason == reason)
        yield f"passed over: {count}, like {first} ({reason})"
    for problem in rejected[:_SHOWN]:
        yield f"left out: {problem.name}: {problem.reason}"


@dataclass(frozen=True, slots=True)
class Original:
    """One image as the source has it. The source calls it `name`: `cat/1.jpg`, `photos.tar/cat/1.jpg`, `file.parquet#row`.

    `index` is its place in the source. `path` is a file that holds `content` at `offset`, None where no file holds just these
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
    """Consecutive images of a source. Any process can read them. `first` is the index of the first."""

    def __len__(self) -> int: ...

    def identity(self) -> bytes:
        """Identify these images by names, labels and places."""
        ...

    def stamp(self) -> bytes:
        """Return sizes and times of change of the files that are read."""
        ...

    def read(self) -> Iterator[Original]:
        """Read each image's bytes, in order. Raises DataError when the file that holds them is damaged."""
        ...


@dataclass(frozen=True)
class OfOneFile:
    """A part of the file at `path`."""

    path: str

    def stamp(self) -> bytes:
        return file_stamp(self.path)


@dataclass(frozen=True)
class Source:
    """All images of a source, in order.

    `rejected`: names and links that are refused. `skipped`: files that do not claim to be an image, and empty folders.
    """

    classes: tuple[str, ...]
    chunks: Sequence[Chunk]
    rejected: tuple[Problem, ...] = ()
    skipped: tuple[Problem, ...] = ()
    links: int = 0
    """Links of a folder that were followed."""

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)


class Files(NamedTuple):
    """What to read: files `names` of one kind, in order, under `root`. Messages call all of them `source`.

    The columns are what the user says, None without a word.
    """

    source: Path
    root: Path
    names: list[str]
    image_column: str | None = None
    label_column: str | None = None

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def refuse_columns(self, *labels: str) -> None:
        """Refuse names of columns where there are none. Some sources have a choice of `labels`. Raises ConfigError."""
        for option, value in (("--image-column", self.image_column), ("--label-column", self.label_column)):
            if value is not None and (option == "--image-column" or value not in labels):
                takes = f"; {option} takes {' or '.join(labels)} here" if labels and "label" in option else ""
                raise ConfigError(f"{option}: {value!r} has no effect on {self.source}, which has no columns{takes}")


def pack_names(names: Iterable[str]) -> bytes:
    """Pack names into one object. A million small objects take three times the memory."""
    return b"\0".join(map(os.fsencode, names))


def unpack_names(packed: bytes) -> list[str]:
    """Undo `pack_names`, for one name or more."""
    return [os.fsdecode(name) for name in packed.split(b"\0")]


def file_stamp(path: str) -> bytes:
    """Return size and time of change of a file. Returns b"" for one that is not there."""
    try:
        about = os.stat(path)  # noqa: PTH116 (a name need not be valid text)
    except OSError:
        return b""
    return f"{about.st_size} {about.st_mtime_ns}\n".encode()


def is_image_name(name: str) -> bool:
    """Tell whether a file's extension claims that it is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (a name need not be valid text)


def why_no_image(name: str) -> str | None:
    """Say why a file is passed over by its name. Returns None for an image's name."""
    if is_image_name(name):
        return None
    packed = name.lower().endswith(PACKED_SUFFIXES)
    return "a packed file; unpack it first" if packed else "no image's file extension"


def why_no_bytes(size: int) -> str | None:
    """Say why `size` bytes are not read as an image."""
    if size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES >> 20} MiB: {size} bytes"
    return None if size else "an empty file"


def why_no_label(label: int, classes: int) -> str | None:
    """Say why `label` is refused. -1 is none, and without `classes` there may be any."""
    return None if -1 <= label < (classes or 2**31) else f"label {label} is not one of {classes or 'the'} classes"


def split_names(names: Iterable[str], *, folders: bool) -> list[str]:
    """Find split names (train, test, ...). Folders have them as names, paths of files mention them. Returns them sorted."""
    if folders:
        return sorted(name for name in names if _SPLIT_FOLDER.fullmatch(name))
    return sorted({match[1].lower() for name in names for part in name.split("/") if (match := _SPLIT_FILE.search(part))})
