"""The views of steps are the same whoever makes them; what becomes of unreadable images."""

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from simclr_dist.data import portions
from simclr_dist.data import steps as steps_module
from simclr_dist.data.manifest import ManifestRow, write_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.steps import StepDataset, Views, coloured, load_steps, two_views
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.system.errors import DataError, RankError, UnreachableError

# DataLoader forks its workers, as it does for users, and finds three too many for a small machine.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
]

SETTINGS = ViewSettings(image_size=16)


def plan_for(dataset: ShardDataset, rank: int = 0, world_size: int = 1, batch: int = 12) -> Plan:
    return Plan(dataset.manifest.shard_sizes, 3, batch, window=2, rank=rank, world_size=world_size)


def crops(views: Views, view: int) -> torch.Tensor:
    return torch.cat([portion.crops[view] for portion in views.portions])


def assert_same(a: Views, b: Views) -> None:
    assert a.step == b.step
    assert torch.equal(a.rows, b.rows)
    for view in range(2):
        assert torch.equal(crops(a, view), crops(b, view))
        for ours, theirs in zip(a.portions, b.portions, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(ours.draws[view], theirs.draws[view], strict=True))


@pytest.mark.slow
def test_a_step_is_the_same_whoever_makes_it(images: Path) -> None:
    dataset = ShardDataset(images)
    steps = StepDataset(dataset, plan_for(dataset), SETTINGS)
    alone = list(load_steps(steps, range(2, 7), workers=0))  # into the second epoch
    assert [views.step for views in alone] == [2, 3, 4, 5, 6]
    assert crops(alone[0], 0).shape == (12, 3, 16, 16)
    assert crops(alone[0], 0).dtype == torch.uint8
    assert not torch.equal(crops(alone[0], 0), crops(alone[0], 1))
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
    a, b = (crops(views, 0)[views.rows.argsort()] for views in (first, second))
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
    rows, (first, second, *_), (other, *_) = plan[1][1], plan.spares(1, 2), plan.spares(1, 9)
    # Slot 2's image and its first spare, and slot 9's: both may fail at once, on one rank or on two.
    dataset = damaged(int(rows[2]), first, int(rows[9]))

    def step(rank: int, world_size: int) -> Views:
        return StepDataset(dataset, plan_for(dataset, rank, world_size), SETTINGS, replace_bad=True)[1]

    expected = rows.copy()
    expected[2], expected[9] = second, other
    alone = step(0, 1)
    assert alone.rows.tolist() == expected.tolist()
    assert len(set(alone.rows.tolist())) == 12
    assert [row for row, _ in alone.bad] == [rows[2], first, rows[9]]
    assert all(f"image {dataset.manifest.key[row]}: " in reason and "\n" not in reason for row, reason in alone.bad)
    for world_size in (2, 3):
        parts = [step(rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.rows for part in parts]), alone.rows)
        assert [entry for part in parts for entry in part.bad] == alone.bad
        for view in range(2):
            assert torch.equal(torch.cat([crops(part, view) for part in parts]), crops(alone, view))


def test_a_server_that_fails_for_a_spare_ends_the_run(images: Path) -> None:
    class Remote(ShardDataset):
        def __getitem__(self, row: int) -> Sample:
            if row == damaged:
                raise DataError("damaged")
            if row == spare:
                raise UnreachableError("http://host/1.tar: cannot be fetched")
            return super().__getitem__(row)

    dataset = Remote(images)
    damaged, spare = int(plan_for(dataset)[0][1][0]), next(plan_for(dataset).spares(0, 0))
    steps = StepDataset(dataset, plan_for(dataset), SETTINGS, replace_bad=True)
    with pytest.raises(RankError, match="cannot be fetched"):  # no image is at fault
        steps[0]


def test_without_a_readable_spare_the_run_ends(damaged: Callable[..., ShardDataset], images: Path) -> None:
    plan = plan_for(ShardDataset(images))
    dataset = damaged(int(plan[0][1][7]), *plan.spares(0, 7))
    steps = StepDataset(dataset, plan_for(dataset), SETTINGS, replace_bad=True)
    with pytest.raises(RankError, match="sha256"):
        next(load_steps(steps, range(1), workers=0))


def test_portions_and_pieces_change_nothing(images: Path) -> None:
    """Portions of one, two and five crops; coloured at once or when asked for; two and three micro-batches."""
    dataset = ShardDataset(images)
    cpu = torch.device("cpu")
    expected = two_views(StepDataset(dataset, plan_for(dataset), SETTINGS)[1], SETTINGS, cpu)
    for pieces in (1, 2, 3):
        plan = Plan(dataset.manifest.shard_sizes, 3, 12, pieces, window=2)
        for images_a_portion in (1, 2, 5):
            with mock.patch.object(portions, "_PORTION_BYTES", images_a_portion * 2 * 3 * 16**2):
                cut = StepDataset(dataset, plan, SETTINGS)
            views = next(load_steps(cut, range(1, 2), workers=0))
            assert max(len(portion.rows) for portion in views.portions) <= images_a_portion
            assert torch.equal(views.rows, torch.from_numpy(plan[1][1]))
            for kept in (0, 2**28):
                with mock.patch.object(steps_module, "_KEPT_BYTES", kept):
                    made = coloured(views, SETTINGS, cpu)
                    assert isinstance(made, list) == bool(kept)
                assert len(made) == pieces
                for _ in range(2):  # as the gradient cache does
                    assert all(torch.equal(torch.cat(v), e) for v, e in zip(zip(*made, strict=True), expected, strict=True))


@pytest.mark.slow
def test_what_waits_for_the_step_is_bounded(images: Path) -> None:
    """Portions that no one has asked for yet: at most a step of them, or two a worker."""
    dataset = ShardDataset(images)
    made = multiprocessing.get_context("fork").Value("i", 0)

    class Counted(StepDataset):
        def portion(self, number: int) -> steps_module.Portion:
            with made.get_lock():
                made.value += 1
            return super().portion(number)

    with mock.patch.object(portions, "_PORTION_BYTES", 2 * 3 * 16**2):
        steps = Counted(dataset, plan_for(dataset), SETTINGS)
    assert steps.portions == 12
    loaded = load_steps(steps, range(40), workers=2)
    for taken in range(1, 4):
        next(loaded)
        assert made.value <= 12 * taken + 12 + 2
    assert made.value >= 36


@pytest.mark.slow
def test_a_workers_memory_stays_flat(images: Path) -> None:
    """Resident memory of a reading process, at the end of an early and of a late epoch."""
    dataset = ShardDataset(images)
    steps = StepDataset(dataset, plan_for(dataset), ViewSettings(image_size=48))
    loaded = load_steps(steps, range(160), workers=1)
    page, seen = os.sysconf("SC_PAGE_SIZE"), []
    for views in loaded:
        (worker,) = multiprocessing.active_children()
        if views.step in (40, 155):
            seen.append(int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * page / 2**20)
    print(f"a worker's resident memory: {seen[0]:.1f} MiB after 40 steps, {seen[1]:.1f} after 155")
    assert seen[1] - seen[0] < 8


@pytest.mark.parametrize("kind", ["truncated", "random", "one bit"])
def test_fuzzed_bytes_never_count_as_an_image(images: Path, tmp_path: Path, kind: str) -> None:
    """With the manifest's hash they are refused by it; with a manifest of their own they give one line or an image."""
    random = np.random.default_rng(len(kind))
    source = ShardDataset(images)
    contents = [source.read(row) for row in range(52)]

    def fuzz(content: bytes) -> bytes:
        if kind == "truncated":
            return content[: int(random.integers(1, len(content)))]
        if kind == "random":
            return content[:3] + random.bytes(len(content) - 3)
        at, bit = int(random.integers(len(content))), 1 << int(random.integers(8))
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]

    changed = [fuzz(content) for content in contents]
    rows, offset = [], 0
    for number, content in enumerate(changed):
        digest = hashlib.sha256(content if number % 2 else contents[number]).digest()
        rows.append(ManifestRow(str(number), "a.tar", offset, len(content), -1, 18, 18, digest))
        offset += len(content)
    (tmp_path / "a.tar").write_bytes(b"".join(changed))
    write_manifest(tmp_path, ["a.tar"], rows, ())
    dataset = ShardDataset(tmp_path)
    for number in range(52):
        try:
            image = dataset[number].image
        except DataError as error:
            line = str(error)
            assert line.startswith(f"{tmp_path}/a.tar: image {number}: ")
            assert "\n" not in line
            assert ("sha256" in line) == (number % 2 == 0)
        else:
            assert number % 2, "wrong bytes counted as right"
            assert image.dtype == torch.uint8
