"""The paper's linear evaluation against its own update written out in numpy, float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from evaluated import scored
from simclr_dist.evaluate.classify import by_new_crops
from simclr_dist.evaluate.features.extraction import Features
from simclr_dist.evaluate.protocols.sgd import sgd_probe
from simclr_dist.evaluate.settings import Settings
from simclr_dist.system import progress


def blobs(n: int, seed: int, *, d: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(n, d, generator=generator), labels


def test_the_update_is_nesterovs_with_a_cosine_and_the_scaled_rate() -> None:
    h, y = blobs(64, 0)
    # A batch is the set: its order does not matter.
    logits, info = scored(sgd_probe, (lambda _: (h, y),), h, classes=4, epochs=12, batch_size=64)
    assert info["lr"] == 0.1 * 64 / 256
    x, target = h.double().numpy(), np.eye(4)[y.numpy()]
    x = np.concatenate([x, np.ones((64, 1))], axis=1)
    weight, velocity = np.zeros((13, 4)), np.zeros((13, 4))
    for step in range(12):
        rate = 0.5 * 0.025 * (1 + math.cos(math.pi * step / 12))
        probability = np.exp(x @ weight)
        probability /= probability.sum(axis=1, keepdims=True)
        gradient = x.T @ (probability - target) / 64
        velocity = 0.9 * velocity + gradient
        weight -= rate * (gradient + 0.9 * velocity)
    assert np.abs(logits.numpy() - x @ weight).max() < 1e-5
    assert (logits.shape, logits.dtype) == ((64, 4), torch.float32)


def test_every_epoch_brings_its_own_features_and_every_row_counts_once() -> None:
    h, y = blobs(70, 0)
    asked: list[int] = []

    def views(epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(epoch)
        return h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(epoch)), y

    _, info = scored(sgd_probe, (views,), h, classes=4, epochs=3, batch_size=32)
    assert asked == [0, 1, 2]
    assert info["views"] == "new in every epoch"
    assert (info["steps"], info["batch_size"]) == (9, 32)  # 24 + 23 + 23 rows
    assert info["as_in_paper"] is False
    one, first = scored(sgd_probe, (lambda _: (h, y),), h, classes=4, epochs=1, batch_size=1)
    other, second = scored(sgd_probe, (views,), h, classes=4, epochs=1, batch_size=1)
    assert first["steps"] == second["steps"] == 70
    assert not torch.equal(one, other)


def test_what_differs_from_the_paper_is_told() -> None:
    h, y = blobs(20, 0)
    assert scored(sgd_probe, (lambda _: (h, y),), h, classes=4)[1]["as_in_paper"]
    short = scored(sgd_probe, (lambda _: (h, y),), h, classes=4, epochs=5)[1]
    assert (short["as_in_paper"], short["epochs"], short["paper_epochs"]) == (False, 5, 90)


def test_it_learns_and_shuffled_labels_give_chance() -> None:
    train_h, train_y = blobs(2000, 0)
    test_h, test_y = blobs(1000, 1)
    logits, info = scored(sgd_probe, (lambda _: (train_h, train_y),), test_h, classes=4, epochs=10)
    assert int((logits.argmax(dim=1) == test_y).sum()) > 800
    assert info["train_top1"] > 80
    # The test labels are in random order too: rows of a blob share one prediction, and how many of them are right by luck
    # is no binomial number.
    generator = torch.Generator().manual_seed(3)
    shuffled, test_y = train_y[torch.randperm(2000, generator=generator)], test_y[torch.randperm(1000, generator=generator)]
    control, _ = scored(sgd_probe, (lambda _: (train_h, shuffled),), test_h, classes=4, epochs=10)
    low, high = binom.interval(0.999, 1000, 0.25)
    assert low <= int((control.argmax(dim=1) == test_y).sum()) <= high


def test_seeds_reproduce_and_differ() -> None:
    h, y = blobs(100, 0)
    first, again, other = (
        scored(sgd_probe, (lambda _: (h, y),), h, classes=4, epochs=2, batch_size=10, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_what_cannot_be_fitted_is_refused() -> None:
    h, y = blobs(10, 0)
    with pytest.raises(ValueError, match="at least 1, got epochs=0"):
        scored(sgd_probe, (lambda _: (h, y),), h, classes=4, epochs=0)
    with pytest.raises(ValueError, match="no training rows"):
        scored(sgd_probe, (lambda _: (h[:0], y[:0]),), h, classes=4)


def test_its_epochs_are_counted_in_one_line() -> None:
    """The images of each are in a line within, which does not stay."""
    (h, y), seen = blobs(20, 0), list[str]()

    def crops(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(progress._open[-1]._text().partition("  ")[0])
        return h, y

    by_new_crops(Features(h, y, torch.arange(20)), 4, Settings(protocols=("sgd",), sgd_epochs=2), crops)
    assert seen == ["trained, SGD: 0 of 2 epochs", "trained, SGD: 1 of 2 epochs"]
