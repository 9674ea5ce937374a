"""Dealing to the sides of a split, and the shuffle: their definition in plain Python, and copies that stay together."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pictures import encoded
from simclr_dist.convert.dealing import deal
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.manifest import load_manifest
from simclr_dist.system.errors import DataError


def reference(
    index: list[int], label: list[int], sha256: list[bytes], total: int, seed: int, split: tuple[float, float]
) -> dict[str, list[int]]:
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    places, sides = generator.random_raw(total), generator.random_raw(total)
    shuffled = sorted(range(len(index)), key=lambda i: (places[index[i]], index[i]))
    once = {sha256[i]: i for i in reversed(range(len(index)))}
    by_label = sorted(once.values(), key=lambda i: (label[i], sides[index[i]], index[i]))
    share = round(split[1] * 1_000_000)
    chosen = {sha256[r] for i, r in enumerate(by_label) if (i + 1) * share // 1_000_000 > i * share // 1_000_000}
    return {
        "train": [i for i in shuffled if sha256[i] not in chosen],
        "test": [i for i in shuffled if sha256[i] in chosen],
    }


def test_dealing_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    for seed in range(30):
        total = int(rng.integers(20, 200))
        index = np.sort(rng.permutation(total)[: total - 5])
        label = rng.integers(-1, 4, len(index))
        sha256 = np.array([bytes([value, 0] * 16) for value in rng.integers(0, 150, len(index))], "S32")
        split = (0.75, 0.25)
        found = deal(index, label, sha256, total=total, seed=seed, split=split)
        expected = reference(
            index.tolist(), label.tolist(), [value.ljust(32, b"\0") for value in sha256.tolist()], total, seed, split
        )
        assert {name: rows.tolist() for name, rows in found.items()} == expected
        assert json.dumps(deal(index, label, sha256, total=total, seed=seed, split=None)[""].tolist()) == json.dumps(
            sorted(
                range(len(index)),
                key=lambda i: np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(total)[index[i]],
            )
        )


def hashes(pictures: list[int]) -> np.ndarray:
    """Return hashes that differ in one byte, at either end. Those ending in zeros are shorter to numpy."""
    return np.array([bytes([number % 7, *bytes(30), number // 7]) for number in pictures], "S32")


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_on_one_side(seed: int) -> None:
    """Up to six copies of each picture, in any classes and places."""
    rng = np.random.default_rng(seed)
    pictures = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 7, 40)))
    total = len(pictures) + 10
    index = np.sort(rng.permutation(total)[: len(pictures)])
    label = rng.integers(-1, 3, len(pictures))
    for share in (0.1, 0.35, 0.5, 0.9):
        sides = deal(index, label, hashes(pictures.tolist()), total=total, seed=seed, split=(1 - share, share))
        assert list(sides) == ["train", "test"]
        train, test = (set(pictures[rows].tolist()) for rows in sides.values())
        assert not train & test
        assert sorted(np.concatenate(list(sides.values())).tolist()) == list(range(len(pictures)))
        assert abs(len(test) - share * 40) < 1, "the share is one of different pictures"


def test_each_class_gets_its_share_of_different_pictures() -> None:
    label = np.repeat(np.arange(4), 30)
    pictures = [*range(120)]
    index = np.arange(180)
    copied = [*pictures, *pictures[:60]]  # of the first two classes
    sides = deal(index, np.concatenate([label, label[:60]]), hashes(copied), total=180, seed=5, split=(0.8, 0.2))
    test = {copied[row] for row in sides["test"]}
    assert [len(test & set(range(first, first + 30))) for first in (0, 30, 60, 90)] == [6] * 4
    assert len(sides["test"]) == 36


def test_a_share_counts_to_a_millionth() -> None:
    """So a typed 0.333333 and a third deal the same."""
    index = np.arange(300)
    for share in (1 / 3, 0.333333):
        sides = deal(index, index * 0, hashes(index.tolist()), total=300, seed=0, split=(1 - share, share))
        assert len(sides["test"]) == 99


def test_a_side_without_images_is_refused() -> None:
    few = np.arange(3)
    for pictures, split, message in (
        ([0, 1, 2], (0.8, 0.2), "split 0.8/0.2 of 3 different images leaves one side empty; use another"),
        ([0, 0, 0], (0.5, 0.5), "split 0.5/0.5 of 1 different images leaves one side empty; use another"),
        ([0, 0, 0], (1e-7, 1 - 1e-7), "split 1e-07/1 of 1 different images leaves one side empty; use another"),
    ):
        with pytest.raises(DataError) as caught:
            deal(few, few, hashes(pictures), total=3, seed=0, split=split)
        assert str(caught.value) == message
    sides = deal(few, few, hashes([0, 1, 1]), total=3, seed=0, split=(0.5, 0.5))
    assert sorted(map(len, sides.values())) == [1, 2]
    with pytest.raises(DataError, match=r"^split 0[.]5/0[.]1/0[.]4 of 3 different images leaves one side"):
        deal(few, few, hashes([0, 1, 2]), total=3, seed=0, split=(0.5, 0.1, 0.4))


def test_three_shares_are_stratified_and_have_the_test_images_of_two() -> None:
    rng = np.random.default_rng(0)
    index, label = np.arange(1000), rng.permutation(np.repeat(np.arange(-1, 4), 200))
    pictures = np.arange(1000) % 950  # some come twice
    sides = deal(index, label, hashes(pictures.tolist()), total=1000, seed=3, split=(0.7, 0.1, 0.2))
    assert list(sides) == ["train", "val", "test"]
    assert np.array_equal(np.sort(np.concatenate(list(sides.values()))), index)
    named = {name: set(pictures[rows].tolist()) for name, rows in sides.items()}
    assert not named["train"] & named["val"] | named["val"] & named["test"] | named["train"] & named["test"]
    for name, share in (("val", 0.1), ("test", 0.2)):
        assert len(named[name]) == pytest.approx(950 * share, abs=1)
        of_class = np.bincount(label[np.flatnonzero(np.isin(index, list(named[name])))] + 1)
        first = np.bincount(label[:950] + 1)
        assert of_class.tolist() == pytest.approx((first * share).tolist(), abs=1.5)
    two = deal(index, label, hashes(pictures.tolist()), total=1000, seed=3, split=(0.8, 0.2))
    assert two["test"].tolist() == sides["test"].tolist()


def test_a_conversion_writes_three_sides_and_knows_them_again(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / "src" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    summary = write_shards(tmp_path / "src", tmp_path / "out", processes=1, split=(0.5, 0.2, 0.3))
    assert [folder.name for folder in summary.destinations] == ["train", "val", "test"]
    assert [len(load_manifest(folder)) for folder in summary.destinations] == [20, 8, 12]
    assert list(json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]) == ["train", "val", "test"]
    again = write_shards(tmp_path / "src", tmp_path / "out", processes=1, split=(0.5, 0.2, 0.3))
    assert (again.already, again.destinations) == (True, summary.destinations)


@pytest.mark.parametrize(
    ("seed", "shuffled", "train", "test"),
    [
        (0, [0, 2, 7, 1, 6, 4, 3, 5], [2, 1, 6, 5], [0, 7, 4, 3]),
        (2**64 - 1, [6, 7, 0, 5, 3, 2, 1, 4], [6, 5, 3, 2], [7, 0, 1, 4]),
    ],
)
def test_the_dealing_is_the_one_that_sets_were_made_with(
    seed: int, shuffled: list[int], train: list[int], test: list[int]
) -> None:
    index, label = np.array([0, 1, 2, 4, 5, 7, 8, 9]), np.array([0, 1, 0, 1, -1, 0, 1, 0])
    for split, expected in ((None, {"": shuffled}), ((0.5, 0.5), {"train": train, "test": test})):
        sides = deal(index, label, hashes([0, 1, 2, 3, 0, 5, 6, 7]), total=10, seed=seed, split=split)
        assert {name: rows.tolist() for name, rows in sides.items()} == expected


# ---- through a whole conversion


def copies(label: str) -> dict[str, bytes]:
    """Ten pictures of a class's own, ten that each class has, one of them twice in it; palettes are stored re-encoded."""
    own = {f"{label}/own{i}.png": encoded(ord(label[0]) * 20 + i) for i in range(10)}
    shared = {f"{label}/{i}.png": encoded(i + 3, mode="P" if i % 3 == 0 else "RGB") for i in range(10)}
    return own | shared | {f"{label}/again.png": encoded(4)}


@pytest.mark.parametrize("kind", ["folder", "links", "zips", "tables", "list"])
def test_copies_of_any_source_are_on_one_side(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for number, label in enumerate(("cat", "dog", "eel")):
        images = copies(label)
        if kind == "tables":
            rows = {"image": list(images.values()), "label": [number] * len(images)}
            pq.write_table(pa.table(rows), source / f"{label}.parquet")
        elif kind == "zips":
            with zipfile.ZipFile(source / f"{label}.zip", "w") as packed:
                for name, content in images.items():
                    packed.writestr(name, content)
        else:
            folder = tmp_path / "full" if kind == "links" else source
            for name, content in images.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            if kind == "links":
                for name in (label, f"{label}2"):
                    (source / name).symlink_to(folder / label)
    if kind == "list":
        names = [f"{path.relative_to(source)},{path.parent.name}" for path in sorted(source.rglob("*.png"))]
        (source / "list.csv").write_text("\n".join(names))
        source /= "list.csv"
    summary = write_shards(source, tmp_path / "out", processes=1, split=(0.6, 0.4), seed=1)
    assert summary.written == 63 * (2 if kind == "links" else 1)
    assert summary.duplicates == summary.written - 40
    train, test = ({row.tobytes() for row in load_manifest(folder).sha256} for folder in summary.destinations)
    assert not train & test
    assert (len(train), len(test)) == (24, 16)
