"""TensorBoard's view of an evaluation, by its own readers: the curve, and the projector's points, labels and thumbnails."""

import fcntl
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from board_server import ask, server, steps
from evaluated import CLASSES, draw_images
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result import board
from simclr_dist.evaluate.result.board import sprite
from training_runs import until

Make = Callable[..., Path]


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    images, labels = draw_images(31, seed=1)
    test = make_shards("test", images, [-1, *labels[1:]])
    return make_shards("train", *draw_images(61, seed=0)), test


def measure(encoder: Path, sets: tuple[Path, Path], **settings: object) -> list[str]:
    lines: list[str] = []
    evaluate(encoder, *sets, workers=0, device="cpu", baselines=False, say=lines.append, **{"k": 10} | settings)
    return lines


def curves(run: Path, protocol: str = "knn") -> list[list[int]]:
    """The steps of a protocol's curves, each of settings of its own, the oldest first."""
    files = sorted((run / "tb" / "eval").glob(f"{protocol}-*/events*"), key=lambda file: file.stat().st_mtime_ns)
    shown = [EventAccumulator(str(file)).Reload() for file in files]
    return [[event.step for event in one.Scalars(f"eval/{protocol}_top1")] for one in shown]


def test_the_curve_joins_the_runs_results(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    for step in (300, 100):
        encoder = make_encoder(seed=step, step=step)
        measure(encoder, sets)
    run = encoder.parent.parent
    assert curves(run) == [[100, 300]]
    measure(make_encoder(seed=2, step=200), sets, k=3)
    assert curves(run) == [[100, 300], [200]], "another k is another curve"
    assert curves(run, "linear") == [[100, 200, 300]]
    measure(encoder, sets, out=run / "elsewhere.json", k=4)
    assert curves(run) == [[100, 300], [200]], "a result that is not among the run's is not shown"


def test_the_default_loader_shows_settings_apart(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Two k, the first of them measured again for new weights; and the projector, whose folder needs a run."""
    for step, k in ((100, 10), (300, 10), (200, 3), (300, 10)):
        measure(encoder := make_encoder(seed=step, step=step), sets, k=k, protocols=("knn",))
    run = encoder.parent.parent
    with server(run / "tb", tmp_path / "log") as address:
        until(lambda: len(steps(address)) == 2, 120.0)
        shown = steps(address)
        assert sorted(shown.values()) == [[100, 300], [200]]
        names = [name for name, _ in shown]
        (about,) = ask(address, "plugin/text/text", tag="eval/settings/text_summary", run=names[0])
        assert "k_used" in about["text"]
        assert ask(address, "plugin/projector/runs") == ["eval"]


def test_a_watcher_keeps_its_curve(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    run = encoder.parent.parent
    (run / "eval").mkdir()
    other = os.open(run / "eval" / ".watch", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "is written by the process that watches the run" in measure(encoder, sets)[-1]
    assert not list((run / "tb" / "eval").glob("*/events*"))
    os.close(other)
    measure(encoder, sets)
    assert curves(run) == [[1200]]


def test_a_board_that_cannot_be_written_costs_no_result(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    run = encoder.parent.parent
    (run / "tb").write_text("in the way")
    lines = measure(encoder, sets)
    assert any("the projector's files cannot be written" in line for line in lines)
    assert any("the accuracy curve cannot be written" in line for line in lines)
    assert (run / "eval" / "step-00001200.json").exists()


def test_the_projector_through_its_own_interface(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "POINTS", 20)
    encoder = make_encoder()
    measure(encoder, sets)
    run = encoder.parent.parent
    plugin = ProjectorPlugin(TBContext(logdir=str(run / "tb" / "eval")))
    pages = plugin.get_plugin_apps()

    def get(route: str, **query: str) -> bytes:
        response = Client(pages[route]).get(route, query_string=query)
        assert response.status_code == 200, response.data
        return response.data

    assert json.loads(get("/runs")) == ["."]
    (told,) = json.loads(get("/info", run="."))["embeddings"]
    name = told["tensorName"]
    assert name == "h of 31 test images, step 1200"
    assert told["tensorShape"] == [20, 128]
    points = np.frombuffer(get("/tensor", run=".", name=name, num_rows="100"), np.float32).reshape(20, 128)
    head, *lines = get("/metadata", run=".", name=name, num_rows="100").decode().splitlines()
    assert head == "class\tkey"
    manifest, keys = load_manifest(sets[1]), [line.split("\t")[1] for line in lines]
    rows = [manifest.key.tolist().index(key) for key in keys]
    assert rows == sorted(set(rows))
    assert len(rows) == 20
    names = ["" if manifest.label[row] < 0 else CLASSES[manifest.label[row]] for row in rows]
    assert [line.split("\t")[0] for line in lines] == names
    features = (read_features(path) for path in (run / "eval" / "features").iterdir())
    (h,) = (f.embedding for f in features if f.about.data_digest == manifest.digest and "views" not in f.about.shape)
    np.testing.assert_allclose(points, h[rows], rtol=1e-4)
    picture = Image.open(io.BytesIO(get("/sprite_image", run=".", name=name)))
    assert picture.size == (5 * 32, 5 * 32), "a square that holds 20"
    assert told["sprite"]["singleImageDim"] == [32, 32]
    again = Image.open(io.BytesIO(sprite(ShardDataset(sets[1]), rows)))
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    tile = np.asarray(picture)[32:64, :32].astype(float)  # the sixth
    image = ShardDataset(sets[1])[rows[5]].image.float().mean()
    assert tile.mean() == pytest.approx(float(image), abs=12)
