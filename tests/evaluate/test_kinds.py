"""Images that are not 8-bit RGB: what an encoder has to beat is measured right beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluated import CARD, CLASSES, draw_images
from simclr_dist.convert.shards import write_shards
from simclr_dist.encoder.file import export_encoder, untrained_encoder
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.report import summary

Make = Callable[..., Path]
HOW: dict[str, Any] = {"device": "cpu", "workers": 0}


@pytest.fixture
def gray_shards(tmp_path: Path) -> Make:
    """Writes gray pictures, of 8 bits or the same of 16, and shards of them; returns the shards."""

    def make(name: str, count: int, seed: int, *, bits: int = 8, channels: int = 1) -> Path:
        folder = tmp_path / f"{name}-pictures"
        for number, (image, label) in enumerate(zip(*draw_images(count, seed), strict=True)):
            path = folder / CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = image[:, :, 0]
            Image.fromarray(gray if bits == 8 else gray.astype(np.uint16) * 257).save(path)
        write_shards(folder, tmp_path / name, channels=channels, bit_depth=bits, processes=1)
        return tmp_path / name

    return make


@pytest.fixture
def gray_encoder(tmp_path: Path) -> Path:
    card = {**CARD, "channels": 1, "mean": [0.5], "std": [0.25]}
    export_encoder(tmp_path / "gray.safetensors", untrained_encoder(card, 5), card)
    return tmp_path / "gray.safetensors"


def test_raw_pixels_of_8_and_16_bits_are_one_scale(gray_encoder: Path, gray_shards: Make, tmp_path: Path) -> None:
    train = gray_shards("train", 60, 0)
    found = [
        summary(evaluate(gray_encoder, train, test, protocols=("linear",), out=tmp_path / f"{test.name}.json", **HOW))
        for test in (gray_shards("test", 48, 1), gray_shards("deep", 48, 1, bits=16))
    ]
    assert found[0] == found[1]
    assert found[0]["linear"]["raw_pixels"] > 90


def test_raw_pixels_are_kept_by_their_channels(
    gray_encoder: Path, make_encoder: Make, gray_shards: Make, tmp_path: Path
) -> None:
    """Gray pictures keep their bytes as RGB, so a digest does not tell the two."""
    how = {"features": str(tmp_path / "features"), "protocols": ("knn",), **HOW}
    evaluate(gray_encoder, gray_shards("train", 30, 0), gray_shards("test", 12, 1), **how)
    rgb = gray_shards("train-rgb", 30, 0, channels=3), gray_shards("other", 9, 2, channels=3)
    assert evaluate(make_encoder(), *rgb, **how)["features_reused"] == {}
