"""Give ImageNet's validation images, a flat tar, their classes. They are in files of their own."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from simclr_dist.convert.sources.archives import ArchiveChunk, archive_source
from simclr_dist.convert.sources.originals import NO_LABEL, Files, Source, unpack_names
from simclr_dist.system.errors import DataError, reason_of, refusing

SYNSETS = "imagenet_2012_validation_synset_labels.txt"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KIT = "ILSVRC2012_devkit_t12/data"
_META = "meta.mat"
_MOST_BYTES = 1 << 24
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"_(\d{8})\.[A-Za-z]+$")


def validation_source(files: Files) -> Source:
    """Make a source of ILSVRC2012_img_val.tar. Classes are WordNet ids as sorted, like those of the training tar.

    The class of each image is a line of the file `SYNSETS` beside the tar, or of the devkit's `TRUTH` with meta.mat, beside the
    tar or in the devkit's folder there (scipy reads meta.mat). Raises DataError without them, unless `label_column` is 'none'.
    """
    files.refuse_columns(NO_LABEL)
    source = archive_source(files.source, files.paths, labelled=False)
    if files.label_column:
        return source
    path, ids = _ids(files.paths[0].parent)
    if len(ids) != len(source):
        raise DataError(f"{path}: has {len(ids)} lines for the {len(source)} images of {files.source}")
    classes = tuple(sorted(set(ids)))
    label = {name: number for number, name in enumerate(classes)}
    chunks = []
    for chunk in source.chunks:
        assert isinstance(chunk, ArchiveChunk), "of an archive"
        numbered = [(name, _NUMBER.search(name)) for name in unpack_names(chunk.names)]
        for name, number in numbered:
            if number is None or not 0 < int(number[1]) <= len(ids):
                raise DataError(
                    f"{files.source}: {name}: has no number from 1 to {len(ids)} in its name, by which {path} has its class"
                )
        labels = np.array([label[ids[int(number[1]) - 1]] for _, number in numbered if number], dtype=np.int64)
        chunks.append(replace(chunk, labels=labels))
    return replace(source, classes=classes, chunks=chunks)


def _ids(folder: Path) -> tuple[Path, list[str]]:
    """Find the WordNet id of each image. They are in order."""
    if (path := folder / SYNSETS).exists():
        return path, _lines(path, _WNID)
    for kit in (folder, folder / _KIT):
        if (path := kit / TRUTH).exists():
            by_number = _by_number(kit / _META)
            numbers = [int(line) for line in _lines(path, re.compile(r"\d{1,4}"))]
            if unknown := set(numbers) - set(by_number):
                raise DataError(f"{path}: number {min(unknown)} is none of {kit / _META}")
            return path, [by_number[number] for number in numbers]
    cure = f"put {SYNSETS} there, or {TRUTH} and {_META} of the devkit; or take none with --label-column {NO_LABEL}"
    raise DataError(f"{folder}: has no classes of the validation images; {cure}")


def _lines(path: Path, kind: re.Pattern[str]) -> list[str]:
    with refusing(f"{path}: cannot be read"), path.open("rb") as file:
        lines = file.read(_MOST_BYTES).decode("latin-1").split()
    for number, line in enumerate(lines, 1):
        if not kind.fullmatch(line):
            raise DataError(f"{path}: line {number}: {line[:20]!r} is no class; it takes one like {kind.pattern}")
    return lines


def _by_number(path: Path) -> dict[int, str]:
    """Read the devkit's numbers of the classes, and their WordNet ids. Raises DataError without scipy."""
    try:
        from scipy.io import loadmat
    except ImportError:
        cure = f"pip install scipy, or put {SYNSETS} beside the tar"
        raise DataError(f"{path}: is MATLAB's format, which scipy reads; {cure}") from None
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
        synsets = loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"]
        classes = synsets[synsets["num_children"] == 0]
        return {int(number): str(name) for number, name in zip(classes["ILSVRC2012_ID"], classes["WNID"], strict=True)}
    except Exception as error:  # scipy's reader answers damaged bytes with nearly every kind there is
        raise DataError(f"{path}: not the devkit's {_META} ({reason_of(error)})") from None
