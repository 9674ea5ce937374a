"""Shards of small pictures for the tests of data: whole ones, and copies with damaged bytes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.convert.shards import write_shards
from simclr_dist.data.reader import ShardDataset

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
