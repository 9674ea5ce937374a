"""What a finished conversion says of itself (conversion.json), so that the same command, given again, finds it done."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_dist.convert.sources.originals import Problem, Source
from simclr_dist.data.manifest import load_manifest

_NAME = "conversion.json"
_REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class ShardSummary:
    """What `write_shards` did, over all destinations.

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


def stamp_of(stamps: Iterable[str]) -> str:
    """A digest of all chunks' stamps, in hex: another one when a file of the source has been written to since."""
    return hashlib.sha256("".join(stamps).encode()).hexdigest()


def write_record(folder: Path, about: dict[str, object], converted: int, rejected: Iterable[Problem]) -> list[Path]:
    """Both files of a conversion; `about` is what a second run must agree on. Returns their paths."""
    record, left_out = folder / _NAME, folder / _REJECTED
    record.write_text(json.dumps(about | {"converted": converted}, indent=1) + "\n", encoding="ascii")
    lines = [json.dumps({"source": problem.name, "reason": problem.reason}) + "\n" for problem in rejected]
    if not lines:
        return [record]
    left_out.write_text("".join(lines), encoding="ascii")
    return [record, left_out]


def has_record(folder: Path) -> bool:
    """Whether a conversion that is finished says so in `folder`."""
    return (folder / _NAME).exists()


def read_record(folder: Path, about: dict[str, object], source: Source, sides: Sequence[str]) -> ShardSummary | None:
    """The conversion of `source` that `write_record` was told `about`; None where another one, or none, is in `folder`.

    Raises DataError when a manifest or a shard of it is missing or damaged.
    """
    try:
        found = json.loads((folder / _NAME).read_text(encoding="ascii"))
        converted = int(found.pop("converted"))
        lines = (folder / _REJECTED).read_text(encoding="ascii").splitlines() if (folder / _REJECTED).exists() else []
        rejected = tuple(Problem(each["source"], each["reason"]) for each in map(json.loads, lines))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if found != json.loads(json.dumps(about)):
        return None
    manifests = [load_manifest(folder / side) for side in sides]
    hashes = np.concatenate([manifest.sha256 for manifest in manifests])
    return ShardSummary(
        destinations=tuple(folder / side for side in sides),
        written=len(hashes),
        shards=sum(len(manifest.shards) for manifest in manifests),
        bytes=sum(int(manifest.shard_bytes.sum()) for manifest in manifests),
        classes=source.classes,
        rejected=rejected,
        skipped=source.skipped,
        converted=converted,
        duplicates=len(hashes) - len(np.unique(hashes.view("S32"))),
        already=True,
    )
