"""Class-balanced parts of a set: sizes, nesting, what they depend on, and each refusal as one line."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from simclr_dist.data.columns import Keys
from simclr_dist.data.manifest import Manifest
from simclr_dist.evaluate.protocols.subsets import balanced_subset, describe_subsets, keys_digest
from simclr_dist.system.errors import DataError

CLASSES = ("ant", "bee", "cat")


def manifest(
    labels: Sequence[int] | np.ndarray, keys: Sequence[int] | None = None, classes: Sequence[str] = CLASSES
) -> Manifest:
    """Of images that are nowhere: a subset is drawn from keys and labels alone."""
    n = len(labels)
    rows, of_each = np.arange(n), np.ones(n, dtype=np.int32)
    return Manifest(
        folder=Path("shards"),
        shards=("part-0.tar",),
        shard_sizes=np.array([n]),
        key=Keys(6 * rows, 6 * rows + 6, np.frombuffer("".join(f"{key:06d}" for key in keys or rows).encode(), np.uint8)),
        shard_bytes=np.array([n]),
        offset=np.arange(n),
        size=np.ones(n, dtype=np.int64),
        label=np.array(labels, dtype=np.int64),
        width=of_each,
        height=of_each,
        sha256=np.zeros((n, 32), dtype=np.uint8),
        classes=tuple(classes),
        digest="0" * 64,
        short_side=1.0,
        pixels=n,
    )


def uneven(n: int = 400) -> np.ndarray:
    """Labels of three classes, a half, a third and a sixth of n, mixed."""
    return np.random.default_rng(0).choice(3, n, p=[1 / 2, 1 / 3, 1 / 6])


def drawn(images: Manifest, labels: float, seed: int = 0) -> list[int]:
    rows = balanced_subset(images, labels, classes=3, seed=seed)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all(), "each row once, ascending"
    return [int(row) for row in rows]


@pytest.mark.parametrize(("labels", "each"), [(0.01, 1), (0.03, 4), (0.1, 13), (0.25, 33)])
def test_as_many_of_each_class(labels: float, each: int) -> None:
    """A share of all images, dealt to the classes: 400 * 0.1 / 3 = 13.3."""
    images = manifest(uneven())
    rows = drawn(images, labels)
    assert Counter(images.label[rows].tolist()) == {0: each, 1: each, 2: each}


def test_all_labels_are_all_labelled_images() -> None:
    labels = uneven()
    labels[::7] = -1
    assert drawn(manifest(labels), 1) == np.flatnonzero(labels >= 0).tolist()
    assert set(labels[drawn(manifest(labels), 0.1)]) == {0, 1, 2}, "images without a label are in no subset"


def test_the_smaller_share_is_a_part_of_the_larger() -> None:
    images = manifest(uneven())
    for seed in range(3):
        parts = [set(drawn(images, labels, seed)) for labels in (0.01, 0.1, 0.2, 1)]
        assert all(small < large for small, large in itertools.pairwise(parts))


def test_seeds_differ_and_repeat() -> None:
    images = manifest(uneven())
    parts = [drawn(images, 0.1, seed) for seed in (0, 1, 2, 0)]
    assert parts[0] == parts[3]
    assert len({tuple(part) for part in parts}) == 3
    shared = len(set(parts[0]) & set(parts[1])) / len(parts[0])
    assert shared < 0.5, "another seed is another draw"


def test_every_image_is_as_likely() -> None:
    """40 of each class in 200 draws of a tenth: an image is in 20 of them, give or take; six deviations are 25."""
    images = manifest([label for label in range(3) for _ in range(40)])
    count = Counter(row for seed in range(200) for row in drawn(images, 0.1, seed))
    assert len(count) == 120
    assert max(count.values()) < 46


def test_neither_shards_nor_neighbours_have_a_say() -> None:
    """The same images in another order, as other shards have them."""
    labels = uneven()
    order = np.random.default_rng(1).permutation(len(labels))
    images, moved = manifest(labels), manifest(labels[order], order.tolist())
    assert set(images.key[drawn(images, 0.1)]) == set(moved.key[drawn(moved, 0.1)])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            [40, 40, 40],
            0.01,
            "class 'ant' has 40 images and would give none to 0.01 of the labels; 0.025 or more of the labels",
        ),
        ([1, 1, 1], 0.1, "class 'ant' has 1 images and would give none to 0.1 of the labels; all of the labels, 1, would do"),
        ([50, 7, 43], 0.3, "class 'bee' has 7 images, and 0.3 of the labels are 10 of each class; 0.21 or less would do"),
        ([9, 9, 0], 0.5, "class 'cat' has no image"),
        ([9, 9, 0], 1, "class 'cat' has no image"),
    ],
)
def test_a_class_with_too_few_images(images: list[int], labels: float, message: str) -> None:
    found = manifest([label for label, count in enumerate(images) for _ in range(count)])
    with pytest.raises(DataError, match=f"^shards: {message}") as caught:
        drawn(found, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[50, 7, 43], [333, 211, 5], [1000, 1000, 1], [40000, 40000, 1]])
@pytest.mark.parametrize("labels", [1e-6, 0.9])
def test_what_a_refusal_advises_would_do(images: list[int], labels: float) -> None:
    found = manifest([label for label, count in enumerate(images) for _ in range(count)], classes=())
    with pytest.raises(DataError, match=r"class \d") as caught:
        drawn(found, labels)
    words = str(caught.value).split()
    advised = float(words[words.index("or") - 1])
    assert drawn(found, advised)


def test_the_result_lists_the_keys_or_names_their_file(tmp_path: Path) -> None:
    images = manifest(uneven(4000))
    few = [balanced_subset(images, 0.01, classes=3, seed=seed) for seed in range(2)]
    described, beside = describe_subsets(images, few, tmp_path / "result.json", everything=False)
    assert (described["images"], described["images_per_class"], described["keys_file"]) == (39, 13, None)
    assert described["keys"] == [images.key[rows].tolist() for rows in few]
    assert described["digests"] == [keys_digest(keys) for keys in described["keys"]]
    assert beside == {}

    many = [balanced_subset(images, 0.2, classes=3, seed=seed) for seed in range(2)]
    described, beside = describe_subsets(images, many, tmp_path / "result.json", everything=False)
    ((path, content),) = beside.items()
    assert (described["keys"], described["keys_file"]) == (None, path.name)
    assert path == tmp_path / f"result.keys-{hashlib.sha256(content).hexdigest()[:8]}.json"
    listed = json.loads(content)
    assert listed == {str(seed): images.key[rows].tolist() for seed, rows in enumerate(many)}
    assert described["digests"] == [keys_digest(listed[seed]) for seed in ("0", "1")]

    everything, beside = describe_subsets(images, [np.arange(4000)], tmp_path / "all.json", everything=True)
    assert (everything["images"], everything["keys"], everything["keys_file"], beside) == (4000, None, None, {})
    assert list(tmp_path.iterdir()) == [], "the result comes first"


def test_the_digest_is_of_the_keys_in_any_order() -> None:
    assert keys_digest(["a", "b"]) == keys_digest(["b", "a"])
    assert len({keys_digest(keys) for keys in (["a", "b"], ["ab"], ["a"], [])}) == 4
