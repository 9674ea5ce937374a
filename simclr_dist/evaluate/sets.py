"""Hold the training, validation and test images of an evaluation. Checks that they can be compared."""

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
    """Training and test images, and `val` to choose by. Raises DataError, on all ranks, where they cannot be compared.

    A label may be any number from 0, but costs are by classes. So a class is a label that occurs in one of them, and the
    images' and manifests' labels are its place among these, `labels` (ascending, then -1 for none): `labels[place]` is the
    number that the shards have. Classes have the names that the shards have (`names`, by number), else their numbers.
    """

    def __init__(self, train: str | Path, test: str | Path, val: str | Path | None = None) -> None:
        named = {"train": train, "val": val, "test": test}
        self.named = {name: str(shards) for name, shards in named.items() if shards is not None}
        self.images = together(lambda: {name: ShardDataset(one, checked=True) for name, one in self.named.items()})
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
        if val is not None and not self.classes:
            raise DataError(f"{val}: no image has a label, so there is nothing to choose by it; leave --val out")

    def check_channels(self, card: Mapping[str, Any], encoder: object) -> None:
        """Raise DataError where the encoder takes images of other channels."""
        for images in self.images.values():
            check_channels(images.manifest, card, encoder)

    def describe(self) -> dict[str, Any]:
        """Return the sets and their classes for a result. A set: folder, digest, images with and without a label."""
        sets = {}
        for name, manifest in ((name, images.manifest) for name, images in self.images.items()):
            images = {"images": len(manifest), "labelled": int((manifest.label >= 0).sum())}
            sets[name] = {"folder": str(manifest.folder), "digest": manifest.digest, **images}
        return {**sets, "classes": self.classes, "class_names": list(self.train.classes)}

    @property
    def digests(self) -> dict[str, str]:
        """Return the sets' digests by name."""
        return {name: images.manifest.digest for name, images in self.images.items()}

    def largest_class_percent(self) -> float | None:
        """Return the largest class's percentage of the labelled test images. Returns None without labels."""
        labels = self.test.label[self.test.label >= 0]
        return 100 * float(np.bincount(labels).max()) / len(labels) if len(labels) else None

    def shared(self) -> dict[str, int]:
        """Count the test images that other sets have, byte for byte."""
        others = {name: images.manifest.sha256.view("S32") for name, images in self.images.items() if name != "test"}
        test = self.test.sha256.view("S32")
        return {f"test_images_in_{name}": int(np.isin(test, hashes).sum()) for name, hashes in others.items()}


def open_images(shards: str | Path, card: Mapping[str, Any], encoder: object) -> ShardDataset:
    """Open shards whose images the encoder takes. Raises DataError for others."""
    images = ShardDataset(shards, checked=True)
    check_channels(images.manifest, card, encoder)
    return images


def check_channels(manifest: Manifest, card: Mapping[str, Any], encoder: object) -> None:
    """Raise DataError where the encoder takes images of other channels than these. It takes 8 and 16 bits alike."""
    if manifest.kind.channels != (channels := len(card["mean"])):
        why = f"its images have {manifest.kind}, and {encoder} takes {channels}"
        raise DataError(f"{manifest.folder}: {why}; shard the images again with --channels {channels}")


def _check_comparable(train: Manifest, *others: Manifest) -> None:
    """Raise DataError where the sets cannot be compared."""
    for manifest in (train, *others):
        if len(manifest) == 0:
            raise DataError(f"{manifest.folder}: the set is empty; an evaluation needs images")
    without = [manifest for manifest in (train, *others) if int(manifest.label.max()) < 0]
    if without and len(without) <= len(others):
        raise DataError(f"{without[0].folder}: no image has a label, but the other set's have; label both, or neither")
    for other in others if not without else ():
        if train.classes != other.classes:
            differing = sorted(set(train.classes) ^ set(other.classes))
            how = f"{differing[0]!r} is in one of them only" if differing else "their order differs"
            which = f"its {len(other.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}"
            raise DataError(f"{other.folder}: {which}; shard both from one source (--split)")
