"""The demo's picture: views and loss above, neighbours before and after training below."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import training_runs as runs
from simclr_dist.preflight.demo.picture import draw


def test_all_parts_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = runs.make_shards(tmp_path)
    runs.write_config(tmp_path, shards, steps=3)
    runs.train(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    with Image.open(draw(Path("run"), Path("run/encoders/step-00000003.safetensors"), shards)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    half = pixels.shape[1] // 2
    for part in (pixels[:400, :half], pixels[:400, half:], pixels[450:, :half], pixels[450:, half:]):
        assert (part.min(2) < 200).mean() > 0.002, "something is drawn"
