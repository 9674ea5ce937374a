"""Read image files from class folders or a flat folder. The walk follows no link out of it."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.convert.sources.originals import (
    IMAGE_SUFFIXES,
    IMAGES_A_CHUNK,
    MAX_IMAGE_BYTES,
    Original,
    Problem,
    Source,
    file_stamp,
    is_image_name,
    pack_names,
    split_names,
    unpack_names,
)
from simclr_dist.system.errors import DataError, printable


@dataclass(frozen=True)
class FileChunk:
    """Image files under `root`: packed relative paths, labels int64 [n]. `only_inside`: links must not lead out of `root`."""

    root: str
    first: int
    names: bytes
    labels: NDArray[np.int64]
    only_inside: bool = False

    @classmethod
    def of(cls, root: str, first: int, files: Sequence[tuple[str, int]], *, only_inside: bool = False) -> "FileChunk":
        """Make a chunk of (relative path, label), one or more."""
        labels = np.array([label for _, label in files], dtype=np.int64)
        return cls(root, first, pack_names(name for name, _ in files), labels, only_inside)

    @property
    def files(self) -> list[tuple[str, int]]:
        return list(zip(unpack_names(self.names), self.labels.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> bytes:
        return self.names + self.labels.tobytes()

    def stamp(self) -> bytes:
        return hashlib.sha256(b"".join(file_stamp(self._path(name)) for name in unpack_names(self.names))).digest()

    def read(self) -> Iterator[Original]:
        inside = os.path.join(os.path.realpath(self.root), "")  # noqa: PTH118
        for index, (name, label) in enumerate(self.files, self.first):
            path = self._path(name)
            if self.only_inside and not os.path.realpath(path).startswith(inside):
                yield Original(index, name, label, b"", problem="a link out of the list's folder")
                continue
            try:
                # Opening a pipe would wait.
                with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                    about = os.fstat(file.fileno())
                    problem = "larger than 1 GiB" if about.st_size > MAX_IMAGE_BYTES else None
                    problem = problem if about.st_size else "an empty file"
                    problem = problem if stat.S_ISREG(about.st_mode) else "not a regular file"
                    content = b"" if problem else file.read()
            except OSError as error:
                content, problem = b"", error.strerror or "cannot be read"
            yield Original(index, name, label, content, path, problem=problem)

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)  # noqa: PTH118


def file_chunks(root: str, files: Sequence[tuple[str, int]], *, only_inside: bool = False) -> list[FileChunk]:
    return [
        FileChunk.of(root, first, files[first : first + IMAGES_A_CHUNK], only_inside=only_inside)
        for first in range(0, len(files), IMAGES_A_CHUNK)
    ]


def walk(root: Path) -> tuple[list[str], list[Problem], list[Problem]]:
    """List regular files under root, links that lead out, hidden names. All are relative paths, and each list is sorted."""
    names: list[str] = []
    rejected: list[Problem] = []
    skipped: list[Problem] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = list(scan)
        except OSError as error:
            raise DataError(f"{root / folder}: cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = folder + entry.name
            if is_hidden(entry.name):
                skipped.append(Problem(printable(name), "hidden"))
            elif entry.is_symlink() and (reason := why_not_followed(root, Path(entry.path))):
                rejected.append(Problem(printable(name), reason))
            elif entry.is_dir():
                folders.append(name + "/")
            elif entry.is_file():
                names.append(name)
            else:
                skipped.append(Problem(printable(name), "not a regular file"))
    return sorted(names), sorted(rejected), sorted(skipped)


def is_hidden(name: str) -> bool:
    """Tell whether a name is hidden. Hidden files and folders are no part of a data set."""
    return name.startswith(".") or name == "__MACOSX"


def why_not_followed(root: Path, link: Path) -> str | None:
    """Say why a link is left out. Returns None for a link to a file under `root`."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a broken link"
    if not target.is_relative_to(root):
        return "a link out of the source folder; copy the file, or shard the folder that holds it"
    return "a link to a folder; only real folders are entered" if target.is_dir() else None


def folder_source(source: Path, root: Path, names: list[str], rejected: list[Problem], skipped: list[Problem]) -> Source:
    """Make a source of class folders or a flat folder. Its lists are what `walk(root)` returned."""
    images = [name for name in names if is_image_name(name)]
    skipped = skipped + [Problem(printable(name), "no image's file extension") for name in names if not is_image_name(name)]
    if not images:
        raise DataError(f"{source}: no image found (of {len(names)} files none ends in {', '.join(sorted(IMAGE_SUFFIXES))})")
    classes, labels = labels_by_folder(source, images)
    chunks = file_chunks(str(root), list(zip(images, labels, strict=True)))
    return Source(classes, chunks, tuple(rejected), tuple(skipped))


def labels_by_folder(source: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Label each name by its first folder. Returns the sorted classes too. Without folders: () and -1 for all.

    Raises DataError where only some have a folder, and where the folders are splits and no classes.
    """
    flat = next((name for name in names if "/" not in name), None)
    folders = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    if flat and folders:
        raise DataError(
            f"{source}: holds both images ({printable(flat)}) and folders of images ({printable(folders[0])}); "
            "put every image into a class folder, or none"
        )
    if len(folders) > 1 and len(split_names(folders, folders=True)) == len(folders):
        cure = f"shard each, like {source / folders[0]}" if source.is_dir() else "unpack it and shard each"
        raise DataError(f"{source}: holds the splits {', '.join(folders)}, not classes; {cure}")
    label = {folder: i for i, folder in enumerate(folders)}
    return tuple(printable(folder) for folder in folders), [label.get(name.split("/", 1)[0], -1) for name in names]
