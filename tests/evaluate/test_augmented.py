"""Augmented views as a signal: the training's own views, the same for every encoder, and no label needed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluated import CARD, draw_images
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, two_views
from simclr_dist.data.views.draws import PRESETS
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.features import views
from simclr_dist.evaluate.features.views import choose_rows, training_views
from simclr_dist.evaluate.job import evaluate

Make = Callable[..., Path]
OWN = {"preset": "small", "image_size": None, "brightness": 0.3, "crop_scale": [0.3, 0.9], "blur": 0.5}
CONFIG = {"seed": 0, "global_batch_size": 8, "views": OWN}


def test_the_cards_views() -> None:
    drawn = training_views({**CARD, "config": CONFIG})
    assert drawn.source == "the encoder's card"
    expected = (16, (0.3, 0.9), 0.3, 0.5, PRESETS["small"].hue, (0.5, 0.5, 0.5))
    own = drawn.settings
    assert (own.image_size, own.crop_scale, own.brightness, own.blur, own.hue, own.mean) == expected
    for size, preset in ((32, "small"), (224, "imagenet")):
        other = training_views({**CARD, "image_size": size, "config": None})
        assert other.source == f"preset {preset}, as the encoder's card has none"
        assert other.settings.brightness == PRESETS[preset].brightness
    assert json.loads(json.dumps(drawn.describe())) == drawn.describe()


def test_at_most_so_many_rows() -> None:
    assert choose_rows(7).tolist() == list(range(7))
    rows = choose_rows(20_000)
    assert len(set(rows.tolist())) == 4096
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.max() > 19_000
    assert np.array_equal(rows, choose_rows(20_000))


def test_alignment_is_that_of_the_trainings_views(
    make_encoder: Make, make_shards: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "IMAGES", 15)
    train, test = (make_shards(name, draw_images(n, seed=n)[0], [-1] * n, ()) for name, n in (("train", 9), ("test", 20)))
    encoder = make_encoder(config=CONFIG)
    result = evaluate(encoder, train, test, workers=0, device="cpu")
    found = result["signals"]["views"]
    assert found["images"] == 15
    assert result["settings"]["signal_views"]["from"] == "the encoder's card"
    assert result["settings"]["signal_views"]["brightness"] == 0.3

    images, settings, network = ShardDataset(test), training_views({**CARD, "config": CONFIG}).settings, load_encoder(encoder)
    step = StepDataset(images, Plan(images.manifest.shard_sizes, seed=0, global_batch_size=20), settings)[0]
    keep = torch.isin(step.rows, torch.from_numpy(choose_rows(20)))
    a, b = (F.normalize(network(x[keep]).double()) for x in two_views(step, settings, torch.device("cpu")))
    assert found["alignment"] == pytest.approx(float((a - b).square().sum(1).mean()), rel=1e-4)
    distances = torch.pdist(a)
    assert found["uniformity"] == pytest.approx(float((-2 * distances.square()).exp().mean().log()), rel=1e-3)
    assert 0 < found["alignment"] < 2
