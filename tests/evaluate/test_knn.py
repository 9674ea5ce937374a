"""Weighted kNN against scikit-learn, and what scikit-learn leaves open: ties, limits, overflow."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.neighbors import KNeighborsClassifier

from simclr_dist.evaluate.classify import classify
from simclr_dist.evaluate.features.extraction import Features
from simclr_dist.evaluate.protocols import knn
from simclr_dist.evaluate.protocols.knn import neighbours, weighted_knn
from simclr_dist.evaluate.protocols.scores import score
from simclr_dist.evaluate.result.file import TRAINED
from simclr_dist.evaluate.settings import Settings


@pytest.fixture(autouse=True, params=["at once", "in parts"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in parts":
        monkeypatch.setattr(knn, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(knn, "_KEYS_AT_ONCE", 64)


def blobs(n: int, d: int, classes: int, seed: int, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize(("k", "temperature"), [(200, 0.1), (20, 0.1), (200, 0.01), (1, 0.1), (50, 1.0)])
def test_same_predictions_as_scikit_learn(k: int, temperature: float) -> None:
    train_h, train_y = blobs(700, 12, 6, seed=0, spread=3)
    test_h, test_y = blobs(400, 12, 6, seed=1, spread=3)
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    expected = oracle.fit(train_h.numpy(), train_y.numpy()).predict(test_h.numpy())
    found = weighted_knn(train_h, train_y, test_h, k=k, temperature=temperature, classes=6)
    assert found.shape == (400, 6)
    assert found.dtype == torch.int64
    assert (found.argmax(dim=1).numpy() == expected).all()
    assert 0.3 < (found.argmax(dim=1) == test_y).double().mean() < 0.95  # neither trivial nor chance: the vote decides
    share = torch.from_numpy(oracle.predict_proba(test_h.numpy()))
    assert (found.double() / found.sum(dim=1, keepdim=True) - share).abs().max() < 1e-9


def test_the_weights_decide() -> None:
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.8])
    train_h, train_y = torch.stack([near, far, far * 2]), torch.tensor([1, 0, 0])
    query = near[None] * 3
    assert weighted_knn(train_h, train_y, query, k=3, temperature=0.1, classes=2).argmax(dim=1).tolist() == [1]
    assert weighted_knn(train_h, train_y, query, k=3, temperature=10, classes=2).argmax(dim=1).tolist() == [0]


def test_a_row_is_classified_alone_as_among_others() -> None:
    train_h, train_y = blobs(300, 8, 4, seed=0)
    test_h, _ = blobs(20, 8, 4, seed=1)
    together = weighted_knn(train_h, train_y, test_h, k=30, classes=4)
    alone = torch.cat([weighted_knn(train_h, train_y, row[None], k=30, classes=4) for row in test_h])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("k", [3, 40, 300, 700])
def test_of_equally_near_rows_the_first_vote(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train_h = torch.eye(4)[torch.randint(4, (1000,), generator=generator)]  # four places only: ties at every k
    train_y = torch.randint(50, (1000,), generator=generator)
    test_h = torch.tensor([[0.6, 0.8, 0, 0], [0, 0, 1, 0], [0.8, 0, 0, 0.6], [0, 0, 0, 1]])
    first = np.argsort(-(test_h @ train_h.T).numpy(), axis=1, kind="stable")[:, :k]
    weight = np.exp(np.take_along_axis((test_h @ train_h.T).numpy(), first, axis=1).astype(np.float64))
    votes = [np.bincount(train_y.numpy()[i], w, minlength=50) for i, w in zip(first, weight, strict=True)]
    expected = np.round(votes, 9).argmax(axis=1)
    found = weighted_knn(train_h, train_y, test_h, k=k, temperature=1.0, classes=50)
    assert found.argmax(dim=1).tolist() == expected.tolist()


def test_of_equal_votes_the_lower_class_wins() -> None:
    votes = weighted_knn(torch.ones(4, 2), torch.tensor([2, 1, 2, 1]), torch.ones(1, 2), k=4, classes=3)
    assert votes.tolist() == [[0, 2 * 2**40, 2 * 2**40]]
    assert votes.argmax(dim=1).tolist() == [1]


def test_votes_rank_the_classes_for_top_five() -> None:
    train_h, train_y = blobs(900, 12, 9, seed=0, spread=4)
    test_h, test_y = blobs(400, 12, 9, seed=1, spread=4)
    measured = score(weighted_knn(train_h, train_y, test_h, k=50, classes=9), test_y)
    assert measured.top5 is not None
    assert measured.top1 + 15 < measured.top5 < 100


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    """Of one neighbour one class has votes: top-5 is top-1, wherever the true class stands in the order."""
    train_h, train_y = blobs(900, 12, 9, seed=0, spread=4)
    test_h, test_y = blobs(400, 12, 9, seed=1, spread=4)
    train, test = (Features(h, y, torch.arange(len(h))) for h, y in ((train_h, train_y), (test_h, test_y)))
    by_kind = {"train": {TRAINED: train}, "test": {TRAINED: test}}
    settings = Settings(protocols=("knn",), k=1)
    row = classify(by_kind, 9, settings, given={}, say=print)["knn"]["results"][TRAINED]
    assert row["top5"] == row["top1"] < 50


@pytest.mark.parametrize(("rows", "used"), [(5, 5), (55, 10), (256, 12), (3980, 199), (4000, 200), (50_000, 200)])
def test_few_images_have_few_neighbours(rows: int, used: int) -> None:
    assert neighbours(None, rows) == used
    assert neighbours(200, rows) == min(200, rows)


def test_without_test_rows_there_are_no_votes() -> None:
    assert weighted_knn(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), torch.ones(0, 2), k=2, classes=3).shape == (0, 3)


def test_k_is_limited_to_the_training_rows() -> None:
    train_h, train_y = blobs(50, 8, 4, seed=0)
    test_h, _ = blobs(20, 8, 4, seed=1)
    limited = weighted_knn(train_h, train_y, test_h, k=10_000, classes=4)
    assert torch.equal(limited, weighted_knn(train_h, train_y, test_h, k=50, classes=4))


def test_a_tiny_temperature_asks_the_nearest_and_does_not_overflow() -> None:
    train_h, train_y = blobs(200, 8, 4, seed=0)
    test_h, _ = blobs(50, 8, 4, seed=1)
    nearest = weighted_knn(train_h.float(), train_y, test_h.float(), k=1, classes=4)
    cold = weighted_knn(train_h.float(), train_y, test_h.float(), temperature=1e-5, classes=4)
    assert torch.equal(cold.argmax(dim=1), nearest.argmax(dim=1))


def test_shuffled_labels_give_chance() -> None:
    train_h, train_y = blobs(2000, 16, 5, seed=0)
    test_h, test_y = blobs(1000, 16, 5, seed=1)
    # The test labels are in random order too: rows of a blob share one prediction, and how many of them are right by luck
    # is no binomial number.
    generator = torch.Generator().manual_seed(3)
    shuffled = train_y[torch.randperm(2000, generator=generator)]
    found = weighted_knn(train_h, train_y, test_h, k=20, classes=5).argmax(dim=1)
    control = weighted_knn(train_h, shuffled, test_h, k=20, classes=5).argmax(dim=1)
    assert (found == test_y).double().mean() > 0.8
    test_y = test_y[torch.randperm(1000, generator=generator)]
    low, high = binom.interval(0.999, 1000, 0.2)
    assert low <= int((control == test_y).sum()) <= high


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.1), (5, 0.0)])
def test_senseless_settings_are_refused(k: int, temperature: float) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        weighted_knn(
            torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), torch.ones(1, 2), k=k, temperature=temperature, classes=1
        )


def test_a_tiny_temperature_is_the_nearest_neighbour() -> None:
    generator = torch.Generator().manual_seed(3)
    train_h, test_h = (torch.randn(n, 8, generator=generator) for n in (50, 20))
    train_y = torch.arange(50) % 5
    votes = weighted_knn(train_h, train_y, test_h, k=7, temperature=1e-300, classes=5)
    nearest = (torch.nn.functional.normalize(test_h) @ torch.nn.functional.normalize(train_h).T).argmax(1)
    assert torch.equal(votes.argmax(1), train_y[nearest])
    assert votes.min() == 0
