"""A manifest for WebDataset tars that others have made; the tars stay as they are, and where they are."""

import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from simclr_dist.convert.sources.archives import is_label, parse_label, webdataset_key, why_unsafe
from simclr_dist.convert.sources.folders import is_hidden, why_not_followed
from simclr_dist.convert.sources.originals import MAX_IMAGE_BYTES, Problem, is_image_name
from simclr_dist.convert.sources.tar import TarMember, tar_members
from simclr_dist.convert.workers import workers
from simclr_dist.data.manifest import MANIFEST_NAME, ManifestRow, row_table, write_manifest
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import DataError, printable

_LONGEST_LABEL = 64


@dataclass(frozen=True)
class IndexSummary:
    """What `index_shards` wrote: `images`, of which some are `labelled`, in `shards` tars; `rejected` ones are left out."""

    manifest: Path
    images: int
    labelled: int
    shards: int
    rejected: tuple[Problem, ...]


def index_shards(
    folder: str | Path, *, processes: int | None = None, strict: bool = False, progress: bool = False
) -> IndexSummary:
    """Write `folder`/manifest.parquet for the tars in `folder`, which are read once and not changed.

    A sample is what has one key, WebDataset's: the name up to the first dot of its last part. Its image is the member whose
    extension is that of an image (`KEY.jpg` before `KEY.mask.png`), its label the integer in `KEY.cls`, -1 without one. Where
    two tars share a key, all keys become `TAR/KEY`. Left out, and listed in `folder`/rejected.jsonl: what cannot be decoded,
    images that shards would store re-encoded (`simclr-dist shard` converts them), keys that come twice in a tar, names that
    are absolute or have '..', links.

    Raises DataError, and writes nothing, when a tar is damaged or cut off, when there is a manifest already, when no image can
    be used, and, if `strict`, when any sample is left out.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # noqa: PTH112 (Path's raises for a name that is too long)
        raise DataError(f"{folder}: no such folder of tars")
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder / MANIFEST_NAME}: is there already; compare it with --verify {folder}, or remove it first")
    found = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not is_hidden(path.name))
    links = [(path, why_not_followed(folder.resolve(), path)) for path in found if path.is_symlink()]
    rejected = [Problem(printable(path.name), reason) for path, reason in links if reason]
    unreadable = "a name that is no printable text"
    rejected += [Problem(printable(path.name), unreadable) for path in found if not path.name.isprintable()]
    tars = [path for path in found if path.is_file() and printable(path.name) not in {problem.name for problem in rejected}]
    if not tars:
        which = f" that can be used: {rejected[0].name} ({rejected[0].reason})" if rejected else ""
        raise DataError(f"{folder}: holds no .tar file{which}")
    processes = processes or min(os.cpu_count() or 1, len(tars))
    try:
        with tempfile.TemporaryFile(dir=folder):  # before hours of work for nothing
            pass
        tables: list[pa.Table] = []
        bar = tqdm(total=len(tars), desc="reading", unit="tar", disable=not (progress and sys.stderr.isatty()))
        with bar, workers(min(processes, len(tars)), (__name__,)) as run:
            for table, problems in run(_read_tar, tars):
                tables.append(table)
                rejected += problems
                bar.update()
        rows = pa.concat_tables(tables)
        first = f"{rejected[0].name} ({rejected[0].reason})" if rejected else ""
        if strict and rejected:
            raise DataError(f"{folder}: strict, and {len(rejected)} samples cannot be used; the first: {first}")
        if not len(rows):
            raise DataError(
                f"{folder}: no image in its {len(tars)} tars can be used" + (f"; the first: {first}" if first else "")
            )
        if pc.count_distinct(rows.column("key")).as_py() < len(rows):
            keys = pc.binary_join_element_wise(rows.column("shard"), rows.column("key"), "/")
            rows = rows.set_column(0, rows.schema.field("key"), keys)
        if rejected:
            lines = [json.dumps({"source": problem.name, "reason": problem.reason}) + "\n" for problem in rejected]
            (folder / "rejected.jsonl").write_text("".join(lines), encoding="ascii")
        names = [path.name for path, table in zip(tars, tables, strict=True) if len(table)]
        manifest = write_manifest(folder, names, rows, ())
    except BrokenProcessPool:
        raise DataError(f"{folder}: a worker process died, perhaps for lack of memory; use fewer processes") from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None
    labelled = pc.sum(pc.greater_equal(rows.column("label"), 0)).as_py()
    return IndexSummary(manifest, len(rows), labelled, len(names), tuple(rejected))


@dataclass
class _Sample:
    key: str
    images: list[TarMember] = field(default_factory=list)
    label: TarMember | None = None


class _Reader(NamedTuple):
    path: Path
    descriptor: int
    rows: list[ManifestRow]
    rejected: list[Problem]
    seen: set[str]

    def take(self, sample: _Sample) -> None:
        """The sample's row, or the reason why there is none."""
        shown = printable(f"{self.path.name}/{sample.key}")
        try:
            if sample.key in self.seen:
                raise DataError("its key comes twice in the tar")
            self.seen.add(sample.key)
            self.rows.append(self._row(sample))
        except DataError as error:
            self.rejected.append(Problem(shown, str(error)))

    def _row(self, sample: _Sample) -> ManifestRow:
        plain = [image for image in sample.images if image.name.removeprefix(sample.key).count(".") == 1]
        images = plain or sample.images
        if len(images) != 1:
            names = ", ".join(printable(image.name) for image in images)
            raise DataError(f"{len(images)} images of one key: {names}" if images else "no image among its files")
        (image,) = images
        if not 0 < image.size <= MAX_IMAGE_BYTES:
            raise DataError("larger than 1 GiB" if image.size else "an empty file")
        label = -1
        if sample.label is not None:
            label = parse_label(self._read(sample.label, _LONGEST_LABEL), "cls")
        content = self._read(image, image.size)
        done = prepare_image(content)
        if done.reason:
            raise DataError(f"{done.reason}; `simclr-dist shard {self.path.name} DST` converts it")
        digest = hashlib.sha256(content).digest()
        return ManifestRow(sample.key, self.path.name, image.offset, image.size, label, done.width, done.height, digest)

    def _read(self, member: TarMember, most: int) -> bytes:
        return os.pread(self.descriptor, min(member.size, most), member.offset)


def _joined(samples: list[_Sample]) -> list[_Sample]:
    """An image and its label that lie apart, as in a tar of all images and then all labels, are one sample."""
    first: dict[str, _Sample] = {}
    whole = []
    for sample in samples:
        other = first.setdefault(sample.key, sample)
        if other is not sample and not sample.images and other.label is None:
            other.label = sample.label
        elif other is not sample and not other.images and sample.label is None:
            other.images = sample.images
        else:
            whole.append(sample)
    return whole


def _read_tar(path: Path) -> tuple[pa.Table, list[Problem]]:
    """Rows and problems of one tar; each image is decoded."""
    with path.open("rb") as file:
        reader = _Reader(path, file.fileno(), [], [], set())
        samples: list[_Sample] = []
        for member in tar_members(path):
            name = member.name.removeprefix("./")
            if any(is_hidden(part) for part in name.split("/") if part not in (".", "..")):
                continue
            reason = member.problem or why_unsafe(name) or (None if name.isprintable() else "a name that is no printable text")
            if reason:
                reader.rejected.append(Problem(printable(f"{path.name}/{name}"), reason))
                continue
            key = webdataset_key(name)
            if not samples or key != samples[-1].key:
                samples.append(_Sample(key))
            if is_label(name):
                samples[-1].label = member
            elif is_image_name(name):
                samples[-1].images.append(member._replace(name=name))
        for sample in _joined(samples):
            reader.take(sample)
    return row_table(reader.rows), reader.rejected
