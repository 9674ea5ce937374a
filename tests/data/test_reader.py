"""Images by row, each checked; views that are the same whoever makes them; what becomes of unreadable images."""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_dist.data.draws import ViewSettings
from simclr_dist.data.manifest import ManifestRow, write_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.shards import write_shards
from simclr_dist.data.steps import StepDataset, Views, load_steps, two_views
from simclr_dist.errors import DataError, RankError

# DataLoader forks its workers, as it does for users, and finds three too many for a small machine.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
]

SETTINGS = ViewSettings(image_size=16)
CLASSES = ("ant", "bee", "cow")


def picture(k: int) -> Image.Image:
    """Noise of its own size, smooth enough for JPEG; its top left corner tells the class k % 3."""
    random = np.random.default_rng(k)
    height, width = random.integers(18, 40, 2)
    image = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    image.paste((100 * (k % 3),) * 3, (0, 0, 9, 9))
    return image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """52 images (JPEG, PNG, WebP, one in four gray) in shards of 12: 5 shards, the last with 4."""
    folder = tmp_path_factory.mktemp("images")
    for k in range(52):
        image = picture(k).convert("L") if k % 4 == 3 else picture(k)
        path = folder / "source" / CLASSES[k % 3] / f"{k}.{('jpg', 'png', 'webp')[k // 3 % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    write_shards(folder / "source", folder / "shards", shard_size=12, processes=1)
    return folder / "shards"


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Callable[..., ShardDataset]:
    """A copy in which one byte of each given row's image is another."""

    def make(*rows: int) -> ShardDataset:
        folder = tmp_path / "shards"
        folder.mkdir()
        for path in images.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        dataset = ShardDataset(folder)
        m = dataset.manifest
        for row in rows:
            with (folder / m.shards[m.shard[row]]).open("r+b") as tar:
                place = int(m.offset[row] + m.size[row] // 2)
                tar.seek(place)
                byte = tar.read(1)[0]
                tar.seek(place)
                tar.write(bytes([byte ^ 0xFF]))
        return dataset

    return make


def plan_for(dataset: ShardDataset, rank: int = 0, world_size: int = 1, batch: int = 12) -> Plan:
    return Plan(dataset.manifest.shard_sizes, 3, batch, window=2, rank=rank, world_size=world_size)


def open_files(folder: Path) -> set[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 (names, as some are gone)
    targets = [Path(os.readlink(link)) for link in links if link.is_symlink()]  # noqa: PTH115
    return {target.name for target in targets if target.parent == folder}


def assert_same(a: Views, b: Views) -> None:
    assert a.step == b.step
    assert torch.equal(a.rows, b.rows)
    for view in range(2):
        assert torch.equal(a.crops[view], b.crops[view])
        assert all(np.array_equal(x, y) for x, y in zip(a.draws[view], b.draws[view], strict=True))


# ShardDataset


def test_pixels_and_labels(images: Path) -> None:
    dataset = ShardDataset(images)
    assert len(dataset) == 52
    formats = set()
    for row in range(52):
        image, label, same_row = dataset[row]
        with Image.open(io.BytesIO(dataset.read(row))) as original:
            formats.add((original.format, original.mode))
            expected = np.asarray(original.convert("RGB"))
        assert image.dtype == torch.uint8
        assert tuple(image.shape) == (3, dataset.manifest.height[row], dataset.manifest.width[row])
        assert np.abs(image.numpy().transpose(1, 2, 0).astype(int) - expected).max() <= 2
        assert same_row == row
        assert abs(int(image[0, 2, 2]) - 100 * label) < 20
    # WebP has no gray.
    assert formats == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")}
    assert dataset.manifest.classes == CLASSES


def test_other_bytes_than_were_sharded_are_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged(30)
    with pytest.raises(DataError) as caught:
        dataset[30]
    m = dataset.manifest
    line = str(caught.value)
    assert line.startswith(f"{m.folder}/{m.shards[2]}: image {m.key[30]}: ")
    assert "sha256" in line
    assert "\n" not in line
    assert dataset[29].row == 29
    assert dataset[31].row == 31


def test_a_tar_cut_short_is_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged()
    m = dataset.manifest
    os.truncate(m.folder / m.shards[1], int(m.offset[20]) + 10)  # while the run reads
    assert dataset[19].row == 19
    for row in (20, 21):
        with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[1]}: image {m.key[row]}: [^\n]*$"):
            dataset[row]
    with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[1]}: has \d+ bytes, [^\n]*$"):
        ShardDataset(m.folder)


def test_a_tar_that_is_gone_is_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged()
    m = dataset.manifest
    (m.folder / m.shards[4]).unlink()
    with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[4]}: image {m.key[50]}: cannot be read: No such file[^\n]*$"):
        dataset[50]


def test_bytes_that_are_no_image_are_one_line(tmp_path: Path) -> None:
    content = b"\x89PNG\r\n\x1a\n" + bytes(100)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    row = ManifestRow("0", "a.tar", 512, len(content), -1, 4, 4, hashlib.sha256(content).digest())
    write_manifest(tmp_path, ["a.tar"], [row], ())
    with pytest.raises(DataError, match=rf"^{tmp_path}/a.tar: image 0: cannot be decoded: [^\n]+$"):
        ShardDataset(tmp_path)[0]


def test_no_more_shards_are_open_than_asked_for(images: Path) -> None:
    before = open_files(images)
    dataset = ShardDataset(images, open_shards=2)
    first = [0, 12, 24, 36, 48]
    for shard in np.random.default_rng(0).integers(0, 5, 40):
        assert dataset[first[shard]].row == first[shard]
        assert len(open_files(images) - before) <= 2
    dataset = ShardDataset(images, open_shards=2)
    for shard in (0, 1, 0, 2):
        dataset.read(first[shard])
    assert open_files(images) - before == {dataset.manifest.shards[0], dataset.manifest.shards[2]}, "the least used goes first"
    del dataset
    assert open_files(images) == before


def test_pickled_it_opens_its_own_files(images: Path) -> None:
    dataset = ShardDataset(images)
    expected = dataset[5].image
    copy = pickle.loads(pickle.dumps(dataset))
    del dataset
    assert torch.equal(copy[5].image, expected)
    assert copy.manifest.digest == ShardDataset(images).manifest.digest


# StepDataset, load_steps


@pytest.mark.slow
def test_a_step_is_the_same_whoever_makes_it(images: Path) -> None:
    dataset = ShardDataset(images)
    steps = StepDataset(dataset, plan_for(dataset), SETTINGS)
    alone = list(load_steps(steps, range(2, 7), workers=0))  # into the second epoch
    assert [views.step for views in alone] == [2, 3, 4, 5, 6]
    assert alone[0].crops[0].shape == (12, 3, 16, 16)
    assert alone[0].crops[0].dtype == torch.uint8
    assert not torch.equal(*alone[0].crops)
    for workers in (1, 3):
        for views, expected in zip(load_steps(steps, range(2, 7), workers=workers), alone, strict=True):
            assert_same(views, expected)
    later = next(load_steps(steps, range(5, 7), workers=0))
    assert_same(later, alone[3])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_an_images_views_are_the_same_at_any_world_size(images: Path, world_size: int) -> None:
    dataset = ShardDataset(images)

    def by_row(size: int) -> dict[int, tuple[torch.Tensor, ...]]:
        found = {}
        for rank in range(size):
            views = StepDataset(dataset, plan_for(dataset, rank, size), SETTINGS)[5]
            coloured = two_views(views, SETTINGS, torch.device("cpu"))
            found |= {int(row): tuple(view[i] for view in coloured) for i, row in enumerate(views.rows)}
        return found

    alone, shared = by_row(1), by_row(world_size)
    assert len(alone) == 12
    assert alone.keys() == shared.keys()
    for row, views in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(views, shared[row], strict=True))


def test_an_images_views_differ_between_epochs(images: Path) -> None:
    dataset = ShardDataset(images)
    plan = Plan(dataset.manifest.shard_sizes, 3, 52)
    first, second = (StepDataset(dataset, plan, SETTINGS)[step] for step in (0, 1))
    a, b = (views.crops[0][views.rows.argsort()] for views in (first, second))
    assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_it_with_one_line(damaged: Callable[..., ShardDataset], images: Path, workers: int) -> None:
    row = int(plan_for(ShardDataset(images))[1][1][4])
    dataset = damaged(row)
    m = dataset.manifest
    loaded = load_steps(StepDataset(dataset, plan_for(dataset), SETTINGS), range(4), workers=workers)
    assert next(loaded).step == 0
    with pytest.raises(RankError, match=rf"^{m.folder}/{m.shards[m.shard[row]]}: image {m.key[row]}: [^\n]*sha256[^\n]*$"):
        next(loaded)


def test_a_spare_takes_an_unreadable_images_place_at_any_world_size(damaged: Callable[..., ShardDataset], images: Path) -> None:
    plan = plan_for(ShardDataset(images))
    rows = plan[1][1]
    # Slot 2's image and its first spare, and slot 9's: both may fail at once, on one rank or on two.
    dataset = damaged(int(rows[2]), int(plan.spares(1, 2)[0]), int(rows[9]))

    def step(rank: int, world_size: int) -> Views:
        return StepDataset(dataset, plan_for(dataset, rank, world_size), SETTINGS, replace_bad=True)[1]

    expected = rows.copy()
    expected[2], expected[9] = plan.spares(1, 2)[1], plan.spares(1, 9)[0]
    alone = step(0, 1)
    assert alone.failed is None
    assert alone.rows.tolist() == expected.tolist()
    assert len(set(alone.rows.tolist())) == 12
    assert [row for row, _ in alone.bad] == [rows[2], plan.spares(1, 2)[0], rows[9]]
    assert all(f"image {dataset.manifest.key[row]}: " in reason and "\n" not in reason for row, reason in alone.bad)
    for world_size in (2, 3):
        parts = [step(rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.rows for part in parts]), alone.rows)
        assert [entry for part in parts for entry in part.bad] == alone.bad
        for view in range(2):
            assert torch.equal(torch.cat([part.crops[view] for part in parts]), alone.crops[view])


def test_without_a_readable_spare_the_run_ends(damaged: Callable[..., ShardDataset], images: Path) -> None:
    plan = plan_for(ShardDataset(images))
    dataset = damaged(int(plan[0][1][7]), *plan.spares(0, 7).tolist())
    steps = StepDataset(dataset, plan_for(dataset), SETTINGS, replace_bad=True)
    with pytest.raises(RankError, match="sha256"):
        next(load_steps(steps, range(1), workers=0))
