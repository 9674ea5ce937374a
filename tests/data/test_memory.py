"""Images held in memory give the views that images from shards give, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_dist.convert.shards import write_shards
from simclr_dist.data import memory
from simclr_dist.data.memory import AUTO_BYTES, DecodedImages, held_in_memory
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels import resize
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset
from simclr_dist.data.views.crops import crop_view
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.system.errors import DataError, RankError, StoppedError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 32 x 32 pixels in shards of 12."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "source").mkdir()
    random = np.random.default_rng(0)
    for k in range(40):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "source" / f"{k}.png")
    write_shards(folder / "source", folder / "shards", shard_size=12, processes=1)
    return folder / "shards"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 37, 32), (20, 33, 32), (40, 36, 6), (28, 28, 28)])
def test_crops_of_a_batch_have_the_bits_of_single_ones(height: int, width: int, size: int, interpolation: str) -> None:
    """Noise and pure black and white, where overshoots are clipped; boxes of one pixel too; 6: sums need float64."""
    random, count = np.random.default_rng(height), 300
    images = torch.from_numpy(random.integers(0, 256, (count, 3, height, width), dtype=np.uint8))
    images[::3] = torch.where(images[::3] > 127, 255, 0).to(torch.uint8)
    lengths = np.stack([random.integers(1, height + 1, count), random.integers(1, width + 1, count)])
    lengths[:, 0] = height, width
    places = (random.random((2, count)) * (np.array([[height], [width]]) - lengths + 1)).astype(np.int64)
    box, flip, which = np.concatenate([places, lengths]).T, random.random(count) < 0.5, random.permutation(count)
    ours = resize.crop_views(images, which, box, flip, size, interpolation)
    for place, row in enumerate(which):
        interleaved = images[row].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert torch.equal(ours[place], crop_view(interleaved, box[place], bool(flip[place]), size, interpolation))
    some = [5, 299, 17]
    assert torch.equal(resize.crop_views(images, which[some], box[some], flip[some], size, interpolation), ours[some])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize.crop_views(images, which, box, flip, size, interpolation), ours)


@pytest.mark.parametrize("set_of", ["one size", "many sizes"])
def test_views_are_those_of_the_shards(small: Path, images: Path, set_of: str) -> None:
    folder = small if set_of == "one size" else images
    shards, settings = ShardDataset(folder), ViewSettings(image_size=32)
    decoded = DecodedImages(shards)
    assert decoded.of_one_size == (set_of == "one size")
    assert len(decoded) == len(shards)
    assert all(torch.equal(decoded[row].image, shards[row].image) for row in range(len(shards)))
    assert [decoded[row].label for row in range(40)] == shards.manifest.label[:40].tolist()
    plan = Plan(shards.manifest.shard_sizes, 3, 20, micro_batches=2, window=2)
    for step in range(3):
        ours, expected = (StepDataset(source, plan, settings)[step] for source in (decoded, shards))
        assert torch.equal(ours.rows, expected.rows)
        for a, b in zip(ours.portions, expected.portions, strict=True):
            for view in range(2):
                assert torch.equal(a.crops[view], b.crops[view])
                assert all(np.array_equal(x, y) for x, y in zip(a.draws[view], b.draws[view], strict=True))


def test_an_unreadable_image_is_met_as_in_shards(damaged: Callable[..., ShardDataset], images: Path) -> None:
    plan = Plan(ShardDataset(images).manifest.shard_sizes, 3, 12, window=2)
    row = int(plan[1][1][4])
    shards = damaged(row)
    decoded, settings = DecodedImages(shards), ViewSettings(image_size=16)
    with pytest.raises(DataError, match="sha256") as caught:
        decoded[row]
    with pytest.raises(RankError, match="sha256") as ended:
        StepDataset(decoded, plan, settings)[1]
    assert str(caught.value) == str(ended.value)
    ours, expected = (StepDataset(source, plan, settings, replace_bad=True)[1] for source in (decoded, shards))
    assert torch.equal(ours.rows, expected.rows)
    assert ours.bad == expected.bad == [(row, str(caught.value))]


def test_other_pixels_than_the_manifest_says_are_refused(small: Path) -> None:
    shards = ShardDataset(small)
    heights = shards.manifest.height.copy()
    heights[7] = 31
    shards.manifest = replace(shards.manifest, height=heights)
    decoded = DecodedImages(shards)
    with pytest.raises(DataError, match=r"has 32 x 32 pixels, the manifest says 32 x 31; shard the images again$"):
        decoded[7]
    assert decoded[8].row == 8


def test_a_set_that_no_memory_holds_is_one_line(small: Path) -> None:
    shards = ShardDataset(small)
    side = np.full(len(shards), 2**26, dtype=np.int64)
    shards.manifest = replace(shards.manifest, height=side, width=side)
    with pytest.raises(RankError, match=r"^data.in_memory: the pixels of 40 images take 5.03e\+08 GiB[^\n]*; set it to never$"):
        DecodedImages(shards)


def test_pauses_come_as_often_on_every_rank(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They depend on the manifest alone: ranks talk to each other in them."""
    monkeypatch.setattr(memory, "_PAUSE_BYTES", 10 * 32 * 32 * 3)
    pauses: list[int] = []
    decoded = held_in_memory(ShardDataset(small), "always", lambda: pauses.append(1))
    assert isinstance(decoded, DecodedImages)
    assert len(pauses) == 4

    def stop() -> None:
        raise StoppedError("x")

    with pytest.raises(StoppedError):
        held_in_memory(ShardDataset(small), "always", stop)


def test_what_auto_takes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardDataset(small)
    assert isinstance(held_in_memory(shards, "auto"), DecodedImages)
    assert held_in_memory(shards, "never") is shards
    shards.manifest = replace(shards.manifest, pixels=AUTO_BYTES // 3 + 1)
    assert held_in_memory(shards, "auto") is shards
    shards = ShardDataset(small)
    monkeypatch.setattr(memory, "AUTO_BYTES", 40 * 32 * 32 * 3)
    assert isinstance(held_in_memory(shards, "auto"), DecodedImages)
    monkeypatch.setattr(memory, "AUTO_BYTES", 40 * 32 * 32 * 3 - 1)
    assert held_in_memory(shards, "auto") is shards
