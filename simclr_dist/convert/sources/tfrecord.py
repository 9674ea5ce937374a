"""Read encoded images in TFRecord files of tf.train.Example. TensorFlow's models and data sets keep them so."""

import json
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simclr_dist.convert.sources.binary import class_names
from simclr_dist.convert.sources.originals import (
    IMAGES_A_CHUNK,
    NO_LABEL,
    Files,
    OfOneFile,
    Original,
    ReadError,
    Source,
    why_no_bytes,
    why_no_label,
)
from simclr_dist.data.tar_stream import MAX_FILE_BYTES
from simclr_dist.system.errors import DataError, printable, refusing

_HEAD, _CRC = 12, 4  # a record: its length, that length's checksum, the bytes, their checksum
_IMAGES = ("image/encoded", "image", "image_raw", "img")
_LABELS = ("image/class/label", "label")
_BYTES, _INTEGERS = 1, 3  # kinds of feature


class Columns(NamedTuple):
    """The features that are taken, and class names."""

    image: str
    label: str | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ExampleChunk(OfOneFile):
    """Consecutive records of the file `path`, which messages call `name`.

    The first is that file's `record`, and the source's image `first`. `places` int64 [n, 2]: where their bytes are, and sizes.
    """

    name: str
    first: int
    record: int
    columns: Columns
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def identity(self) -> bytes:
        return json.dumps([self.name, self.record, self.columns]).encode() + self.places.tobytes()

    def read(self) -> Iterator[Original]:
        checksum = _checksum(self.path)
        with refusing(f"{self.path}: cannot be read", ReadError), Path(self.path).open("rb") as file:
            for offset, (place, size) in enumerate(self.places.tolist()):
                name = f"{self.name}#{self.record + offset}"
                label, start, end, problem = -1, 0, 0, why_no_bytes(size)
                content = b"" if problem else os.pread(file.fileno(), size + _CRC, place)
                if not problem and checksum(content[:size]) != content[size:]:
                    problem = "its bytes do not fit its CRC"
                if not problem:
                    label, start, end, problem = _values(content[:size], self.columns)
                image = content[start:end]
                yield Original(self.first + offset, name, label, image, self.path, place + start, problem)


def tfrecord_source(files: Files) -> Source:
    """Make a source of TFRecord files. They are read by records, in their order, and each record's checksum is compared.

    The image is the feature `image/encoded`, `image`, `image_raw` or `img` of the first record, or `image_column`. The label is
    one integer in `image/class/label` or `label`, or `label_column` ('none': no labels), -1 where it is missing. Class names
    are those of `label.labels.txt` beside the files, as TensorFlow Datasets writes it. Raises DataError for a file that is cut
    off, damaged between records, or compressed.
    """
    columns: Columns | None = None
    chunks: list[ExampleChunk] = []
    first = 0
    for path, name in zip(files.paths, files.names, strict=True):
        with refusing(f"{path}: cannot be read"), path.open("rb") as file:
            places = _places(path, file.fileno())
            if columns is None and len(places):
                start, size = places[0].tolist()
                columns = _columns(files, path, os.pread(file.fileno(), min(size, MAX_FILE_BYTES), start))
        for record in range(0, len(places), IMAGES_A_CHUNK):
            assert columns is not None, "there is a record"
            part = places[record : record + IMAGES_A_CHUNK]
            chunks.append(ExampleChunk(str(path), name, first + record, record, columns, part))
        first += len(places)
    if columns is None:
        raise DataError(f"{files.source}: has no records")
    return Source(columns.classes, chunks)


def _checksum(path: object) -> Callable[[bytes], bytes]:
    try:
        from google_crc32c import value
    except ImportError:
        raise DataError(f"{path}: TFRecord's checksums need a package: pip install 'simclr_dist[tfrecord]'") from None

    def masked(content: bytes) -> bytes:
        crc: int = value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    return masked


def _places(path: Path, descriptor: int) -> NDArray[np.int64]:
    """Find all records of a file. Only their lengths are read."""
    checksum = _checksum(path)
    places: array[int] = array("q")
    at, end = 0, os.fstat(descriptor).st_size
    while at < end:
        head = os.pread(descriptor, _HEAD, at)
        if checksum(head[:8]) != head[8:]:
            if at == 0 and (head[:2] == b"\x1f\x8b" or head[:1] == b"\x78"):  # gzip, zlib
                raise DataError(f"{path}: is compressed; unpack that first: images are read by their place")
            raise DataError(f"{path}: is no TFRecord file, is damaged, or is cut off (at byte {at})")
        (size,) = struct.unpack_from("<Q", head)
        if at + _HEAD + size + _CRC > end:
            raise DataError(f"{path}: is cut off in the record at byte {at}")
        places.extend((at + _HEAD, size))
        at += _HEAD + size + _CRC
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def _columns(files: Files, path: Path, record: bytes) -> Columns:
    try:
        features = _features(record)
    except ValueError as error:
        raise DataError(f"{path}: its first record is no tf.train.Example ({error})") from None
    has = f"its first record has {', '.join(map(printable, sorted(features))) or 'no feature'}"
    image = files.image_column or next((name for name in _IMAGES if name in features), None)
    if image is None or image not in features:
        raise DataError(f"{path}: which feature is the image? Choose with --image-column; {has}")
    label = files.label_column or next((name for name in _LABELS if name in features), None)
    if label in (None, NO_LABEL):
        return Columns(image, None, ())
    assert label is not None
    if label not in features:
        raise DataError(f"{path}: no feature {label!r} (--label-column); {has}")
    return Columns(image, label, class_names(path.with_name(f"{label.replace('/', '_')}.labels.txt")))


def _values(record: bytes, columns: Columns) -> tuple[int, int, int, str | None]:
    """Return an Example's label, its image's start and end. Or what is wrong with it."""
    label = -1
    try:
        features = _features(record)
        if columns.image not in features:
            return -1, 0, 0, f"no feature {printable(columns.image)!r}"
        images = [(start, end) for number, _, start, end in _values_of(record, features[columns.image], _BYTES) if number == 1]
        if len(images) != 1:
            return -1, 0, 0, f"{len(images)} images in feature {printable(columns.image)!r}"
        if columns.label in features:
            labels = list(_integers(record, features[columns.label]))
            if len(labels) != 1:
                return -1, 0, 0, f"{len(labels)} labels in feature {printable(columns.label)!r}"
            label = labels[0]
    except ValueError as error:
        return -1, 0, 0, f"no tf.train.Example ({error})"
    start, end = images[0]
    return label, start, end, why_no_label(label, len(columns.classes)) or why_no_bytes(end - start)


# ---- Protocol buffers: a message is fields, each a number and a kind, then a value

_Field = tuple[int, int, int, int]  # number; value of a whole number, -1 of another; where the value starts and ends


def _whole_number(record: bytes, at: int, end: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte. Returns where it ends, too."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        value |= (record[at] & 0x7F) << shift
        at += 1
        if record[at - 1] < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError(f"a damaged number at byte {at}")


def _fields(record: bytes, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        tag, at = _whole_number(record, at, end)
        value, size = -1, {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            value, after = _whole_number(record, at, end)
            size = after - at
        elif tag & 7 == 2:
            size, at = _whole_number(record, at, end)
        if size is None or at + size > end or not tag >> 3:
            raise ValueError(f"a damaged field at byte {at}")
        yield tag >> 3, value, at, at + size
        at += size


def _features(record: bytes) -> dict[str, tuple[int, int]]:
    """Find where each feature of an Example is, by name."""
    places: dict[str, tuple[int, int]] = {}
    for features, _, start, end in _fields(record, 0, len(record)):
        for entries, _, first, last in _fields(record, start, end) if features == 1 else ():
            entry = {number: (at, to) for number, _, at, to in _fields(record, first, last)} if entries == 1 else {}
            if 1 in entry and 2 in entry:
                places[record[slice(*entry[1])].decode("utf-8", "replace")] = entry[2]
    return places


def _values_of(record: bytes, feature: tuple[int, int], kind: int) -> Iterator[_Field]:
    for number, _, start, end in _fields(record, *feature):
        if number == kind:
            yield from _fields(record, start, end)


def _integers(record: bytes, feature: tuple[int, int]) -> Iterator[int]:
    for _, value, at, end in _values_of(record, feature, _INTEGERS):
        while at < end:  # several in one field, or one
            value, at = _whole_number(record, at, end)
            yield value - (1 << 64) if value >= 1 << 63 else value
