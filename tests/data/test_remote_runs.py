"""Whole commands over shards that are elsewhere: the same bits as from a folder, every image once, one line when it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import training_runs as runs
from simclr_dist.cli import main as cli
from simclr_dist.cli.train import main
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, extract
from simclr_dist.method.distributed import World
from small_shards import Server, png, serve, write_small_shards, write_tar

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]
SIZES = [7, 3, 9, 8, 5, 6, 9, 4, 9]  # 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("shards"), SIZES)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serve(shards) as server:
        yield server


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIMCLR_DIST_CACHE", str(tmp_path / "cache"))


def train(shards: str, run: str, *arguments: str, steps: int = 4, **data: object) -> int:
    changes = {"run_folder": run, "steps": steps, "checkpoint": {"every": 2}}
    config = runs.write_config(Path(), Path(), data={"shards": shards, **data}, **changes)
    if data.get("reader") == "stream":
        config.write_text(config.read_text().replace("  window: 2\n", ""))
    return main([str(config), *arguments])


def test_a_run_over_the_network_is_the_run_from_the_folder(server: Server, shards: Path) -> None:
    """Also when the server fails now and then, and when the second half goes on from the other place."""
    server.faults = {f"train-{shard:06d}.tar": [500, "cut"] for shard in range(0, 9, 2)}
    assert train(str(shards), "local") == 0
    assert train(server.url, "remote") == 0
    for path in [*Path("remote/checkpoints").iterdir(), *Path("remote/encoders").iterdir()]:
        if path.stem == "step-00000004":
            path.unlink()
    assert train(f"{server.url}/train-{{000000..000008}}.tar", "remote", "--data.workers", "1") == 0
    local, remote = (runs.checkpoint(Path(run), 4) for run in ("local", "remote"))
    assert local["data_digest"] == remote["data_digest"]
    for name, value in local["model"].items():
        assert torch.equal(value, remote["model"][name]), name


def test_a_server_that_stays_away_ends_the_run_with_its_name(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = {f"train-{shard:06d}.tar": [500] * 10_000 for shard in range(9)}
    assert train(server.url, "run", retry_minutes=0.02, on_bad_sample="replace") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"simclr-dist: {server.url}/train-00000")
    assert "cannot be fetched: the server says 500" in line
    assert json.loads(Path("run/status.json").read_text())["exit_code"] == 2


def test_a_cache_that_is_too_small_for_the_windows_is_refused(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(server.url, "run", cache_gib=1e-5) == 2
    assert "data.cache_gib: 1e-05 GiB are too few for" in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_other_verbs_read_the_manifest_by_url(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(runs.write_config(Path(), Path(), data={"shards": server.url}))
    assert cli.main(["plan", config]) == 0
    assert "60; 2 steps an epoch" in capsys.readouterr().out
    assert cli.main(["plan", config, "--data.shards", f"{server.url}/nothing"]) == 2
    assert "404" in capsys.readouterr().err
    assert sum(server.asked[f"train-{shard:06d}.tar"] for shard in range(9)) == 0


PIXELS: dict[str, Any] = {"image_size": 8}


def _pixels(here: World | None, url: str, cache: str, workers: int = 0) -> list[object]:
    images = ShardDataset(url, cache=CacheSettings(Path(cache), 1 << 30))
    found = extract(images, {}, PIXELS, pixels=True, batch_size=4, workers=workers)[RAW_PIXELS]
    return [found.h, found.label, found.row]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once_on_any_world_size(
    server: Server, shards: Path, tmp_path: Path, world_size: int
) -> None:
    expected, cache = extract(ShardDataset(shards), {}, PIXELS, pixels=True)[RAW_PIXELS], str(tmp_path / "cache")
    # The harness's ranks may have no children, so workers are for one process.
    several = ranks.run(_pixels, world_size, server.url, cache) if world_size > 1 else [_pixels(None, server.url, cache, 2)]
    for h, label, row in several:
        assert row.tolist() == list(range(60))
        assert torch.equal(h, expected.h)
        assert torch.equal(label, expected.label)
    assert all(server.asked[f"train-{shard:06d}.tar"] == 1 for shard in range(9)), "one fetch for all ranks and workers"


def test_a_stream_says_what_does_not_hold_and_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tar in range(4):
        write_tar(tmp_path / f"{tar}.tar", [(f"{k}.png", png(15 * tar + k) if k != 3 else b"bad") for k in range(15)])
    stream = {"reader": "stream", "samples": 60, "shuffle_buffer": 5, "on_bad_sample": "replace"}
    assert train(f"{tmp_path}/{{0..3}}.tar", "run", steps=2, **stream) == 0
    assert train(f"{tmp_path}/{{0..3}}.tar", "run", steps=5, workers=2, **stream) == 0
    log = Path("run/train.log").read_text()
    assert log == capsys.readouterr().out
    first, second = log.split("resumed at step 2:")
    assert "exact epochs and resume in mid-epoch do not hold" in first
    assert "resumed at step 2, it starts anew in another order" in second
    assert "60 images, 2 steps an epoch, 12 left over" in first
    bad = Path("run/bad_samples.txt").read_text().splitlines()
    assert 1 <= len(bad) <= 4
    assert all("image 3: not an image" in line for line in bad)
    assert json.loads(Path("run/env.json").read_text())["data_digest"].startswith("stream-")
    capsys.readouterr()
    assert train(f"{tmp_path}/{{0..3}}.tar", "other", workers=5, **stream) == 2
    assert "4 tars are too few" in capsys.readouterr().err
