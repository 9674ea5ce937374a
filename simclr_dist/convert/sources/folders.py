"""Read image files from class folders or a flat folder. Links on disk are followed."""

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
    NO_LABEL,
    Original,
    Problem,
    Source,
    file_stamp,
    is_image_name,
    pack_names,
    split_names,
    unpack_names,
    why_no_bytes,
    why_no_image,
)
from simclr_dist.system.errors import DataError, printable, refusing


@dataclass(frozen=True)
class FileChunk:
    """Image files under `root`: packed relative paths, labels int64 [n]."""

    root: str
    first: int
    names: bytes
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, root: str, first: int, files: Sequence[tuple[str, int]]) -> "FileChunk":
        """Make a chunk of (relative path, label), one or more."""
        labels = np.array([label for _, label in files], dtype=np.int64)
        return cls(root, first, pack_names(name for name, _ in files), labels)

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
        for index, (name, label) in enumerate(self.files, self.first):
            path = self._path(name)
            try:
                # Opening a pipe would wait.
                with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                    about = os.fstat(file.fileno())
                    problem = why_no_bytes(about.st_size) if stat.S_ISREG(about.st_mode) else "not a regular file"
                    content = b"" if problem else file.read()
            except OSError as error:
                content, problem = b"", error.strerror or "cannot be read"
            yield Original(index, name, label, content, path, problem=problem)

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)  # noqa: PTH118 (for each image: pathlib takes nine times as long)


def file_chunks(root: str, files: Sequence[tuple[str, int]]) -> list[FileChunk]:
    starts = range(0, len(files), IMAGES_A_CHUNK)
    return [FileChunk.of(root, first, files[first : first + IMAGES_A_CHUNK]) for first in starts]


def walk(root: Path) -> tuple[list[str], list[Problem], list[Problem], int]:
    """List the files under root. Returns (regular files, links that are refused, what is passed over), each sorted.

    All are relative paths. Links are the user's own, and are followed wherever they lead, but not back to a folder above. The
    fourth is how many were followed.
    """
    names: list[str] = []
    links = 0
    rejected: list[Problem] = []
    skipped: list[Problem] = []
    folders = [("", {_identity(path.stat()) for path in (root, *root.parents)})]
    while folders:
        folder, above = folders.pop()
        with refusing(f"{root / folder}: cannot be listed"), os.scandir(root / folder) as scan:
            entries = list(scan)
        if not entries:
            skipped.append(Problem(printable(folder), "an empty folder"))
        for entry in entries:
            name = folder + entry.name
            try:
                if is_hidden(entry.name):
                    skipped.append(Problem(printable(name), "hidden"))
                elif entry.is_file():
                    names.append(name)
                    links += entry.is_symlink()
                elif not stat.S_ISDIR((about := entry.stat()).st_mode):
                    skipped.append(Problem(printable(name), "not a regular file"))
                elif _identity(about) in above:
                    rejected.append(Problem(printable(name), "a link to a folder above it"))
                else:
                    folders.append((name + "/", above | {_identity(about)}))
                    links += entry.is_symlink()
            except OSError as error:
                rejected.append(Problem(printable(name), f"a broken link ({error.strerror})"))
    return sorted(names), sorted(rejected), sorted(skipped), links


def _identity(folder: os.stat_result) -> tuple[int, int]:
    return folder.st_dev, folder.st_ino


def is_hidden(name: str) -> bool:
    """Tell whether a name is hidden. Hidden files and folders are no part of a data set."""
    return name.startswith(".") or name == "__MACOSX"


def folder_source(source: Path, root: Path, names: list[str], *, labelled: bool = True) -> Source:
    """Make a source of class folders or a flat folder. `names` are the files that `walk(root)` found.

    With `labelled` False folders are no classes.
    """
    images = [name for name in names if is_image_name(name)]
    skipped = tuple(Problem(printable(name), reason) for name in names if (reason := why_no_image(name)))
    if not images:
        raise DataError(f"{source}: no image found (of {len(names)} files none ends in {', '.join(sorted(IMAGE_SUFFIXES))})")
    classes, labels = labels_by_folder(source, images) if labelled else ((), [-1] * len(images))
    chunks = file_chunks(str(root), list(zip(images, labels, strict=True)))
    return Source(classes, chunks, skipped=skipped)


def labels_by_folder(source: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Label each name by its first folder. Returns the sorted classes too. Without folders: () and -1 for all.

    Raises DataError where only some have a folder, and where the folders are splits and no classes.
    """
    flat = next((name for name in names if "/" not in name), None)
    folders = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    no_labels = f"or take no labels, with `simclr-dist shard --label-column {NO_LABEL}`"  # others read such folders, too
    if flat and folders:
        raise DataError(
            f"{source}: holds both images ({printable(flat)}) and folders of images ({printable(folders[0])}); "
            f"put every image into a class folder, or none, {no_labels}"
        )
    if folders and len(split_names(folders, folders=True)) == len(folders):
        cure = f"name one, like {source / folders[0]}" if (source / folders[0]).is_dir() else "unpack it and name one"
        raise DataError(f"{source}: holds the splits {', '.join(folders)}, not classes; {cure}, {no_labels}")
    label = {folder: i for i, folder in enumerate(folders)}
    return tuple(printable(folder) for folder in folders), [label.get(name.split("/", 1)[0], -1) for name in names]
