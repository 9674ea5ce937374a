"""Record a finished conversion in conversion.json. By it the same command finds the work done."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_dist.convert.sources.originals import Problem, Source
from simclr_dist.data.manifest import load_manifest

RECORD_NAME = "conversion.json"
_REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class ShardSummary:
    """The result of `write_shards`, over all destinations.

    `written` images in `shards` tars of `bytes` together; `destinations` are the folders that hold a manifest. `rejected`
    images are left out for the reason given; `skipped` files were never taken for images. `converted` images are stored
    re-encoded, `duplicates` have the same bytes as another one and are kept. `already`: all was there from an earlier run.
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
    already: bool = False


def write_record(folder: Path, about: dict[str, object], converted: int, rejected: Iterable[Problem]) -> list[Path]:
    """Write both files of a conversion. `about` is what a second run must agree on. Returns their paths."""
    record = folder / RECORD_NAME
    record.write_text(json.dumps(about | {"converted": converted}, indent=1) + "\n", encoding="ascii")
    return [record, *write_rejected(folder, rejected)]


def write_rejected(folder: Path, rejected: Iterable[Problem]) -> list[Path]:
    """List what is left out in `folder`/rejected.jsonl. Returns [its path], or [] where nothing is left out."""
    lines = [json.dumps({"source": problem.name, "reason": problem.reason}) + "\n" for problem in rejected]
    path = folder / _REJECTED
    if lines:
        path.write_text("".join(lines), encoding="ascii")
    return [path] * bool(lines)


def read_record(folder: Path, about: dict[str, object], source: Source, sides: Sequence[str]) -> ShardSummary | None:
    """Read the record of `source`'s conversion. Returns None where `folder` holds none, or one of another `about`.

    Raises DataError when a manifest or a shard of it is missing or damaged.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="ascii"))
        converted = int(record.pop("converted"))
        lines = (folder / _REJECTED).read_text(encoding="ascii").splitlines() if (folder / _REJECTED).exists() else []
        rejected = tuple(Problem(each["source"], each["reason"]) for each in map(json.loads, lines))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if record != json.loads(json.dumps(about)):
        return None
    manifests = [load_manifest(folder / side) for side in sides]
    hashes = np.concatenate([manifest.sha256 for manifest in manifests])
    return ShardSummary(
        tuple(folder / side for side in sides), written=len(hashes), shards=sum(len(manifest.shards) for manifest in manifests),
        bytes=sum(int(manifest.shard_bytes.sum()) for manifest in manifests), classes=source.classes,
        rejected=rejected, skipped=source.skipped, converted=converted,
        duplicates=len(hashes) - len(np.unique(hashes.view("S32"))), already=True,
    )  # fmt: skip
