"""Record a finished conversion in conversion.json. By it the same command finds the work done. And tell other readers of it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_dist.convert.sources.originals import Problem, Source, count_reasons
from simclr_dist.data.manifest import load_manifest
from simclr_dist.system.errors import DamagedError, DataError, reason_of
from simclr_dist.system.files import fitting, json_lines, read_object

RECORD_NAME = "conversion.json"
REJECTED_NAME = "rejected.jsonl"
INFO_NAME = "_info.json"
DUPLICATES_NAME = "duplicates.jsonl"
_CURE = "name a new folder for the shards, or remove this one"


@dataclass(frozen=True)
class ShardSummary:
    """The result of `write_shards`, over all destinations.

    `images` of each of `destinations`, the folders that hold a manifest, in `shards` tars of `bytes` together. `rejected`
    images are left out for the reason given; `skipped` files were never taken for images. `converted` images are stored
    re-encoded; `changes` counts why, by kind. `duplicates` have the same bytes as another one and are kept; `copies` names
    them, and images that the other side of a split has. `links` of a folder were followed. `already`: all was there from an
    earlier run.
    """

    destinations: tuple[Path, ...]
    images: tuple[int, ...]
    shards: int
    bytes: int
    classes: tuple[str, ...]
    rejected: tuple[Problem, ...]
    skipped: tuple[Problem, ...]
    converted: int
    changes: dict[str, int]
    duplicates: int
    copies: tuple[Problem, ...]
    links: int
    already: bool = False

    @property
    def written(self) -> int:
        """Count all images."""
        return sum(self.images)


def write_record(
    folder: Path, about: dict[str, object], converted: int, changes: dict[str, int],
    rejected: Sequence[Problem], skipped: Sequence[Problem], copies: Sequence[Problem],
) -> list[Path]:  # fmt: skip
    """Write the files of a conversion's record. `about` is what a second run must agree on. Returns their paths."""
    record = folder / RECORD_NAME
    counts = {"converted": converted, "changes": changes, "rejected": len(rejected), "skipped": count_reasons(skipped)}
    record.write_text(json.dumps(about | counts, indent=1) + "\n", encoding="ascii")
    return [record, *write_list(folder / REJECTED_NAME, rejected), *write_list(folder / DUPLICATES_NAME, copies)]


def write_info(folder: Path, sides: Mapping[str, Mapping[str, int]]) -> list[Path]:
    """Write _info.json: how many images each tar has, for readers of others. Returns the paths.

    `sides` has that for each side ('', train, val or test) by the tar's name. timm's `wds/` takes the splits, wids the list.
    The file lies beside each manifest; the split of a side '' is train. With several sides a file above them has all.
    """
    splits: dict[Path, dict[str, dict[str, int]]] = {}
    for side, counts in sides.items():
        splits[folder / side] = {side or "train": dict(counts)}
        if side:
            splits.setdefault(folder, {})[side] = {f"{side}/{name}": count for name, count in counts.items()}
    for place, of_place in splits.items():
        about: dict[str, object] = {
            "splits": {
                side: {"name": side, "num_samples": sum(n.values()), "filenames": [*n], "shard_lengths": [*n.values()]}
                for side, n in of_place.items()
            }
        }
        if len(of_place) == 1:
            (counts,) = of_place.values()
            about |= {"wids_version": 1, "shardlist": [{"url": name, "nsamples": n} for name, n in counts.items()]}
        (place / INFO_NAME).write_text(json.dumps(about, indent=1) + "\n", encoding="ascii")
    return [place / INFO_NAME for place in splits]


def write_list(path: Path, problems: Iterable[Problem]) -> list[Path]:
    """List images and reasons in a file. Returns [its path], or [] where there are none."""
    lines = [json.dumps({"source": problem.name, "reason": problem.reason}) + "\n" for problem in problems]
    if lines:
        path.write_text("".join(lines), encoding="ascii")
    else:
        path.unlink(missing_ok=True)
    return [path] * bool(lines)


def check_rejected(folder: Path) -> None:
    """Refuse a rejected.jsonl that is none. `write_list` would replace it. Raises DataError."""
    try:
        list(_read_list(folder / REJECTED_NAME))
    except DamagedError:
        raise DataError(f"{folder / REJECTED_NAME}: was not written by simclr-dist; move it elsewhere") from None


def read_record(folder: Path, about: dict[str, object], source: Source, sides: Sequence[str]) -> ShardSummary | None:
    """Read the record of `source`'s conversion. Returns None where `folder` holds none, or one of another `about`.

    Raises DataError when the record, a manifest or a shard of it is missing or damaged.
    """
    record = read_object(folder / RECORD_NAME, {"converted": int, "changes?": dict}, _CURE)
    converted, changes = record.pop("converted", 0), record.pop("changes", {})
    record.pop("rejected", 0), record.pop("skipped", {})
    if record != json.loads(json.dumps(about)):
        return None
    rejected, copies = (tuple(_read_list(folder / name)) for name in (REJECTED_NAME, DUPLICATES_NAME))
    manifests = [load_manifest(folder / side) for side in sides]
    hashes = np.concatenate([manifest.sha256 for manifest in manifests])
    return ShardSummary(
        tuple(folder / side for side in sides), tuple(map(len, manifests)), shards=sum(len(one.shards) for one in manifests),
        bytes=sum(int(manifest.shard_bytes.sum()) for manifest in manifests), classes=source.classes,
        rejected=rejected, skipped=source.skipped, converted=converted, changes=changes,
        duplicates=len(hashes) - len(np.unique(hashes.view("S32"))), copies=copies, links=source.links, already=True,
    )  # fmt: skip


def _read_list(path: Path) -> Iterator[Problem]:
    try:
        lines = json_lines(path.read_bytes(), lambda line: fitting(line, {"source": str, "reason": str}))
        for _, line in lines:
            if line is None:
                raise DamagedError(f"{path}: is damaged; {_CURE}")
            yield Problem(line["source"], line["reason"])
    except FileNotFoundError:
        return  # nothing was left out
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {reason_of(error)}; {_CURE}") from None
