"""Check shards against their manifest. Every tar's structure counts, and every image's name, place, label and bytes."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np

from simclr_dist.convert.sources.archives import is_label, parse_label, read_label, webdataset_key
from simclr_dist.convert.sources.originals import is_image_name
from simclr_dist.convert.sources.tar import tar_members
from simclr_dist.convert.workers import workers
from simclr_dist.data.index import indices
from simclr_dist.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from simclr_dist.data.pixels.channels import prepare
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.data.remote.cache import cache_settings
from simclr_dist.system.errors import DataError, printable, reason_of
from simclr_dist.system.machine import cores
from simclr_dist.system.progress import Progress

_COLUMNS = ("key", "offset", "size", "label", "width", "height", "sha256")
_Members = dict[int, tuple[str, int]]  # name and size by place


@dataclass(frozen=True)
class VerifySummary:
    """The result of `verify_shards`: `images` of manifests in `shards` tars. `bytes` is the size of the images read.

    `bad` images differ. `lines` were reported (a missing tar costs one line, and all its images). `unlisted` images lie in
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
    *, decode: bool = False, processes: int | None = None, progress: bool = False, report: Callable[[str], object] = print,
) -> VerifySummary:  # fmt: skip
    """Read all shards of `folder`, or of its train and test. `report` a line for each image that differs.

    Compared are the tars' sizes and structure, each image's key, place, size, sha256 and label. With `decode` it must also be
    an image of the size on record. Raises DataError for a manifest that cannot be used at all.
    """
    folder = Path(folder)
    folders = [folder]
    if os.path.isdir(folder) and not (folder / MANIFEST_NAME).exists():
        folders = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")) or folders
        if bare := sorted({path.parent.name for path in folder.glob("*/*.tar")} - {each.name for each in folders}):
            raise DataError(f"{folder / bare[0]}: holds tars and no {MANIFEST_NAME} to compare them with")
    manifests = [read_manifest(each, fresh=True) for each in folders]  # not by an index, which may be damaged itself
    for manifest in manifests:
        _check_indices(manifest, report)
    shards = sum(len(manifest.shards) for manifest in manifests)
    numbers, reported = np.zeros(3, dtype=np.int64), 0
    shown = Progress("reading", sum(map(len, manifests)), "images", shown=progress)
    with shown, workers(min(processes or cores(), shards), (__name__,), folder) as run:
        for manifest in manifests:
            results = run(bind(_check_shard, kind=manifest.kind if decode else None), _tasks(manifest))
            for images, (lines, *counted) in zip(manifest.shard_sizes.tolist(), results, strict=True):
                for line in lines:
                    report(line)
                numbers, reported = numbers + counted, reported + len(lines)
                shown.done += images
    bad, unlisted, read = numbers.tolist()
    return VerifySummary(sum(map(len, manifests)), shards, read, bad, reported, unlisted)


def _check_indices(manifest: Manifest, report: Callable[[str], object]) -> None:
    """Remove an index whose columns are not those of a fresh manifest. The next start makes it anew."""
    for index, mapped in indices(Path(manifest.folder, MANIFEST_NAME), cache_settings().folder):
        pairs: list[tuple[Any, Any]] = [*zip(manifest.key.parts, mapped["key"].parts, strict=True)]
        pairs += [(getattr(manifest, name), mapped[name]) for name in _COLUMNS[1:]]
        if not all(np.array_equal(fresh, of_index) for fresh, of_index in pairs):
            try:
                index.unlink()
                report(f"{index}: is damaged, and is removed; the next start makes it anew")
            except OSError as error:
                report(f"{index}: is damaged, and cannot be removed: {reason_of(error)}")


def _tasks(manifest: Manifest) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """List each tar's path and size. The manifest's columns for it come third."""
    ends = manifest.shard_ends.tolist()
    for shard, size, first, end in zip(manifest.shards, manifest.shard_bytes.tolist(), [0, *ends], ends, strict=False):
        yield Path(manifest.folder, shard), size, {name: getattr(manifest, name)[first:end] for name in _COLUMNS}


def _check_shard(task: tuple[Path, int, dict[str, Any]], kind: Kind | None) -> tuple[list[str], int, int, int]:
    """Check a tar. Returns lines on what is wrong, and the numbers of bad and unlisted images and of bytes read."""
    path, size, rows = task
    count = len(rows["key"])
    lines: list[str] = []
    members: _Members = {}
    labels: dict[str, bytes] = {}
    whole = True
    try:
        with path.open("rb") as file:
            if (there := os.fstat(file.fileno()).st_size) != size:
                lines.append(f"{path}: has {there} bytes, the manifest says {size}")
            try:
                for member in tar_members(path):
                    name = member.name.removeprefix("./")
                    members[member.offset] = (name, member.size)
                    if is_label(name) and member.problem is None:
                        # Of two samples with one key the first counts.
                        labels.setdefault(webdataset_key(name), read_label(file.fileno(), member))
            except DataError as error:
                lines.append(str(error))
                whole = False  # the images may be whole all the same
            bad = total = 0
            for row in range(count):
                values = {name: column[row] for name, column in rows.items()}
                content = os.pread(file.fileno(), int(values["size"]), int(values["offset"]))
                total += len(content)
                if reason := _why_bad(path, values, content, members if whole else None, labels, kind):
                    lines.append(f"{path}: image {printable(str(values['key']))}: {reason}")
                    bad += 1
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}; {count} images are lost"], count, 0, 0
    places = set(rows["offset"].tolist())
    unlisted = sum(is_image_name(name) for offset, (name, _) in members.items() if whole and offset not in places)
    return lines, bad, unlisted, total


def _why_bad(
    path: Path, row: dict[str, Any], content: bytes, members: _Members | None, labels: dict[str, bytes], kind: Kind | None
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
    if kind is not None:
        try:
            image = prepare(content, kind)
        except DataError as error:
            return f"cannot be decoded: {error}"
        if image.reason or (image.width, image.height) != (row["width"], row["height"]):
            return f"is {image.width} x {image.height} ({image.reason or 'as it is'}), not {row['width']} x {row['height']}"
    return None
