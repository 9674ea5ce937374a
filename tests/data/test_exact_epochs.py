"""Exact epochs, and going on at another world size, for any layout: over the real reader, local and through the cache."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings
from simclr_dist.data.remote.fetch import Patience
from simclr_dist.data.steps import StepDataset, Views, load_steps
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.system.errors import RankError
from small_shards import SIDE, serve, write_small_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]
VIEWS = ViewSettings(image_size=SIDE)
SHARDS = 40


def steps_of(
    images: ShardDataset, *, batch: int, window: int, pieces: int, rank: int, world: int, bad: bool = False
) -> StepDataset:
    plan = Plan(images.manifest.shard_sizes, 3, batch, pieces, window, rank, world)
    return StepDataset(images, plan, VIEWS, replace_bad=bad)


def crops_of(part: Views) -> torch.Tensor:
    """View a of all its images."""
    return torch.cat([portion.crops[0] for portion in part.portions])


def whole(parts: list[Views], pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's rows and crops in the order of its global batch, from the ranks' parts."""
    rows = torch.stack([part.rows.view(pieces, -1) for part in parts], 1).flatten()
    crops = torch.stack([crops_of(part).view(pieces, -1, 3, SIDE, SIDE) for part in parts], 1).flatten(0, 2)
    return rows, crops


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    batch_of=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3, 4])),
    window=st.integers(1, 5),
    other_world=st.sampled_from([1, 2, 3, 4, 6]),
    remote=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.slow
def test_any_layout(
    sizes: list[int], batch_of: tuple[int, int, int], window: int, other_world: int, remote: bool, data: st.DataObject
) -> None:
    """Two epochs at one world size, the second half again at another; every image once an epoch, but for the left-over ones."""
    share, pieces, world = batch_of
    batch, samples = share * pieces * world, sum(sizes)
    if batch > samples:
        return
    bad = data.draw(st.sets(st.integers(0, samples - 1), max_size=min(2, samples - batch)), label="bad rows")
    with tempfile.TemporaryDirectory() as folder:
        local = write_small_shards(Path(folder, "shards"), sizes, bad=sorted(bad))
        with opened(local, Path(folder, "cache"), remote) as images:
            per_epoch = samples // batch
            runs = {}
            for name, ranks in (("alone", 1), ("shared", world), ("other", other_world)):
                if batch % (pieces * ranks):
                    continue
                datasets = [
                    steps_of(images, batch=batch, window=window, pieces=pieces, rank=rank, world=ranks, bad=True)
                    for rank in range(ranks)
                ]
                start = 0 if name != "other" else per_epoch
                runs[name] = {
                    step: whole([dataset[step] for dataset in datasets], pieces)
                    for step in range(start, 2 * per_epoch)
                    if not unreadable(datasets, step)
                }
            for run in runs.values():
                for step, (rows, crops) in run.items():
                    assert step in runs["alone"]
                    assert torch.equal(rows, runs["alone"][step][0])
                    assert torch.equal(crops, runs["alone"][step][1])
                    assert len(set(rows.tolist())) == batch, "never twice in a batch"
                    assert not bad & set(rows.tolist())
            if not bad:
                for epoch in (0, 1):
                    seen = [
                        row
                        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
                        for row in runs["alone"][step][0].tolist()
                    ]
                    assert len(seen) == len(set(seen)) == per_epoch * batch


def unreadable(datasets: list[StepDataset], step: int) -> bool:
    """Whether the step ends the run: an image and all its spares are bad."""
    try:
        for dataset in datasets:
            dataset[step]
    except RankError:
        return True
    return False


class opened:
    """The shards of a folder, from it or through a cache with little room."""

    def __init__(self, local: Path, cache: Path, remote: bool) -> None:
        self._local, self._cache, self._remote = local, cache, remote

    def __enter__(self) -> ShardDataset:
        if not self._remote:
            return ShardDataset(self._local)
        self._serving = serve(self._local)
        url = self._serving.__enter__().url
        room = 8 * max(path.stat().st_size for path in self._local.glob("*.tar"))
        return ShardDataset(url, cache=CacheSettings(self._cache, room, Patience(20, 5, 0.01)))

    def __exit__(self, *error: object) -> None:
        if self._remote:
            self._serving.__exit__(None, None, None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = np.random.default_rng(0).integers(3, 9, SHARDS).tolist()
    return write_small_shards(tmp_path_factory.mktemp("shards"), sizes, bad=[5, 40])


@pytest.fixture
def remote(shards: Path) -> Iterator[str]:
    with serve(shards) as server:
        server.faults = {f"train-{shard:06d}.tar": ["cut" if shard % 2 else 503] for shard in range(0, SHARDS, 3)}
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_workers_through_a_small_cache_give_what_a_folder_gives(
    shards: Path, remote: str, tmp_path: Path, workers: int
) -> None:
    expected = list(
        load_steps(steps_of(ShardDataset(shards), batch=6, window=2, pieces=1, rank=0, world=1, bad=True), range(36), workers=0)
    )
    assert sum(len(views.bad) for views in expected) > 0
    seen: dict[int, list[Views]] = {}
    for rank in range(2):
        # As little as a run is let have.
        at_once = Plan(ShardDataset(shards).manifest.shard_sizes, 3, 6, window=2).shards_at_once(2 * max(1, workers) + 2)
        assert at_once < SHARDS
        room = at_once * max(path.stat().st_size for path in shards.glob("*.tar"))
        images = ShardDataset(remote, open_shards=4, cache=CacheSettings(tmp_path, room, Patience(30, 5, 0.01)))
        dataset = steps_of(images, batch=6, window=2, pieces=1, rank=rank, world=2, bad=True)
        for views in load_steps(dataset, range(36), workers=workers):
            seen.setdefault(views.step, []).append(views)
            assert images._cache is not None
            with images._cache._lock("room"):  # else what goes and what comes would be seen at once
                assert taken(tmp_path) <= room
    for views in expected:
        rows, crops = whole(seen[views.step], 1)
        assert torch.equal(rows, views.rows)
        assert torch.equal(crops, crops_of(views))


def taken(cache: Path) -> int:
    """Bytes of shards, also of those that are being fetched."""
    sizes = []
    for path in (*cache.glob("*.tar"), *cache.glob("*.part")):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def test_a_thousand_shards_with_no_more_than_two_windows_open(tmp_path: Path) -> None:
    folder = write_small_shards(tmp_path, [2] * 1000)
    images = ShardDataset(folder, open_shards=2 * 16)
    dataset = steps_of(images, batch=64, window=16, pieces=1, rank=0, world=1)
    seen: list[int] = []
    for step in range(dataset.plan.steps_per_epoch):
        seen += dataset.plan[step][1].tolist()
        for row in dataset.plan[step][1]:
            images.read(int(row))
        assert open_tars(folder) <= 32
    assert len(seen) == len(set(seen)) == 1984


def open_tars(folder: Path) -> int:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 (names, as some are gone)
    targets = [Path(os.readlink(link)) for link in links if link.is_symlink()]  # noqa: PTH115 (the link's text is wanted)
    return sum(target.parent == folder and target.suffix == ".tar" for target in targets)
