"""The linear probe against scikit-learn's logistic regression, on easy and on badly conditioned features."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from simclr_dist.evaluate.linear import linear_probe


def overlapping(n: int, seed: int, *, d: int = 40, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, in features as correlated as pixels and of unequal scale and offset."""
    shared = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, d, generator=shared)
    mixing = torch.randn(d, d, generator=shared) * torch.logspace(0, -2, d)[:, None] + 1
    scale, offset = torch.logspace(-3, 3, d), 5 * torch.logspace(-3, 3, d)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    h = (centres[labels] + 2 * torch.randn(n, d, generator=generator)) @ mixing
    return h * scale + offset, labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_same_predictions_as_scikit_learn(l2: float) -> None:
    train_h, train_y = overlapping(3000, 0)
    test_h, test_y = overlapping(2000, 1)
    scaler = StandardScaler().fit(train_h.double().numpy())
    oracle = LogisticRegression(C=1 / (l2 * 3000), solver="newton-cholesky", tol=1e-8)
    oracle.fit(scaler.transform(train_h.double().numpy()), train_y.numpy())
    expected = torch.from_numpy(oracle.predict(scaler.transform(test_h.double().numpy())))
    found, info = linear_probe(train_h, train_y, test_h, classes=7, l2=l2)
    assert info["converged"], info
    assert (found == expected).double().mean() >= 0.995
    assert 0.3 < (found == test_y).double().mean() < 0.95
    logits = torch.from_numpy(oracle.decision_function(scaler.transform(train_h.double().numpy())))
    optimum = torch.nn.functional.cross_entropy(logits, train_y) + 0.5 * l2 * float((oracle.coef_**2).sum())
    assert info["loss"] == pytest.approx(float(optimum), abs=2e-6)


def test_the_bias_is_not_penalised_and_the_weights_are() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    h = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    found, info = linear_probe(h, labels, h, classes=3, l2=1e6)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert info["loss"] == pytest.approx(entropy, abs=1e-5)
    assert found.unique().tolist() == [0]


def test_the_test_rows_are_standardised_by_the_training_rows() -> None:
    train_h, train_y = overlapping(1000, 0)
    test_h, _ = overlapping(200, 1)
    found, _ = linear_probe(train_h, train_y, test_h, classes=7)
    alone = torch.cat([linear_probe(train_h, train_y, row[None], classes=7)[0] for row in test_h[:3]])
    assert torch.equal(found[:3], alone)


def test_constant_columns_change_nothing() -> None:
    train_h, train_y = overlapping(1000, 0)
    test_h, _ = overlapping(500, 1)
    found, info = linear_probe(train_h, train_y, test_h, classes=7)
    wide, wide_info = linear_probe(
        torch.cat([train_h, torch.full((1000, 3), 0.1)], 1), train_y, torch.cat([test_h, torch.zeros(500, 3)], 1), classes=7
    )
    assert (found == wide).double().mean() >= 0.995
    assert wide_info["loss"] == pytest.approx(info["loss"], abs=1e-6)


def test_inputs_stay_and_integers_do() -> None:
    train_h, train_y = overlapping(500, 0)
    before = train_h.clone()
    linear_probe(train_h, train_y, train_h, classes=7)
    assert torch.equal(train_h, before)
    pixels = torch.randint(256, (300, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = (pixels[:, 0] > 128).long()
    assert (linear_probe(pixels, y, pixels, classes=2, l2=1e-5)[0] == y).all()


def test_an_unfinished_fit_says_so() -> None:
    train_h, train_y = overlapping(500, 0)
    _, info = linear_probe(train_h, train_y, train_h, classes=7, max_iter=2)
    assert info["converged"] is False
    assert info["iterations"] == 2


def test_more_columns_than_rows_converge() -> None:
    train_h, train_y = overlapping(30, 0, d=200)
    found, info = linear_probe(train_h, train_y, train_h, classes=7, l2=1e-2)
    assert info["converged"], info
    assert torch.equal(found, train_y)
    assert info["train_top1"] == 100


def test_shuffled_labels_give_chance() -> None:
    train_h, train_y = overlapping(3000, 0)
    test_h, test_y = overlapping(2000, 1)
    shuffled = train_y[torch.randperm(3000, generator=torch.Generator().manual_seed(3))]
    control, _ = linear_probe(train_h, shuffled, test_h, classes=7)
    assert abs((control == test_y).double().mean() - 1 / 7) < 0.04


def test_it_is_deterministic() -> None:
    train_h, train_y = overlapping(500, 0)
    first, second = (linear_probe(train_h, train_y, train_h, classes=7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
