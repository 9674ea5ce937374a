"""Shards against their manifest: every tar's structure, every image's name, place, label and bytes."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tqdm import tqdm

from simclr_dist.convert.sources.archives import is_label, parse_label, webdataset_key
from simclr_dist.convert.sources.originals import is_image_name
from simclr_dist.convert.sources.tar import tar_members
from simclr_dist.convert.workers import workers
from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest_file
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import DataError, printable

_LONGEST_LABEL = 64


@dataclass(frozen=True)
class VerifySummary:
    """What `verify_shards` read: `images` that manifests list in `shards` tars, `bytes` of images read.

    `bad` images differ; `lines` were reported (a tar that is missing costs one, and all its images); `unlisted` images lie in
    the tars and are in no manifest.
    """

    images: int
    shards: int
    bytes: int
    bad: int
    lines: int
    unlisted: int


def verify_shards(
    folder: str | Path,
    *,
    decode: bool = False,
    processes: int | None = None,
    progress: bool = False,
    report: Callable[[str], object] = print,
) -> VerifySummary:
    """Read all shards of `folder`, or of its folders train and test, and `report` one line for each image that differs.

    Compared are the tars' sizes and structure, each image's key, place, size, sha256 and label, and with `decode` that it is
    an image of the size on record. Raises DataError for a manifest that cannot be used at all.
    """
    folder = Path(folder)
    folders = [folder]
    if os.path.isdir(folder) and not (folder / MANIFEST_NAME).exists():  # noqa: PTH112 (a name may be too long)
        folders = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")) or folders
        if bare := sorted({path.parent.name for path in folder.glob("*/*.tar")} - {each.name for each in folders}):
            raise DataError(f"{folder / bare[0]}: holds tars and no {MANIFEST_NAME} to compare them with")
    manifests = [parse_manifest(read_manifest_file(each), each) for each in folders]
    processes = processes or os.cpu_count() or 1
    shards = sum(len(manifest.shards) for manifest in manifests)
    bad = lines = unlisted = read = 0
    bar = tqdm(total=sum(map(len, manifests)), unit="image", disable=not (progress and sys.stderr.isatty()))
    try:
        with bar, workers(min(processes, shards), (__name__,)) as run:
            tasks = (task for manifest in manifests for task in _tasks(manifest))
            for images, done in run(bind(_check_shard, decode=decode), tasks):
                for line in done.lines:
                    report(line)
                bad, lines = bad + done.bad, lines + len(done.lines)
                unlisted, read = unlisted + done.unlisted, read + done.bytes
                bar.update(images)
    except BrokenProcessPool:
        raise DataError(f"{folder}: a worker process died, perhaps for lack of memory; use fewer processes") from None
    return VerifySummary(sum(map(len, manifests)), shards, read, bad, lines, unlisted)


class _Task(NamedTuple):
    path: Path
    size: int
    rows: dict[str, Any]  # columns of the manifest, for this tar


class _Done(NamedTuple):
    lines: list[str]
    bad: int
    unlisted: int
    bytes: int


def _tasks(manifest: Manifest) -> Iterator[_Task]:
    folder = Path(manifest.folder)
    about = json.loads(pq.read_schema(folder / MANIFEST_NAME).metadata[b"simclr_dist"])
    first = 0
    for entry, count in zip(about["shards"], manifest.shard_sizes.tolist(), strict=True):
        names = ("key", "offset", "size", "label", "width", "height", "sha256")
        rows = {name: getattr(manifest, name)[first : first + count] for name in names}
        yield _Task(folder / entry["name"], entry["bytes"], rows)
        first += count


def _check_shard(task: _Task, decode: bool) -> tuple[int, _Done]:
    """Number of images that a tar should have, and what is wrong with it."""
    path, size, rows = task
    count = len(rows["key"])
    lines: list[str] = []
    found_members: dict[int, tuple[str, int]] = {}
    members: dict[int, tuple[str, int]] | None = found_members
    labels: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                lines.append(f"{path}: has {found} bytes, the manifest says {size}")
            try:
                for member in tar_members(path):
                    name = member.name.removeprefix("./")
                    found_members[member.offset] = (name, member.size)
                    if is_label(name) and member.problem is None:
                        text = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset)
                        labels.setdefault(webdataset_key(name), text)  # of two samples of one key the first counts
            except DataError as error:
                lines.append(str(error))
                members = None  # the images may be whole all the same
            bad = total = 0
            for row in range(count):
                values = {name: column[row] for name, column in rows.items()}
                content = os.pread(file.fileno(), int(values["size"]), int(values["offset"]))
                total += len(content)
                if reason := _why_bad(path, values, content, members, labels, decode):
                    lines.append(f"{path}: image {printable(str(values['key']))}: {reason}")
                    bad += 1
    except OSError as error:
        return count, _Done([f"{path}: cannot be read: {error.strerror}; {count} images are lost"], count, 0, 0)
    places = {int(offset) for offset in rows["offset"]}
    unlisted = sum(is_image_name(name) for offset, (name, _) in (members or {}).items() if offset not in places)
    return count, _Done(lines, bad, unlisted, total)


def _why_bad(
    path: Path,
    row: dict[str, Any],
    content: bytes,
    members: dict[int, tuple[str, int]] | None,
    labels: dict[str, bytes],
    decode: bool,
) -> str | None:
    if hashlib.sha256(content).digest() != row["sha256"].tobytes():
        return "its bytes are not those of the manifest (sha256)"
    if members is not None:
        name, size = members.get(int(row["offset"]), ("", -1))
        key = webdataset_key(name)
        if str(row["key"]) not in (key, f"{path.name}/{key}") or size != row["size"]:
            return f"the tar has {printable(name) or 'nothing'} in its place"
        try:
            label = parse_label(labels[key], "cls") if key in labels else -1
        except DataError as error:
            return str(error)
        if label != row["label"]:
            return f"its label is {label} in the tar, {row['label']} in the manifest"
    if decode:
        try:
            image = prepare_image(content)
        except DataError as error:
            return f"cannot be decoded: {error}"
        if image.reason or (image.width, image.height) != (row["width"], row["height"]):
            return f"is {image.width} x {image.height} ({image.reason or 'as it is'}), not {row['width']} x {row['height']}"
    return None
