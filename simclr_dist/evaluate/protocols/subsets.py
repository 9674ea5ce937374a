"""Draw class-balanced parts of a labelled set. The seed and the images' keys decide."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.manifest import Manifest
from simclr_dist.system.errors import DataError

Rows = NDArray[np.int64]
KEYS_IN_RESULT = 1000


def balanced_subset(manifest: Manifest, labels: float, *, classes: int, seed: int) -> Rows:
    """Draw the manifest rows of a share of the labelled images. The share is `labels` (in (0, 1]). Rows ascend, int64 [m].

    Below 1, each class gives the same number of images, labels * n / classes of the n with a label, rounded: SimCLR's 1 % and
    10 % of ImageNet (paper, section 4.2) are about 13 and 128 images a class. At 1 every labelled image is taken, balanced or
    not. A class's images are ordered by a hash of (seed, key) and the first ones taken: of two shares with one seed the smaller
    is a part of the larger, and neither the order of the shards nor their size has a say.

    Raises DataError when a class has too few images, or would give none: which class, how many images, which share would do.
    """
    assert 0 < labels <= 1
    by_class = manifest.label.argsort(kind="stable")
    ends = manifest.label[by_class].searchsorted(np.arange(classes + 1))
    members = [by_class[start:end] for start, end in itertools.pairwise(ends)]
    images = np.array([len(rows) for rows in members])
    scarcest = int(images.argmin())
    name = f"{manifest.folder}: class {repr(manifest.classes[scarcest]) if manifest.classes else scarcest}"
    if images[scarcest] == 0:
        raise DataError(f"{name} has no image, so it cannot be learned: leave it out of both sets, or add images of it")
    if labels == 1:
        return np.flatnonzero(manifest.label >= 0).astype(np.int64)
    total = int(images.sum())
    each = math.floor(labels * total / classes + 0.5)
    if each == 0:
        one = _three_digits(classes / total, math.ceil)
        cure = f"{one:g} or more of the labels" if one < 1 else "all of the labels, 1,"
        none = f"has {images[scarcest]} images and would give none to {labels:g} of the labels"
        raise DataError(f"{name} {none}; {cure} would do")
    if each > images[scarcest]:
        most = _three_digits(int(images[scarcest]) * classes / total, math.floor)
        raise DataError(
            f"{name} has {images[scarcest]} images, and {labels:g} of the labels are {each} of each class; "
            f"{most:g} or less would do, or 1 for all images, balanced or not"
        )
    return np.sort(np.concatenate([_drawn(manifest, rows, seed)[:each] for rows in members])).astype(np.int64)


def describe_subsets(
    manifest: Manifest, subsets: Sequence[Rows], path: Path, *, everything: bool
) -> tuple[dict[str, Any], dict[Path, bytes]]:
    """Describe subsets for the result at `path`: sizes, key digests, and keys. The subsets' seeds are 0, 1 and so on.

    More keys than KEYS_IN_RESULT are for a file beside `path`, JSON {seed: [key, ...]}, whose content is returned too. Its name
    is of its content: an older result's stays as it is. Of `everything` (all labelled images) there is no list.
    """
    keys = [[str(key) for key in manifest.key[rows]] for rows in subsets]
    images, classes = len(subsets[0]), len(np.unique(manifest.label[subsets[0]]))
    described: dict[str, Any] = {
        "images": images, "images_per_class": None if everything else images // classes,
        "digests": [keys_digest(of_seed) for of_seed in keys], "keys": None, "keys_file": None,
    }  # fmt: skip
    if everything:
        return described, {}
    if len(keys) * images <= KEYS_IN_RESULT:
        return {**described, "keys": keys}, {}
    content = json.dumps({str(seed): of_seed for seed, of_seed in enumerate(keys)}).encode() + b"\n"
    file = path.with_name(f"{path.stem}.keys-{hashlib.sha256(content).hexdigest()[:8]}.json")
    return {**described, "keys_file": file.name}, {file: content}


def keys_digest(keys: Sequence[str]) -> str:
    """Return the hex sha256 of the sorted keys, a line each. It is the same for the same images in any order."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()


def _drawn(manifest: Manifest, rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Order one class's rows by the seed."""
    hashes = [hashlib.sha256(f"{seed} {manifest.key[row]}".encode()).digest() for row in rows]
    return rows[sorted(range(len(rows)), key=hashes.__getitem__)]


def _three_digits(share: float, towards: Callable[[float], int]) -> float:
    """Round a share in (0, 1] to three digits, for people."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return round(towards(share / unit) * unit, 12)
