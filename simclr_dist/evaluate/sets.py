"""Hold the training and test images of an evaluation. Checks that the two can be compared, and describes them for a result."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.method.distributed import together
from simclr_dist.system.errors import DataError


class Sets:
    """Training and test images. Raises DataError, on all ranks, where the two cannot be compared.

    A label may be any number from 0, but costs are by classes. So a class is a label that occurs in either set, and the images'
    and manifests' labels are its place among these, `labels` (ascending, then -1 for none): `labels[place]` is the number that
    the shards have. Classes have the names that the shards have (`names`, by number), else their numbers.
    """

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.named = {"train": str(train), "test": str(test)}
        self.images = together(lambda: {"train": ShardDataset(train, checked=True), "test": ShardDataset(test, checked=True)})
        manifests = [images.manifest for images in self.images.values()]
        _check_comparable(*manifests)
        self.names = {name: images.manifest.classes for name, images in self.images.items()}
        labels = np.unique(np.concatenate([manifest.label for manifest in manifests]))
        labels = labels[labels >= 0]
        self.classes, self.labels = len(labels), np.append(labels, -1)
        if names := manifests[0].classes:
            names = tuple(names[label] for label in labels)
        elif not np.array_equal(labels, np.arange(len(labels))):
            names = tuple(map(str, labels.tolist()))
        for images, manifest in zip(self.images.values(), manifests, strict=True):
            places = np.where(manifest.label < 0, -1, labels.searchsorted(manifest.label))
            images.manifest = dataclasses.replace(manifest, label=places, classes=names)
        self.train, self.test = self.images["train"].manifest, self.images["test"].manifest

    def check_channels(self, card: Mapping[str, Any], encoder: object) -> None:
        """Raise DataError where the encoder takes images of other channels."""
        for manifest in (self.train, self.test):
            check_channels(manifest, card, encoder)

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


def check_channels(manifest: Manifest, card: Mapping[str, Any], encoder: object) -> None:
    """Raise DataError where the encoder takes images of other channels than these. It takes 8 and 16 bits alike."""
    if manifest.kind.channels != (channels := len(card["mean"])):
        why = f"its images have {manifest.kind}, and {encoder} takes {channels}"
        raise DataError(f"{manifest.folder}: {why}; shard the images again with --channels {channels}")


def _check_comparable(train: Manifest, test: Manifest) -> None:
    """Raise DataError where the sets cannot be compared."""
    for manifest in (train, test):
        if len(manifest) == 0:
            raise DataError(f"{manifest.folder}: the set is empty; an evaluation needs images")
    without = [manifest for manifest in (train, test) if int(manifest.label.max()) < 0]
    if len(without) == 2:
        return
    if without:
        raise DataError(f"{without[0].folder}: no image has a label, but the other set's have; label both, or neither")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        how = f"{differing[0]!r} is in one of them only" if differing else "their order differs"
        which = f"its {len(test.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}"
        raise DataError(f"{test.folder}: {which}; shard both from one source (--split)")
