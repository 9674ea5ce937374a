"""The built-in images: reproducible, balanced, near-gray, and alike in all but silhouette and pattern."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.preflight.demo.images import CLASSES, render, write_demo_images
from simclr_dist.system.errors import DataError


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_classes_are_ten_and_share_their_cues() -> None:
    shapes, patterns = zip(*(name.split("-") for name in CLASSES), strict=True)
    assert len(set(CLASSES)) == 10
    assert len(set(shapes)) < 10
    assert len(set(patterns)) < 10


@pytest.mark.parametrize("size", [32, 64, 96])
def test_render_gives_a_colour_image_of_the_size_asked_for(size: int) -> None:
    image = render(3, np.random.default_rng(0), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_render_depends_on_the_generator_alone() -> None:
    for c in range(len(CLASSES)):
        first = render(c, np.random.default_rng(5))
        assert np.array_equal(first, render(c, np.random.default_rng(5)))
        assert not np.array_equal(first, render(c, np.random.default_rng(6)))


def test_every_pixel_is_near_gray() -> None:
    strongest = 0.0
    for k in range(200):
        image = render(k % len(CLASSES), np.random.default_rng((1, k))).astype(np.float64)
        high, low = image.max(axis=2), image.min(axis=2)
        # Rounding to whole numbers moves max - min by less than 1.
        assert np.all(high - low <= 0.12 * high + 1)
        strongest = max(strongest, float(np.median(1 - low / high)))
    assert strongest > 0.08  # near-gray is not gray


def test_classes_differ_in_the_object_and_in_nothing_else() -> None:
    for k in range(20):
        generators = [np.random.default_rng((2, k)) for _ in CLASSES]
        images = np.stack([render(c, rng) for c, rng in enumerate(generators)])
        # No class draws more than another, so what follows (the JPEG quality) is distributed alike too.
        assert len({rng.bit_generator.state["state"]["state"] for rng in generators}) == 1
        for a in range(len(CLASSES)):
            for b in range(a):
                equal = (images[a] == images[b]).all(axis=2)
                assert 0.1 < equal.mean() < 0.97, (CLASSES[a], CLASSES[b], k)
        # Somewhere all ten show the background: the same tone, light and noise.
        assert (images == images[0]).all(axis=(0, 3)).mean() > 0.1


@pytest.mark.parametrize(
    "pair",
    [("star-stripes", "star-dots"), ("disc-dots", "disc-rings"), ("plus-checks", "heart-checks")],
)
def test_a_name_says_what_is_shown(pair: tuple[str, str]) -> None:
    agreement = np.zeros((10, 10))
    for k in range(20):
        images = np.stack([render(c, np.random.default_rng((4, k))) for c in range(10)])
        agreement += (images[:, None] == images[None]).all(axis=4).mean(axis=(2, 3))
    np.fill_diagonal(agreement, 0)
    # Of all classes, one that shares the silhouette (or the pattern) of the name has the most pixels in common.
    a, b = (CLASSES.index(name) for name in pair)
    assert agreement[a].argmax() == b
    assert agreement[b].argmax() == a


def test_mean_brightness_and_area_tell_little() -> None:
    brightness, spread = np.zeros((10, 100)), np.zeros((10, 100))
    for c in range(10):
        for k in range(100):
            image = render(c, np.random.default_rng((3, k))) / 255.0
            brightness[c, k], spread[c, k] = image.mean(), image.std()
    assert np.ptp(brightness.mean(axis=1)) < 0.03
    assert np.ptp(spread.mean(axis=1)) < 0.04


def test_folder_layout_counts_and_balance(tmp_path: Path) -> None:
    write_demo_images(tmp_path / "images", train=43, test=20)
    for split, count in (("train", 43), ("test", 20)):
        folder = tmp_path / "images" / split
        assert sorted(path.name for path in folder.iterdir()) == sorted(CLASSES)
        counts = [len(list((folder / name).iterdir())) for name in CLASSES]
        assert sum(counts) == count
        assert max(counts) - min(counts) <= 1
    with Image.open(tmp_path / "images" / "train" / CLASSES[0] / "0000.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")


def test_a_file_shows_the_class_of_its_folder(tmp_path: Path) -> None:
    write_demo_images(tmp_path / "images", train=20, test=0, seed=9)
    for c, name in enumerate(CLASSES):
        for n in range(2):
            with Image.open(tmp_path / "images" / "train" / name / f"{n:04d}.jpg") as image:
                pixels = np.asarray(image).astype(int)
            drawn = render(c, np.random.default_rng((9, 0, n * 10 + c))).astype(int)
            assert np.abs(pixels - drawn).mean() < 8


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo_images(tmp_path / name, train=20, test=10, seed=seed)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert not set(_files(tmp_path / "a").values()) & set(_files(tmp_path / "c").values())


def test_an_image_does_not_depend_on_how_many_are_made(tmp_path: Path) -> None:
    write_demo_images(tmp_path / "few", train=20, test=10)
    write_demo_images(tmp_path / "many", train=50, test=30)
    assert _files(tmp_path / "few").items() < _files(tmp_path / "many").items()


def test_no_image_occurs_twice_and_none_is_in_both_splits(tmp_path: Path) -> None:
    write_demo_images(tmp_path / "images", train=50, test=50)
    assert len(set(_files(tmp_path / "images").values())) == 100


def test_what_is_interrupted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Image.Image.save
    seen: list[bool] = []

    def save(self: Image.Image, path: Path, quality: int) -> None:
        seen.append((tmp_path / "images").exists())
        if len(seen) == 15:
            raise KeyboardInterrupt
        saved(self, path, quality=quality)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_demo_images(tmp_path / "images", train=20, test=10)
    assert seen == [False] * 15
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists; remove it") as error:
        write_demo_images(tmp_path / "images", train=10, test=10)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["mine.txt"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_negative_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="-1"):
        write_demo_images(tmp_path / "images", train=-1)
    assert list(tmp_path.iterdir()) == []
