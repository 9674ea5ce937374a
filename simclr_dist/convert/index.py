"""Make a manifest for WebDataset tars of other makers. The tars stay as they are, and where they are."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from simclr_dist.convert.finished import REJECTED_NAME, check_rejected, write_list
from simclr_dist.convert.sources.archives import is_label, parse_label, read_label, webdataset_key, why_unsafe
from simclr_dist.convert.sources.folders import is_hidden
from simclr_dist.convert.sources.originals import Problem, is_image_name, why_no_bytes
from simclr_dist.convert.sources.tar import TarMember, tar_members
from simclr_dist.convert.workers import workers
from simclr_dist.data.index import INDEX_NAME, write_index
from simclr_dist.data.manifest import MANIFEST_NAME, ManifestRow, row_table, write_manifest
from simclr_dist.data.pixels.channels import prepare
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.system.errors import DataError, printable, refusing
from simclr_dist.system.machine import cores
from simclr_dist.system.progress import Progress

_UNREADABLE = "a name that is no printable text"


@dataclass(frozen=True)
class IndexSummary:
    """The result of `index_shards`: `images`, some `labelled`, in `shards` tars.

    Those in `rejected` are left out; `skipped` is no tar, or hidden.
    """

    manifest: Path
    images: int
    labelled: int
    shards: int
    rejected: tuple[Problem, ...]
    skipped: tuple[Problem, ...]


def index_shards(
    folder: str | Path,
    *, kind: Kind = RGB8, processes: int | None = None, strict: bool = False, progress: bool = False,
) -> IndexSummary:  # fmt: skip
    """Write `folder`/manifest.parquet for the tars in `folder`. They are read once and not changed. All images are of `kind`.

    A sample is what has one key, WebDataset's: the name up to the first dot of its last part. Its image is the member with an
    image's extension (`KEY.jpg` before `KEY.mask.png`), its label the integer in `KEY.cls`, -1 without one. Where
    two tars share a key, all keys become `TAR/KEY`. Left out, and listed in `folder`/rejected.jsonl: what cannot be decoded,
    images that shards would store re-encoded (`simclr-dist shard` converts them), keys that come twice in a tar, names that
    are absolute or have '..', links. Raises DataError, and writes nothing, when a tar is damaged or cut off, when there is a
    manifest already, when no image can be used, and, if `strict`, when any sample is left out.
    """
    folder = Path(folder)
    tars, rejected, skipped = _usable_tars(folder)
    shown = Progress("reading", len(tars), "tars", shown=progress)
    with refusing(f"{folder}: cannot be written"):
        with tempfile.TemporaryFile(dir=folder):  # fails now, and not after hours of work
            pass
        tables: list[pa.Table] = []
        with shown, workers(min(processes or cores(), len(tars)), (__name__,), folder) as run:
            for table, problems, hidden in run(bind(_read_tar, kind=kind), tars):
                tables.append(table)
                rejected += problems
                skipped += hidden
                shown.done += 1
        rows = pa.concat_tables(tables)
        if strict and rejected:
            raise DataError(f"{folder}: strict, and {len(rejected)} samples cannot be used; the first: {rejected[0]}")
        if not len(rows):
            first = f"; the first: {rejected[0]}" if rejected else ""
            raise DataError(f"{folder}: no image in its {len(tars)} tars can be used{first}")
        if pc.count_distinct(rows.column("key")).as_py() < len(rows):
            keys = pc.binary_join_element_wise(rows.column("shard"), rows.column("key"), "/")
            rows = rows.set_column(0, rows.schema.field("key"), keys)
        write_list(folder / REJECTED_NAME, rejected)
        names = [path.name for path, table in zip(tars, tables, strict=True) if len(table)]
        manifest = write_manifest(folder, names, rows, (), kind)
        write_index(manifest)
    labelled = pc.sum(pc.greater_equal(rows.column("label"), 0)).as_py()
    return IndexSummary(manifest, len(rows), labelled, len(names), tuple(rejected), tuple(skipped))


def _usable_tars(folder: Path) -> tuple[list[Path], list[Problem], list[Problem]]:
    """List tars to read, those left out, and other files. Raises DataError where there is nothing to do."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of tars")
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder / MANIFEST_NAME}: is there already; compare it with --verify {folder}, or remove it first")
    check_rejected(folder)
    tars: list[Path] = []
    rejected: list[Problem] = []
    skipped: list[Problem] = []
    for path in sorted(folder.iterdir()):
        name = printable(path.name)
        if path.name in (REJECTED_NAME, INDEX_NAME):
            continue
        if is_hidden(path.name):
            skipped.append(Problem(name, "hidden"))
        elif path.suffix != ".tar":
            skipped.append(Problem(name, "a folder" if path.is_dir() else "no .tar file"))
        elif not path.is_file():
            rejected.append(Problem(name, "a broken link" if path.is_symlink() else "not a regular file"))
        elif not path.name.isprintable():
            rejected.append(Problem(name, _UNREADABLE))
        else:
            tars.append(path)
    if not tars:
        others = rejected + skipped
        raise DataError(f"{folder}: holds no .tar file" + (f" that can be used: {others[0]}" if others else ""))
    return tars, rejected, skipped


def _row(
    tar: str, descriptor: int, key: str, images: list[TarMember], label_file: TarMember | None, kind: Kind
) -> ManifestRow:  # fmt: skip
    """Make a sample's row. Raises DataError with the reason why there is none."""
    images = [image for image in images if image.name.removeprefix(key).count(".") == 1] or images
    if len(images) != 1:
        names = ", ".join(printable(image.name) for image in images)
        raise DataError(f"{len(images)} images of one key: {names}" if images else "no image among its files")
    (image,) = images
    if reason := why_no_bytes(image.size):
        raise DataError(reason)
    label = -1 if label_file is None else parse_label(read_label(descriptor, label_file), "cls")
    content = os.pread(descriptor, image.size, image.offset)
    prepared = prepare(content, kind)
    if prepared.reason:
        raise DataError(f"{prepared.reason}; `simclr-dist shard {tar} DST` converts it")
    digest, size = hashlib.sha256(content).digest(), (prepared.width, prepared.height)
    return ManifestRow(key, tar, image.offset, image.size, label, *size, digest)


def _read_tar(path: Path, kind: Kind) -> tuple[pa.Table, list[Problem], list[Problem]]:
    """Read the rows, problems and hidden files of one tar. Each image is decoded."""
    rows: dict[str, ManifestRow | None] = {}
    rejected: list[Problem] = []
    skipped: list[Problem] = []
    samples: list[tuple[str, list[TarMember]]] = []  # images of a key that follow each other
    labels: dict[str, TarMember] = {}
    with path.open("rb") as file:
        for member in tar_members(path):
            name = member.name.removeprefix("./")
            if any(is_hidden(part) for part in name.split("/") if part not in (".", "..")):
                skipped.append(Problem(printable(f"{path.name}/{name}"), "hidden"))
                continue
            reason = member.problem or why_unsafe(name) or (None if name.isprintable() else _UNREADABLE)
            if reason:
                rejected.append(Problem(printable(f"{path.name}/{name}"), reason))
                continue
            key = webdataset_key(name)
            if not samples or key != samples[-1][0]:
                samples.append((key, []))
            if is_label(name):
                labels.setdefault(key, member)  # of several the first counts, as for `shard` and `--verify`
            elif is_image_name(name):
                samples[-1][1].append(member._replace(name=name))
        pictured = {key for key, images in samples if images}
        for key, images in samples:
            if not images and key in pictured:  # its label and other files may lie apart: all images, then all labels
                continue
            try:
                if key in rows:
                    raise DataError("its key comes twice in the tar")
                rows[key] = None
                rows[key] = _row(path.name, file.fileno(), key, images, labels.get(key), kind)
            except DataError as error:
                rejected.append(Problem(printable(f"{path.name}/{key}"), str(error)))
    return row_table(list(filter(None, rows.values()))), rejected, skipped
