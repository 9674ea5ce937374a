"""The images that an evaluation learns from and asks about: that the two can be compared, and what a result says of them."""

from pathlib import Path
from typing import Any

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.method.distributed import together
from simclr_dist.system.errors import DataError


class Sets:
    """Training and test images; raises DataError, on all ranks, where the two cannot be compared."""

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.named = {"train": str(train), "test": str(test)}
        self.images = together(lambda: {"train": ShardDataset(train), "test": ShardDataset(test)})
        self.train, self.test = self.images["train"].manifest, self.images["test"].manifest
        self.classes = _count_classes(self.train, self.test)

    def shared(self) -> int:
        """How many test images are training images too, byte for byte."""
        known = {digest.tobytes() for digest in self.train.sha256}
        return sum(digest.tobytes() in known for digest in self.test.sha256)


def describe_set(manifest: Manifest) -> dict[str, Any]:
    """Folder, digest, and how many images there are, with and without a label."""
    labelled = int((manifest.label >= 0).sum())
    return {"folder": str(manifest.folder), "digest": manifest.digest, "images": len(manifest), "labelled": labelled}


def _count_classes(train: Manifest, test: Manifest) -> int:
    """How many classes both sets have, 0 where neither has labels; raises DataError where they cannot be compared."""
    for manifest in (train, test):
        if len(manifest) == 0:
            raise DataError(f"{manifest.folder}: the set is empty; an evaluation needs images")
    without = [manifest for manifest in (train, test) if int(manifest.label.max()) < 0]
    if len(without) == 2:
        return 0
    if without:
        raise DataError(f"{without[0].folder}: no image has a label, but the other set's have; label both, or neither")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        how = f"{differing[0]!r} is in one of them only" if differing else "their order differs"
        raise DataError(
            f"{test.folder}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}; "
            "shard both from one source (--split)"
        )
    return len(train.classes) or int(max(train.label.max(), test.label.max())) + 1
