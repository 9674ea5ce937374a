"""Images to WebDataset shards and a manifest: every image is decoded once, and what is no image is listed and left out.

Two passes. The first reads the source in order and decodes everything, so that the second knows exactly which images exist:
only then can they be shuffled and dealt into full shards in a way that no number of processes can change. Bytes that the
second pass could not read again (a Parquet row, a converted image) wait on disk, beside the destination.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simclr_dist import stopping
from simclr_dist.data.images import prepare_image
from simclr_dist.data.manifest import ManifestRow, write_manifest
from simclr_dist.data.sources import FileChunk, Problem, RowGroupChunk, find_source, printable
from simclr_dist.errors import ConfigError, DataError

SPLIT_NAMES = ("train", "test")

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class ShardSummary:
    """What `write_shards` did, over all destinations.

    `written` images in `shards` tars of `bytes` together; `destinations` are the folders that hold a manifest. `rejected`
    images are left out for the reason given; `skipped` files were never taken for images. `converted` images are stored
    re-encoded, `duplicates` have the same bytes as another one and are kept.
    """

    destinations: tuple[Path, ...]
    written: int
    shards: int
    bytes: int
    classes: tuple[str, ...]
    rejected: tuple[Problem, ...]
    skipped: tuple[Problem, ...]
    converted: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class _Record:
    """A good image; its final bytes are `size` bytes at `offset` of the file `path`."""

    index: int
    name: str
    label: int
    extension: str
    width: int
    height: int
    path: str
    offset: int
    size: int
    sha256: bytes
    converted: bool


def _verify(
    chunk: FileChunk | RowGroupChunk, spool: Path, short_side: int | None, quality: int
) -> tuple[list[_Record], list[Problem]]:
    """First pass: decode a chunk's images; bytes that cannot be read again go to this process's file in `spool`."""
    records, rejected = [], []
    path = spool / str(os.getpid())
    with path.open("ab") as file:
        for original in chunk.read():
            try:
                if original.problem is not None:
                    raise DataError(original.problem)
                image = prepare_image(original.content, short_side=short_side, quality=quality)
            except DataError as error:
                rejected.append(Problem(printable(original.name), str(error)))
                continue
            converted = image.content is not original.content
            if converted or original.path is None:
                place, offset = str(path), file.tell()
                file.write(image.content)
            else:
                place, offset = original.path, 0
            records.append(
                _Record(
                    original.index, original.name, original.label, image.extension, image.width, image.height,
                    place, offset, len(image.content), hashlib.sha256(image.content).digest(), converted,
                )
            )  # fmt: skip
    return records, rejected


def _write_shard(task: tuple[Path, Sequence[_Record]], classes: tuple[str, ...]) -> list[ManifestRow]:
    """Second pass: one tar, on disk when this returns, and the manifest's rows for it."""
    from webdataset.writer import TarWriter  # brings torch with it, which the first pass needs not wait for

    path, records = task
    keys = [f"{record.index:09d}" for record in records]
    with path.open("wb") as file:
        # An integer mtime keeps tarfile from adding PAX headers; user and group are webdataset's fixed ones.
        with TarWriter(file, encoder=False, mtime=0, format="USTAR_FORMAT") as tar:
            for key, record in zip(keys, records, strict=True):
                about: dict[str, object] = {"source": record.name, "width": record.width, "height": record.height}
                members: dict[str, object] = {"__key__": key, record.extension: _read_again(record)}
                if record.label >= 0:
                    members["cls"] = str(record.label).encode()
                    about |= {"label": record.label} | ({"class_name": classes[record.label]} if classes else {})
                tar.write(members | {"json": json.dumps(about, sort_keys=True).encode()})
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(path, "r:") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    return [
        ManifestRow(
            key, path.name, offsets[f"{key}.{r.extension}"], r.size, r.label, r.width, r.height, r.sha256
        )
        for key, r in zip(keys, records, strict=True)
    ]  # fmt: skip


def _read_again(record: _Record) -> bytes:
    with open(record.path, "rb") as file:  # noqa: PTH123 (a source's name need not be valid text)
        file.seek(record.offset)
        content = file.read(record.size)
    if hashlib.sha256(content).digest() != record.sha256:
        raise DataError(f"{printable(record.name)}: changed while it was being sharded; shard again when nothing writes to it")
    return content


def write_shards(
    source: str | Path,
    destination: str | Path,
    *,
    shard_size: int = 1000,
    seed: int = 0,
    short_side: int | None = None,
    quality: int = 95,
    split: tuple[float, ...] | None = None,
    processes: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> ShardSummary:
    """Convert the images of `source` (see `find_source`) to tars of `shard_size` images and a manifest in `destination`.

    Images are shuffled by `seed`; the same input, settings and seed give the same bytes for any number of `processes`
    (None: one for each CPU if there is work for it; with more than one, call this under `if __name__ == "__main__"`).
    `split`, like (0.8, 0.2), writes `destination`/train and /test, stratified by label, images with equal bytes on one side.
    See `prepare_image` for `short_side` and `quality`. Nothing is at `destination` before all of it is; the work is done in
    `destination`.partial, which for Parquet and converted images takes as much disk again. `destination`/rejected.jsonl
    lists what was rejected.

    Raises ConfigError for a setting out of range; DataError when no image can be used, when `destination` holds something
    or cannot be written, and, if `strict`, when any image is rejected.
    """
    _check_settings(shard_size=shard_size, seed=seed, short_side=short_side, quality=quality, split=split, processes=processes)
    destination = Path(destination).resolve()
    _check_destination(destination, Path(source).resolve())
    found = find_source(source)
    if processes is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(cpus, 1 + len(found) // 500)  # starting one takes as long as decoding some hundred images
    if min(processes, len(found.chunks)) <= 1:
        with stopping.blocked():  # its import of torch passes over what a signal raises; and no bar has a thread yet
            import webdataset.writer  # noqa: F401
    bar = partial(tqdm, unit="image", disable=not (progress and sys.stderr.isatty()))
    try:
        with _working_folder(destination) as work, _workers(min(processes, len(found.chunks))) as run:
            spool, out = work / "spool", work / "out"
            spool.mkdir()
            out.mkdir()
            records: list[_Record] = []
            rejected = list(found.rejected)
            verify = partial(_verify, spool=spool, short_side=short_side, quality=quality)
            with bar(desc="decoding", total=len(found)) as shown:
                for good, bad in run(verify, found.chunks):
                    records += good
                    rejected += bad
                    shown.update(len(good) + len(bad))
            _check_images(source, records, rejected, strict)
            parts = _deal(records, len(found), seed, split)
            tars: list[Path] = []
            with bar(desc="writing", total=len(records)) as shown:
                for name, part in parts.items():
                    tars += _write_part(out / name, part, found.classes, shard_size, run, shown)
            total_bytes = sum(tar.stat().st_size for tar in tars)
            if rejected:
                lines = [json.dumps({"source": problem.name, "reason": problem.reason}) + "\n" for problem in rejected]
                (out / "rejected.jsonl").write_text("".join(lines), encoding="ascii")
                _sync(out / "rejected.jsonl")
            _sync(out)
            shutil.rmtree(spool)
            out.rename(destination)
            _sync(destination.parent)
    except BrokenProcessPool:
        raise DataError(f"{destination}: a worker process died, perhaps for lack of memory; use fewer processes") from None
    except OSError as error:
        raise DataError(f"{destination}: cannot be written: {error.strerror or error}") from None
    return ShardSummary(
        destinations=tuple(destination / name for name in parts),
        written=len(records),
        shards=len(tars),
        bytes=total_bytes,
        classes=found.classes,
        rejected=tuple(rejected),
        skipped=found.skipped,
        converted=sum(record.converted for record in records),
        duplicates=len(records) - len({record.sha256 for record in records}),
    )


def _check_settings(
    *, shard_size: int, seed: int, short_side: int | None, quality: int, split: tuple[float, ...] | None, processes: int | None
) -> None:
    for name, value, low, high in (
        ("shard_size", shard_size, 1, None),
        ("seed", seed, 0, 2**64 - 1),
        ("short_side", short_side, 1, None),
        ("quality", quality, 1, 100),
        ("processes", processes, 1, None),
    ):
        if value is not None and (value < low or (high is not None and value > high)):
            raise ConfigError(f"{name}: {value} is out of range; give {f'{low} to {high}' if high else f'{low} or more'}")
    if split is not None and (len(split) != 2 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6):
        shares = "/".join(f"{share:g}" for share in split)
        raise ConfigError(f"split: {shares} must be two shares above 0, train and test, that add up to 1, like 0.8/0.2")


def _check_destination(destination: Path, source: Path) -> None:
    if destination.is_relative_to(source) or source.is_relative_to(destination):
        raise DataError(f"{destination}: lies inside the source or holds it; name a folder elsewhere")
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; name a new folder")
    if destination.is_dir():
        if destination.is_mount():
            raise DataError(f"{destination}: is a mount point, which cannot be put in place at once; name a folder inside it")
        if any(destination.iterdir()):
            raise DataError(f"{destination}: exists and is not empty; name a new folder, or remove it first")


@contextmanager
def _working_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that no other run works in; it goes at the end, and what a killed run left goes now."""
    beside = destination.with_name(f"{destination.name}.partial")
    beside.mkdir(parents=True, exist_ok=True)
    lock = beside / "lock"
    if not lock.exists() and any(beside.iterdir()):
        raise DataError(f"{beside}: is in the way and was not made by simclr-dist; move it elsewhere")
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{destination}: another run is writing it; wait for that one or stop it") from None
        for leftover in beside.glob("run-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # its last worker may be writing still
        try:
            # A name of its own: a killed run's last worker may still be writing to the old one.
            yield Path(tempfile.mkdtemp(prefix="run-", dir=beside))
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _workers(processes: int) -> Iterator[Map]:
    """`map` over that many processes, results in order; for one, `map` itself."""
    if processes <= 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "webdataset.writer"])
    # Not multiprocessing.Pool, which waits for ever when a worker is killed.
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: workers of a killed parent would otherwise wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _check_images(source: str | Path, records: list[_Record], rejected: list[Problem], strict: bool) -> None:
    first = f"{rejected[0].name} ({rejected[0].reason})" if rejected else ""
    if not records:
        raise DataError(f"{source}: none of its {len(rejected)} images can be used; the first: {first}")
    if strict and rejected:
        raise DataError(f"{source}: strict, and {len(rejected)} images cannot be used; the first: {first}")


def _deal(records: list[_Record], total: int, seed: int, split: tuple[float, ...] | None) -> dict[str, list[_Record]]:
    """The records of each destination ('' for one alone), shuffled."""
    # Sorting raw draws, as Generator's methods may change between numpy versions; and a draw for every image of the source,
    # so that leaving one out does not reorder the others.
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    places, sides = generator.random_raw(total), generator.random_raw(total)
    shuffled = sorted(records, key=lambda record: (places[record.index], record.index))
    if split is None:
        return {"": shuffled}
    once = {record.sha256: record for record in reversed(records)}
    by_label = sorted(once.values(), key=lambda record: (record.label, sides[record.index], record.index))
    # Every 1/share-th image of the list sorted by label: each class and the whole set get the share to within one image.
    share = round(split[1] * 1_000_000)
    chosen = {r.sha256 for i, r in enumerate(by_label) if (i + 1) * share // 1_000_000 > i * share // 1_000_000}
    train = [record for record in shuffled if record.sha256 not in chosen]
    test = [record for record in shuffled if record.sha256 in chosen]
    if not train or not test:
        raise DataError(f"split {split[0]:g}/{split[1]:g} of {len(once)} different images leaves one side empty; use another")
    return dict(zip(SPLIT_NAMES, (train, test), strict=True))


def _write_part(
    folder: Path, records: list[_Record], classes: tuple[str, ...], shard_size: int, run: Map, shown: "tqdm[Any]"
) -> list[Path]:
    """All shards of one destination, then its manifest; returns the tars."""
    folder.mkdir(exist_ok=True)
    shards = [records[first : first + shard_size] for first in range(0, len(records), shard_size)]
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(shards))]
    rows: list[ManifestRow] = []
    for written in run(partial(_write_shard, classes=classes), list(zip(paths, shards, strict=True))):
        rows += written
        shown.update(len(written))
    _sync(write_manifest(folder, [path.name for path in paths], rows, classes))
    _sync(folder)
    return paths


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
