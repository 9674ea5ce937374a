"""Hold the training and test images of an evaluation. Checks that the two can be compared, and describes them for a result."""

from pathlib import Path
from typing import Any

import numpy as np

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.method.distributed import together
from simclr_dist.system.errors import DataError


class Sets:
    """Training and test images. Raises DataError, on all ranks, where the two cannot be compared."""

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.named = {"train": str(train), "test": str(test)}
        self.images = together(lambda: {"train": ShardDataset(train), "test": ShardDataset(test)})
        self.train, self.test = self.images["train"].manifest, self.images["test"].manifest
        self.classes = _count_classes(self.train, self.test)

    def describe(self) -> dict[str, Any]:
        """Return both sets and their classes for a result. A set: folder, digest, images with and without a label."""
        sets = {}
        for name, manifest in (("train", self.train), ("test", self.test)):
            images = {"images": len(manifest), "labelled": int((manifest.label >= 0).sum())}
            sets[name] = {"folder": str(manifest.folder), "digest": manifest.digest, **images}
        return {**sets, "classes": self.classes, "class_names": list(self.train.classes)}

    def largest_class_percent(self) -> float | None:
        """Return the largest class's percentage of the labelled test images. Returns None without labels."""
        labels = self.test.label[self.test.label >= 0]
        return 100 * float(np.bincount(labels).max()) / len(labels) if len(labels) else None

    def shared(self) -> int:
        """Count the test images that are training images too, byte for byte."""
        train = {digest.tobytes() for digest in self.train.sha256}
        return sum(digest.tobytes() in train for digest in self.test.sha256)


def _count_classes(train: Manifest, test: Manifest) -> int:
    """Count the classes of both sets; 0 where neither has labels. Raises DataError where they cannot be compared."""
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
        which = f"its {len(test.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}"
        raise DataError(f"{test.folder}: {which}; shard both from one source (--split)")
    return len(train.classes) or int(max(train.label.max(), test.label.max())) + 1
