"""The probe of a running training: what it asks whom, what it finds, and that the training does not notice it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import training_runs as runs
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import ProbeConfig
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.describe import view_settings
from simclr_dist.train.inputs import choose
from simclr_dist.train.learner import build_learner
from simclr_dist.train.probe import OnlineProbe

HERE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("held out"), images=61, seed=1)


def test_which_images(shards: Path, held_out: Path) -> None:
    train, test, most = load_manifest(shards), load_manifest(held_out), ProbeConfig(images=1000)
    rows, known = choose(most, test, train)
    assert (rows.tolist(), known) == (list(range(61)), 0)
    rows, _ = choose(ProbeConfig(images=7), test, train)
    assert len(set(rows.tolist())) == 7
    assert np.diff(rows).min() >= 8, "evenly spread"
    some = dataclasses.replace(test, label=np.where(np.arange(61) < 10, -1, test.label))
    assert choose(most, some, train)[0].tolist() == list(range(10, 61))
    hashes = np.concatenate([test.sha256[:59], np.full((1, 32), 0, np.uint8), np.full((1, 32), 255, np.uint8)])
    for row in range(61):  # found wherever it lies among the hashes, also at their ends
        parted = dataclasses.replace(train, key=train.key.only([0]), sha256=hashes[[row]])
        rows, known = choose(most, dataclasses.replace(test, sha256=hashes), parted)
        assert (sorted({*range(61)} - {*rows.tolist()}), known) == ([row], 1)
    with pytest.raises(ConfigError, match="has 3 labelled images"):
        choose(most, dataclasses.replace(test, label=np.where(np.arange(61) < 58, -1, test.label)), train)


def test_it_tells_good_features_from_bad_and_leaves_the_encoder_alone(shards: Path, held_out: Path, tmp_path: Path) -> None:
    """An encoder that gives the class itself is right everywhere; one that gives a constant is not."""
    config = load_config(runs.write_config(tmp_path, shards, probe={"every_epochs": 1, "shards": str(held_out)}))
    learner = build_learner(config, HERE)
    probe = OnlineProbe(config, view_settings(config), load_manifest(shards), HERE, steps_per_epoch=8)
    assert "kNN every 8 steps, k 20, 61 images of 3 classes" in str(probe)
    assert [step for step in range(1, 25) if probe.is_due(step)] == [8, 16, 24]
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    generator = torch.get_rng_state()
    found = probe.measure(learner.model)
    assert list(found) == ["probe/knn_top1"]
    assert found == probe.measure(learner.model)
    assert torch.equal(generator, torch.get_rng_state())
    assert learner.model.training
    assert all(module.training for module in learner.model.modules())
    runs.assert_same_bits(dict(learner.model.state_dict()), before)

    labels = torch.from_numpy(load_manifest(held_out).label.astype(np.int64))
    voting = [labels[0::2], labels[1::2]]

    class Knows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = voting[0] if len(x) == len(voting[0]) else voting[1]
            return torch.nn.functional.one_hot(own, 3).float()

    learner.model.encoder = Knows()  # type: ignore[assignment]
    assert probe.measure(learner.model) == {"probe/knn_top1": 100.0}


def test_labels_with_gaps_and_equal_votes(
    shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that gives a constant: the first 20 voting images decide, two classes are equal, and the lower one wins."""
    config = load_config(runs.write_config(tmp_path, shards, probe={"every_epochs": 1, "shards": str(held_out)}))
    ids = np.array([4, 1_000_000, 2**63 - 1])
    order = np.array([0, 0, 2, 0, 1, 0] * 11)[:61]  # of the voting ones, 0, 2, 4 ..., a third has each of 0, 2 and 1

    class Numbered(ShardDataset):
        def __init__(self, where: str, **how: Any) -> None:
            super().__init__(where, **how)
            self.manifest = dataclasses.replace(self.manifest, label=ids[order])

    monkeypatch.setattr("simclr_dist.train.probe.ShardDataset", Numbered)
    probe = OnlineProbe(config, view_settings(config), load_manifest(shards), HERE, steps_per_epoch=8)
    assert probe.classes == 3
    learner = build_learner(config, HERE)

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 4)

    learner.model.encoder = Constant()  # type: ignore[assignment]
    assert np.bincount(order[::2][:20]).tolist() == [7, 6, 7]
    assert (order[1::2] == 0).all()
    assert probe.measure(learner.model) == {"probe/knn_top1": 100.0}


def test_with_and_without_it_a_run_ends_with_the_same_bits(shards: Path, held_out: Path, tmp_path: Path) -> None:
    """On two processes; and they find what one does."""
    found: dict[str, list[float]] = {}
    for name, world_size, probe in (
        ("without", 2, {}),
        ("with", 2, {"every_epochs": 1, "shards": str(held_out), "images": 50}),
    ):
        changes: dict[str, Any] = {"probe": {"every_epochs": 0, **probe}} if probe else {}
        runs.write_config(tmp_path / name, shards, steps=10, log={"every": 5}, **changes)
        runs.train(tmp_path / name, world_size)
        lines = runs.metrics(tmp_path / name / "run")
        found[name] = [line["probe/knn_top1"] for line in lines if "probe/knn_top1" in line]
        assert [line["step"] for line in lines] == ([5, 8, 10] if probe else [5, 10])
    states = [{**runs.checkpoint(tmp_path / name / "run", 10), "config": None} for name in ("without", "with")]
    runs.assert_same_bits(*states)
    assert found["without"] == []
    (percent,) = found["with"]
    assert percent in [100 * right / 25 for right in range(26)]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"every_epochs": 1}, "probe.every_epochs: 1 needs probe.shards"),
        ({"shards": "x"}, "probe.shards: 'x' has no effect while probe.every_epochs is 0"),
        ({"images": 100}, "probe.images: 100 has no effect while probe.every_epochs is 0"),
        ({"every_epochs": 1, "shards": "nowhere"}, "nowhere"),
        ({"every_epochs": 1, "shards": "TRAIN"}, "has 0 labelled images that the run does not train on (205 that it does)"),
    ],
)
def test_what_is_refused(shards: Path, tmp_path: Path, probe: dict[str, Any], message: str) -> None:
    probe = {key: str(shards) if value == "TRAIN" else value for key, value in probe.items()}
    runs.write_config(tmp_path, shards, probe=probe)
    with runs.started(tmp_path, 1) as ranks:
        assert ranks.wait() == [2]
        assert message in ranks.output
        assert ranks.output.count("simclr-dist: ") == 1
        assert "Traceback" not in ranks.output
        assert not (tmp_path / "run").exists()
