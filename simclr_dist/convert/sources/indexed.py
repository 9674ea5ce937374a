"""Read folders with an index.json: MosaicML's MDS and LitData. Both keep samples in files, as columns.

They are read here and not by their libraries, which unpickle what a file says is pickled. A file is the number of its samples,
where each one starts, and the samples: sizes of the columns that have no fixed one, then the columns.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from simclr_dist.convert.sources.archives import why_unsafe
from simclr_dist.convert.sources.originals import (
    IMAGES_A_CHUNK,
    NO_LABEL,
    Files,
    Original,
    ReadError,
    Source,
    file_stamp,
    why_no_bytes,
    why_no_label,
)
from simclr_dist.data.pixels.images import check_pixels
from simclr_dist.system.errors import DataError, printable, reason_of, refusing
from simclr_dist.system.files import read_object

_MOST_UNPACKED = 1 << 30
_CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli"}  # their names, and Arrow's
_PICKLED = ("pkl", "pickle")
_ENCODED = ("jpeg", "png", "image", "bytes", "file", "tifffile")
_IMAGES, _LABELS = ("image", "img", "x", "jpg"), ("label", "class", "y", "cls")
_INTEGERS = ("int", "str_int", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16")  # of pixels that come as they are


class Column(NamedTuple):
    """A column of the samples. `size` is None where each value has its own."""

    name: str
    encoding: str
    size: int | None


class SampleFile(NamedTuple):
    """A file of samples, as the index has it. Messages call it `name`; it has `bytes` when it is unpacked from `packed`."""

    path: str
    name: str
    samples: int
    bytes: int
    packed: str | None
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class SampleChunk:
    """Consecutive samples of a file. The first is that file's `sample`, and the source's image `first`. Columns by number."""

    file: SampleFile
    first: int
    sample: int
    samples: int
    image: int
    label: int | None

    def __len__(self) -> int:
        return self.samples

    def identity(self) -> bytes:
        return json.dumps([self.file[1:], self.sample, self.samples, self.image, self.label]).encode()

    def stamp(self) -> bytes:
        return file_stamp(self.file.path)

    def read(self) -> Iterator[Original]:
        path, packed = self.file.path, self.file.packed
        with refusing(f"{path}: cannot be read", ReadError), Path(path).open("rb") as file:
            read = bind(_read, io.BytesIO(_unpacked(file, packed, self.file.bytes)) if packed else file)
            starts = read(4 + 4 * self.sample, 4 * (self.samples + 1))
            if read(0, 4) != self.file.samples.to_bytes(4, "little") or len(starts) != 4 * (self.samples + 1):
                raise DataError(f"{path}: is damaged, or has not the {self.file.samples} samples that its index says")
            places = np.frombuffer(starts, "<u4").tolist()
            for offset, (start, end) in enumerate(itertools.pairwise(places)):
                label, content, at, problem = self._sample(read, start, end)
                name = f"{self.file.name}#{self.sample + offset}"
                kept = None if packed or at < 0 else path
                yield Original(self.first + offset, name, label, content, kept, max(at, 0), problem)

    def _sample(self, read: Callable[[int, int], bytes], start: int, end: int) -> tuple[int, bytes, int, str | None]:
        """Read a sample's label, image and place in the file (-1: nowhere). Or what is wrong with it."""
        columns = self.file.columns
        varying = [number for number, column in enumerate(columns) if column.size is None]
        head = read(start, 4 * len(varying)).ljust(4 * len(varying), b"\xff")
        sizes = dict(zip(varying, np.frombuffer(head, "<u4").tolist(), strict=True))
        at, places = start + 4 * len(varying), []
        for number, column in enumerate(columns):
            size = sizes.get(number, column.size or 0)
            places.append((at, size))
            at += size
        if at != end or end > self.file.bytes:
            return -1, b"", -1, "its sizes do not fit; the file is damaged"
        label, (place, size) = -1, places[self.image]
        try:
            if self.label is not None:
                at, label_size = places[self.label]
                label = _integer(read(at, min(label_size, 32)), columns[self.label].encoding)
            if problem := why_no_label(label, 0) or why_no_bytes(size):
                return label, b"", -1, problem
            content = read(place, size)
            if columns[self.image].encoding == "pil":
                return label, _as_file(content), -1, None
        except (DataError, ValueError) as error:
            return label, b"", -1, printable(reason_of(error))
        return label, content, place, None


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _integer(content: bytes, encoding: str) -> int:
    if encoding == "str_int":
        return int(content)
    number = np.frombuffer(content, np.dtype("int64" if encoding == "int" else encoding).newbyteorder("<"))
    return int(number.item())  # ValueError unless it is one


def _as_file(content: bytes) -> bytes:
    """Make an image file of width, height, mode and pixels. Raises DataError, ValueError."""
    width, height, length = np.frombuffer(content[:12], "<u4").tolist()
    mode = content[12 : 12 + min(length, 8)].decode("ascii", "replace")
    if mode not in _MODES:
        raise DataError(f"pixels of mode {mode!r}; save them as PNG")
    check_pixels(width, height)
    target = io.BytesIO()
    image = Image.frombytes(mode, (width, height), content[12 + length :])
    image.save(target, "TIFF" if mode == "CMYK" else "PNG")
    return target.getvalue()


def _unpacked(file: Any, codec: str, size: int) -> bytes:
    """Unpack a file of `size` bytes, and no more than that."""
    try:
        with pa.CompressedInputStream(file, codec) as stream:
            parts, left = [], size + 1
            while left > 0 and (part := stream.read(min(left, 1 << 24))):
                parts.append(part)
                left -= len(part)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: cannot be unpacked ({reason_of(error)})") from None
    if left != 1:
        raise DataError(f"{file.name}: unpacks to {'more' if left < 1 else 'fewer'} bytes than the {size} that its index says")
    return b"".join(parts)


def indexed_source(files: Files) -> Source:
    """Make a source of one index.json: MosaicML's MDS, or LitData.

    It keeps the order. The image is the column `image`, `img`, `x` or `jpg`, or the only one of encoded images, or
    `image_column`; the label an integer in `label`, `class`, `y` or `cls`, or `label_column` ('none': no labels). Columns
    of LitData without names are '0', '1' and so on. Raises DataError for pickled images and labels, which are never
    unpickled, and for unknown files.
    """
    whole = [path for path in files.paths if path.parent == files.root]  # of a folder that was put together of others
    if len(files.names) > 1 and not whole:
        raise DataError(f"{files.source}: holds {len(files.names)} index.json; name one, like {files.paths[0]}")
    path = (whole or files.paths)[0]
    index = read_object(path, {"shards?": list, "chunks?": list, "config?": dict})
    try:
        listed = list(_mds(path, index) if "shards" in index else _litdata(path, index))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not an index of MDS or LitData ({type(error).__name__}: {reason_of(error)})") from None
    if not sum(file.samples for file in listed):
        raise DataError(f"{path}: has no samples")
    chunks: list[SampleChunk] = []
    first = 0
    for file in listed:
        if file.columns != listed[0].columns:
            raise DataError(f"{path}: {file.name}: has other columns than {listed[0].name}; shard them apart")
        step = file.samples if file.packed else IMAGES_A_CHUNK
        image, label = _choose(path, files, file.columns)
        chunks += (
            SampleChunk(file, first + sample, sample, min(step, file.samples - sample), image, label)
            for sample in range(0, file.samples, max(step, 1))
        )
        first += file.samples
    return Source((), chunks)


def _mds(path: Path, index: dict[str, Any]) -> Iterator[SampleFile]:
    for shard in index["shards"]:
        if shard["format"] != "mds":
            raise DataError(f"{path}: holds {printable(str(shard['format']))[:20]} files, which have no images; it takes MDS")
        raw, packed = shard["raw_data"], shard["zip_data"]
        columns = map(Column, shard["column_names"], shard["column_encodings"], shard["column_sizes"])
        codec = None
        if packed and not path.with_name(str(raw["basename"])).exists():
            codec = _CODECS.get(name := str(shard["compression"]).split(":")[0])
            if codec is None:
                raise DataError(
                    f"{path}: is packed by {printable(name)}, and not by {', '.join(_CODECS)}; write it anew with zstd"
                )
        yield _file(path, (packed if codec else raw)["basename"], shard["samples"], raw["bytes"], codec, columns)


def _litdata(path: Path, index: dict[str, Any]) -> Iterator[SampleFile]:
    config = index["config"]
    loader, packed = config.get("item_loader") or "PyTreeLoader", config.get("compression")
    if config.get("encryption") or loader != "PyTreeLoader":
        raise DataError(f"{path}: holds encrypted files, or tokens ({printable(str(loader))}); it takes plain samples")
    if config.get("compression_level") not in (None, "chunk") or (packed and str(packed).split(":")[0] != "zstd"):
        raise DataError(f"{path}: is packed inside its files; write it anew with compression_level='chunk', or none")
    spec = json.loads(config["data_spec"])[1]
    children, names = spec["children_spec"], json.loads(spec["context"] or "null")
    formats = [str(name) for name in config["data_format"]]
    if len(children) != len(formats) or any(child["type"] for child in children) or not isinstance(names, list):
        names = list(range(len(formats)))
    for chunk in index["chunks"]:
        columns = (Column(str(name), kind.split(":")[0], None) for name, kind in zip(names, formats, strict=True))
        yield _file(path, chunk["filename"], chunk["chunk_size"], chunk["chunk_bytes"], packed and "zstd", columns)


def _file(path: Path, name: Any, samples: Any, size: Any, codec: str | None, columns: Any) -> SampleFile:
    """Check what the index says of a file. Raises DataError, ValueError."""
    if not (isinstance(name, str) and isinstance(samples, int) and isinstance(size, int) and 0 <= samples <= size < 1 << 32):
        raise ValueError(f"samples and bytes of {name!r}")
    if reason := why_unsafe(name):
        raise DataError(f"{path}: {printable(name)}: {reason}")
    columns = tuple(columns)
    for column in columns:
        fits = column.size is None or (isinstance(column.size, int) and column.size >= 0)
        if not (isinstance(column.name, str) and isinstance(column.encoding, str) and fits):
            raise ValueError(f"columns of {name!r}")
    file = path.parent / name
    with refusing(f"{file}: cannot be read"):
        there = file.stat().st_size
    if not codec and there != size:
        raise DataError(f"{file}: has {there} bytes, its index says {size}; copy it again")
    if codec and size > _MOST_UNPACKED:
        raise DataError(f"{file}: unpacks to {size} bytes, and {_MOST_UNPACKED >> 20} MiB is the most; write smaller files")
    return SampleFile(str(file), name, samples, size, codec, columns)


def _choose(path: Path, files: Files, columns: tuple[Column, ...]) -> tuple[int, int | None]:
    """Find the columns of image and label. Raises DataError where they are unclear or cannot be used."""
    number = {column.name: place for place, column in enumerate(columns)}
    has = "it has " + ", ".join(f"{printable(column.name)} ({printable(column.encoding)})" for column in columns)
    fits = [column.name for column in columns if column.encoding in (*_ENCODED, "pil")]
    image = files.image_column or next((name for name in _IMAGES if name in fits), fits[0] if len(fits) == 1 else None)
    label = files.label_column or next((name for name in _LABELS if name in number), NO_LABEL)
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name in number and columns[number[name]].encoding in _PICKLED:
            raise DataError(f"{path}: column {name!r} ({option}) is pickled, and never unpickled; write it as jpeg, png or int")
    if image not in fits:
        raise DataError(f"{path}: which column is the image? Choose with --image-column; {has}")
    if label == NO_LABEL:
        return number[image], None
    if label not in number or columns[number[label]].encoding not in _INTEGERS:
        raise DataError(f"{path}: column {label!r} (--label-column) is no integer; choose one, or {NO_LABEL}; {has}")
    return number[image], number[label]
