"""Read the binary versions of CIFAR and STL-10. Their records have one size, and raw pixels."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr_dist.convert.sources.originals import (
    IMAGES_A_CHUNK,
    NO_LABEL,
    Files,
    OfOneFile,
    Original,
    ReadError,
    Source,
    why_no_label,
)
from simclr_dist.data.pixels.channels import write_png
from simclr_dist.system.errors import DataError, printable, refusing


class Layout(NamedTuple):
    """A record: `head` bytes, then pixels, one colour after another.

    There are `side` x `side`. Byte `label` of the head is the label, -1: none. STL-10 keeps images by columns, `turned`.
    """

    head: int
    label: int
    side: int
    turned: bool = False

    @property
    def size(self) -> int:
        return self.head + 3 * self.side**2


@dataclass(frozen=True)
class RecordChunk(OfOneFile):
    """Consecutive records of the file `path`, which messages call `name`.

    The first is that file's `record`, and the source's image `first`. `labels` are of a file beside it, a byte each, from 1.
    """

    name: str
    first: int
    record: int
    records: int
    layout: Layout
    labels: bytes
    classes: int

    def __len__(self) -> int:
        return self.records

    def identity(self) -> bytes:
        return json.dumps([self.name, self.record, self.records, self.layout, self.labels.hex(), self.classes]).encode()

    def read(self) -> Iterator[Original]:
        side, size = self.layout.side, self.layout.size
        with refusing(f"{self.path}: cannot be read", ReadError), Path(self.path).open("rb") as file:
            file.seek(self.record * size)
            for offset in range(self.records):
                if len(record := file.read(size)) < size:
                    raise DataError(f"{self.path}: has changed while it was being read; shard again when it is whole")
                colours = np.frombuffer(record, np.uint8, offset=self.layout.head).reshape(3, side, side)
                pixels = colours.transpose(2, 1, 0) if self.layout.turned else colours.transpose(1, 2, 0)
                label = record[self.layout.label] if self.layout.label >= 0 else -1
                if self.labels:
                    label = self.labels[offset] - 1
                problem = why_no_label(label, self.classes)
                content = write_png(pixels)
                yield Original(self.first + offset, f"{self.name}#{self.record + offset}", label, content, problem=problem)


def cifar_source(files: Files) -> Source:
    """Make a source of CIFAR's files, of one split.

    CIFAR-10 has `data_batch_*.bin` and `test_batch.bin`, CIFAR-100 `train.bin` and `test.bin`. Labels of CIFAR-100 are the
    fine ones, or the coarse ones if `label_column` says so. Class names are in the text file that comes with them. Raises
    DataError for training and test images in one.
    """
    hundred = not any(name.endswith(("_batch.bin", *(f"_batch_{number}.bin" for number in range(10)))) for name in files.names)
    files.refuse_columns(*(("fine", "coarse") if hundred else ()), NO_LABEL)
    if len({Path(name).name.startswith("test") for name in files.names}) > 1:
        one = f"'{files.root}/data_batch_*.bin' or {files.root / 'test_batch.bin'}"
        raise DataError(f"{files.source}: holds training and test images; name one: {one}")
    kind = files.label_column or "fine"
    layout = Layout(2 if hundred else 1, {NO_LABEL: -1, "coarse": 0}.get(kind, 1 if hundred else 0), 32)
    return _source(files, layout, f"{kind}_label_names.txt" if hundred else "batches.meta.txt")


def stl_source(files: Files) -> Source:
    """Make a source of `train_X.bin`, `test_X.bin` or `unlabeled_X.bin`. Labels are in the `_y.bin` beside it."""
    files.refuse_columns(NO_LABEL)
    return _source(files, Layout(0, -1, 96, turned=True), "class_names.txt")


def _source(files: Files, layout: Layout, names: str) -> Source:
    labelled = files.label_column != NO_LABEL
    classes = class_names(files.paths[0].with_name(names)) if labelled else ()
    chunks: list[RecordChunk] = []
    first = 0
    for path, name in zip(files.paths, files.names, strict=True):
        count, rest = divmod(path.stat().st_size, layout.size)
        if rest or not count:
            raise DataError(f"{path}: is cut off, or another format: it is no multiple of {layout.size} bytes, an image's size")
        labels = _labels(path, count) if layout.turned and labelled and "unlabeled" not in path.name else b""
        for record in range(0, count, IMAGES_A_CHUNK):
            records = min(IMAGES_A_CHUNK, count - record)
            of_chunk = labels[record : record + records]
            chunks.append(RecordChunk(str(path), name, first + record, record, records, layout, of_chunk, len(classes)))
        first += count
    return Source(classes if any(chunk.labels for chunk in chunks) or layout.head else (), chunks)


def _labels(path: Path, count: int) -> bytes:
    beside = path.with_name(path.name.replace("_X", "_y"))
    cure = f"; put the labels of {path.name} there, or take none with --label-column {NO_LABEL}"
    with refusing(f"{beside}: cannot be read", cure=cure):
        if (size := beside.stat().st_size) != count:
            raise DataError(f"{beside}: has {size} labels for the {count} images of {path.name}")
        return beside.read_bytes()


def class_names(path: Path) -> tuple[str, ...]:
    """Read class names, a line each. Returns () where there is no such file."""
    try:
        with path.open("rb") as file:
            text = file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(printable(line.strip()) for line in text.splitlines() if line.strip())
