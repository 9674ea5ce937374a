"""Keep a manifest's columns as raw numbers in one file. All processes map it, so a machine holds its pages once.

Its header lists the shards; a process reads that and what it needs of the columns. So a start costs shards, not images. It is
made once, from a Parquet file that has passed every check here, in bounded memory. It lies beside that file, or in the cache
where that folder takes none. Another Parquet file, or a damaged header, and it is made anew.
"""

import errno
import hashlib
import itertools
import json
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from simclr_dist.data.columns import Keys, Sides, content_digest
from simclr_dist.data.pixels.kinds import MOST_CHANNELS, RGB8, Kind
from simclr_dist.system.errors import DataError, reason_of, say
from simclr_dist.system.files import lock, replacing

INDEX_NAME = "manifest.index"
FORMAT_VERSION = 1  # of a manifest whose images are 8-bit RGB
KIND_VERSION = 2  # of one that says what else they are; programs that know 8-bit RGB alone refuse it
METADATA_KEY = b"simclr_dist"
_PARQUET = {
    "key": pa.string(), "shard": pa.string(), "offset": pa.int64(), "size": pa.int64(), "label": pa.int64(),
    "class_name": pa.string(), "width": pa.int32(), "height": pa.int32(), "sha256": pa.binary(32),
}  # fmt: skip
SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "class_name") for name, kind in _PARQUET.items()])

_NUMBERS = {"offset": np.int64, "size": np.int64, "label": np.int64, "width": np.int32, "height": np.int32}
_COLUMNS = {name: np.dtype(kind).newbyteorder("<") for name, kind in _NUMBERS.items()} | {"sha256": np.dtype(("u1", 32))}
_BOUND = np.dtype("<i8")  # where a key begins in all their text, and the last one ends
_END = struct.Struct("<32sQ8s")  # sha256 of the header, its length, what file this is
_MAGIC = b"simclr-1"
_KIND_MAGIC = b"simclr-2"  # where images are not 8-bit RGB: programs that know those alone pass over it
_MOST_HEADER = 1 << 30  # of some ten million shards
_ROWS = 1 << 16  # at a time
_SECOND = 10**9


class Parquet:
    """An open Parquet file of a manifest. `shown` names it in messages. Raises DataError where it cannot be read."""

    def __init__(self, file: BinaryIO, shown: str) -> None:
        self.file, self.shown = file, shown
        about = os.fstat(file.fileno())
        self.mode = stat.S_IMODE(about.st_mode) if about.st_nlink else None  # None: a file without a name
        self.mark = max(about.st_mtime_ns, about.st_ctime_ns) + _SECOND  # the time of an index says of which file it is

    @cached_property
    def sha256(self) -> str:
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto

    def open(self) -> pq.ParquetFile:
        try:
            # No threads of pyarrow's: with them some 8 % of short commands ended with 134 (pyarrow 26.0). With a buffer, a row
            # group is not read at once.
            return pq.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def batches(self, table: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
                batch.validate(full=True)  # texts that are no UTF-8, for one
                yield batch
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: BaseException) -> DataError:
        return DataError(f"{self.shown}: not a readable Parquet file ({reason_of(error)}); shard the images again")


def open_index(parquet: Parquet, beside: Path | None, cache: Path | None) -> dict[str, Any]:
    """Return the fields of the Parquet file's `Manifest`, but its folder. Arrays are views of a mapped file.

    The index is `beside`, or else in the folder `cache`. It is made in the first place that takes it, by one process while
    others wait. Without a place it is held in memory. Raises DataError for a Parquet file that cannot be used.
    """
    for make in (False, True):
        for place in _places(parquet, beside, cache):
            with suppress(OSError):  # it cannot be read there, or made
                if make:
                    _make_there(place, parquet)
                if fields := _read(place, parquet):
                    return fields
    if beside is not None or cache is not None:
        tried = " and ".join(str(place.parent) for place in _places(parquet, beside, cache))
        say(f"{parquet.shown}: each process reads it into its memory, as no index can be kept in {tried}", "WARNING: ")
    with os.fdopen(os.memfd_create(INDEX_NAME), "w+b") as file:
        _make(parquet, file)
        return _mapped(file)[1]


def write_index(parquet: Path) -> None:
    """Make the index beside a Parquet file, if the disk takes it.

    Then nobody waits for it later.
    """
    with suppress(OSError), parquet.open("rb") as file:
        place, made_of = parquet.with_name(INDEX_NAME), Parquet(file, str(parquet))
        _make_there(place, made_of)
        os.utime(place, ns=(made_of.mark, made_of.mark))  # for other users, who could not, and would hash it at each start


def indices(parquet: Path, cache: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and fields of each index of a Parquet file. Only those that can be read."""
    with parquet.open("rb") as file:
        about = Parquet(file, str(parquet))
        for place in _places(about, parquet.with_name(INDEX_NAME), cache):
            with suppress(OSError):
                if fields := _read(place, about):
                    yield place, fields


def _places(parquet: Parquet, beside: Path | None, cache: Path | None) -> Iterator[Path]:
    if beside is not None:
        yield beside
    if cache is not None:
        yield cache / "manifests" / f"{parquet.sha256[:40]}.index"


def _read(place: Path, parquet: Parquet) -> dict[str, Any] | None:
    """Map an index. Returns None where there is none, or one that is damaged, or of another Parquet file.

    Raises OSError where it cannot be read: it may be whole all the same.
    """
    try:
        with place.open("rb") as file:
            header, fields = _mapped(file)
            # By its time the Parquet file need not be read. A copy has other times, and then a moment's look at the bytes
            # decides. A file that is changing at this moment may keep its time.
            if os.fstat(file.fileno()).st_mtime_ns != parquet.mark:
                if header["parquet_sha256"] != parquet.sha256:
                    return None
                if time.time_ns() > parquet.mark:
                    with suppress(OSError):  # another user's
                        os.utime(file.fileno(), ns=(parquet.mark, parquet.mark))
            return fields
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _mapped(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """Map an index's file. Returns its header and the fields of a `Manifest`. Raises what `_read` knows."""
    descriptor = file.fileno()
    length = os.fstat(descriptor).st_size
    place = max(0, length - _END.size)
    digest, size, magic = _END.unpack(os.pread(descriptor, _END.size, place).ljust(_END.size))
    text = (
        os.pread(descriptor, size, place - size) if magic in (_MAGIC, _KIND_MAGIC) and size <= min(place, _MOST_HEADER) else b""
    )
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("its end is damaged")
    header = json.loads(text)
    # A file may come from others: a name with a folder in it would open files outside the folder of shards.
    names, images = _checked_names(header["names"], header["samples"]), sum(header["samples"])
    counts, starts = np.array([header["bytes"], header["samples"]], dtype=np.int64), _starts(images)
    if counts.shape != (2, len(names)) or starts["keys"] + header["key_bytes"] + size != place:
        raise ValueError("its parts do not fit")
    data = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
    columns = {name: np.frombuffer(data, kind, images, starts[name]) for name, kind in _COLUMNS.items()}
    bounds = np.frombuffer(data, _BOUND, images + 1, starts["bounds"])
    keys = np.frombuffer(data, np.uint8, header["key_bytes"], starts["keys"])
    return header, {
        "shards": names, "shard_sizes": counts[1], "shard_bytes": counts[0], "classes": tuple(map(str, header["classes"])),
        "digest": str(header["digest"]), "short_side": float(header["short_side"]), "pixels": int(header["pixels"]),
        "kind": _kind(RGB8._asdict() | header),
        "key": Keys(bounds[:-1], bounds[1:], keys), **columns,
    }  # fmt: skip


def _kind(about: dict[str, Any]) -> Kind:
    """Read what the images are. Raises ValueError for what none can be, and what int and a dict raise."""
    kind = Kind(int(about["channels"]), int(about["bit_depth"]))
    if not (1 <= kind.channels <= MOST_CHANNELS and kind.bit_depth in (8, 16)):
        raise ValueError("no kind of images")
    return kind


def _starts(images: int) -> dict[str, int]:
    """Return the place of each part in the file."""
    sizes = {name: images * kind.itemsize for name, kind in _COLUMNS.items()}
    starts = [0, *itertools.accumulate([(images + 1) * _BOUND.itemsize, *sizes.values()])]
    return dict(zip(("bounds", *sizes, "keys"), starts, strict=True))


def _checked_names(names: list[Any], samples: list[Any]) -> tuple[str, ...]:
    """Return the names of shards. Raises ValueError for one that is no file's name, or that comes twice."""
    strange = any(not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name for name in names)
    if strange or len(set(names)) < len(names) or min(samples, default=1) < 1:
        raise ValueError("no list of shards")
    return tuple(names)


def _make_there(place: Path, parquet: Parquet) -> None:
    """Make an index, unless another process does. Raises OSError where the disk does not take it."""

    def still_wanted() -> None:
        if _read(place, parquet):  # made where there are no locks; a reader of that one may lose it if it is replaced
            raise FileExistsError(errno.EEXIST, "made by another process", str(place))
        if parquet.mode is not None and not os.fstat(parquet.file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "its manifest was replaced meanwhile", str(place))

    place.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(place.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # no locks, as on NFS for a folder: then each makes its own, and the first one stays
            lock(folder, wait=True)
        if _read(place, parquet) is None:
            with replacing(place, still_wanted, new=not place.exists()) as file:
                _make(parquet, file)
                if parquet.mode is not None:  # who may read the one may read the other
                    os.fchmod(file.fileno(), parquet.mode)
    finally:
        os.close(folder)


def _make(parquet: Parquet, file: BinaryIO) -> None:
    """Write the index into an empty file. Raises DataError for a Parquet file that is no manifest, or contradicts itself."""
    with parquet.open() as table:
        about = _read_about(parquet.shown, table)
        images, free = sum(about["samples"]), os.statvfs(file.fileno())
        if free.f_blocks > 0 and free.f_bavail * free.f_frsize < _starts(images)["keys"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # now, and not after all the work
        sides = Sides()
        keys = _write_columns(parquet, table, about, file, sides)
        hashes = (_hashes(batch.column(0)) for batch in parquet.batches(table, ["sha256"]))
        labels = (batch.column(0).to_numpy() for batch in parquet.batches(table, ["label"]))
        about["digest"] = content_digest(keys, about["classes"], hashes, labels)
    about |= {"short_side": sides.median(), "pixels": sides.pixels, "key_bytes": file.seek(0, 2) - _starts(images)["keys"]}
    text = json.dumps(about | {"parquet_sha256": parquet.sha256}).encode()
    file.write(text + _END.pack(hashlib.sha256(text).digest(), len(text), _KIND_MAGIC if "channels" in about else _MAGIC))
    file.flush()
    pa.default_memory_pool().release_unused()


def _write_columns(
    parquet: Parquet, table: pq.ParquetFile, about: dict[str, Any], file: BinaryIO, sides: Sides
) -> Iterator[list[str]]:
    """Write all columns, and yield the keys. Counts sizes in `sides`. Raises DataError."""
    starts, row, text = _starts(sum(about["samples"])), 0, 0
    ends, names = np.cumsum(about["samples"]), pa.array(about["names"], pa.string())
    shard_bytes = np.array(about["bytes"], dtype=np.int64)

    def put(part: str, first: int, values: NDArray[Any]) -> None:
        file.seek(starts[part] + first * (values.nbytes // max(1, len(values))))
        file.write(np.ascontiguousarray(values).data)

    put("bounds", 0, np.zeros(1, _BOUND))
    for batch in parquet.batches(table, [name for name in _PARQUET if name != "class_name"]):
        shard = ends.searchsorted(np.arange(row, row + len(batch)), side="right")
        if (shard == len(ends)).any() or not names.take(pa.array(shard)).equals(batch.column("shard")):
            raise _misfit(parquet.shown)
        column = {name: batch.column(name).to_numpy() for name in _NUMBERS}
        _check_rows(parquet.shown, row, column, shard_bytes[shard], len(about["classes"]))
        for name, values in column.items():
            put(name, row, values.astype(_COLUMNS[name], copy=False))
        put("sha256", row, _hashes(batch.column("sha256")))
        key = batch.column("key")
        bounds = np.frombuffer(key.buffers()[1], np.int32)[key.offset : key.offset + len(key) + 1].astype(_BOUND)
        put("keys", text, np.frombuffer(key.buffers()[2] or b"", np.uint8)[bounds[0] : bounds[-1]])
        put("bounds", row + 1, bounds[1:] - bounds[0] + text)
        sides.add(column["width"], column["height"])
        row, text = row + len(batch), text + int(bounds[-1] - bounds[0])
        yield key.to_pylist()
    if row != sum(about["samples"]):
        raise _misfit(parquet.shown)


def _check_rows(shown: str, first: int, column: dict[str, NDArray[Any]], tar: NDArray[np.int64], classes: int) -> None:
    # Subtracting, not adding: offset + size of a damaged manifest may overflow.
    inside = (column["size"] > 0) & (column["offset"] >= 0) & (column["offset"] <= tar - column["size"])
    labels_known = (column["label"] >= -1) & ((column["label"] < classes) if classes else True)
    possible = inside & labels_known & (column["width"] > 0) & (column["height"] > 0)
    if not possible.all():
        row = first + int(possible.argmin())
        raise DataError(f"{shown}: row {row} has an impossible offset, size or label; shard the images again")


def _hashes(column: pa.Array) -> NDArray[np.uint8]:
    return np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 32)[column.offset : column.offset + len(column)]


def _misfit(shown: str) -> DataError:
    return DataError(f"{shown}: its rows do not follow its own list of shards; shard the images again")


def _read_about(shown: str, table: pq.ParquetFile) -> dict[str, Any]:
    """Read shards and classes from the schema's metadata. Returns names, bytes and samples of shards, names of classes."""
    folder = shown.rpartition("/")[0]
    foreign = DataError(
        f"{shown}: not a manifest of simclr-dist; move it away, and `simclr-dist shard --index {folder}` writes one"
    )
    schema = table.schema_arrow
    try:
        about: Any = json.loads(schema.metadata[METADATA_KEY])
        version = about["version"]
        kind = _kind(about)._asdict() if version == KIND_VERSION else {}
        entries = [(str(s["name"]), int(s["bytes"]), int(s["samples"])) for s in about["shards"]]
        np.array([sizes for _, *sizes in entries], dtype=np.int64)
        names, sizes, samples = map(list, zip(*entries, strict=True)) if entries else ([], [], [])
        classes = [str(name) for name in about["classes"]]
        _checked_names(names, samples)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise foreign from None
    if version not in (FORMAT_VERSION, KIND_VERSION):
        newest = f"manifest version {version}, this simclr-dist reads {FORMAT_VERSION} and {KIND_VERSION}"
        raise DataError(f"{shown}: {newest}; shard the images again")
    if not schema.remove_metadata().equals(SCHEMA):
        raise foreign
    if table.metadata.num_rows == 0:
        raise DataError(f"{shown}: lists no image; shard the images again")
    if table.metadata.num_rows != sum(samples):
        raise _misfit(shown)
    return {"names": names, "bytes": sizes, "samples": samples, "classes": classes, **kind}
