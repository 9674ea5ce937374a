"""kNN and the L-BFGS probe against scikit-learn, on an encoder's features of real images."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from evaluated import CARD, scored
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import untrained_encoder
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.evaluate.protocols.linear import linear_probe

ANIMALS = Path(__file__).parents[3] / "shared" / "data" / "animals10-mini"
COPIES = 8  # of each image, mirrored and shifted: 320 photos are too few to tell 0.1 points


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features and labels, test features and labels."""
    if not ANIMALS.is_dir():
        pytest.skip(f"no real images in {ANIMALS}")
    shards = tmp_path_factory.mktemp("real") / "shards"
    write_shards(ANIMALS, shards, short_side=64, processes=1, progress=False)
    images, card = ShardDataset(shards), {**CARD, "image_size": 48}
    network = untrained_encoder(card, 0)

    class Shifted:
        def __init__(self, by: int, flip: bool) -> None:
            self.by, self.flip = by, flip

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int):  # type: ignore[no-untyped-def]
            sample = images[row]
            image = sample.image[:, self.by :, self.by :]
            return sample._replace(image=image.flip(-1) if self.flip else image)

    parts = [
        extract(Shifted(by, flip), {"h": network}, {**card, "image_size": 48})["h"]
        for by, flip in itertools.product(range(0, 4 * COPIES // 2, 4), (False, True))
    ]
    h, y = torch.cat([part.h for part in parts]), torch.cat([part.label for part in parts])
    test = torch.arange(len(h)) % len(images) % 2 == 0  # an image and its copies are on one side
    return h[~test], y[~test], h[test], y[test]


def agree(ours: Tensor, theirs: np.ndarray, labels: Tensor) -> None:
    found, expected = ours.numpy(), theirs
    assert (found == expected).mean() >= 0.995
    accuracy = 100 * (found == labels.numpy()).mean(), 100 * (expected == labels.numpy()).mean()
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.1)
    assert accuracy[0] > 12, "better than chance, so the comparison means something"


def test_knn(real: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train_h, train_y, test_h, test_y = real
    votes = weighted_knn(train_h, train_y, test_h, k=200, temperature=0.1, classes=10)
    model = KNeighborsClassifier(200, weights=lambda distance: np.exp((1 - distance) / 0.1), algorithm="brute", metric="cosine")
    agree(votes.argmax(dim=1), model.fit(train_h.double(), train_y).predict(test_h.double()), test_y)


def test_linear(real: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train_h, train_y, test_h, test_y = real
    logits, info = scored(linear_probe, (train_h, train_y), test_h, classes=10, l2=0.01)
    assert info["converged"]
    mean, deviation = train_h.double().mean(dim=0), train_h.double().std(dim=0, correction=0)
    x, asked = ((h.double() - mean) / deviation for h in (train_h, test_h))
    model = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=10_000, tol=1e-6).fit(x.numpy(), train_y.numpy())
    agree(logits.argmax(dim=1), model.predict(asked.numpy()), test_y)
