"""The linear probe against scikit-learn's logistic regression, on easy and on badly conditioned features."""

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluated import scored
from simclr_dist.evaluate import space
from simclr_dist.evaluate.protocols import linear
from simclr_dist.evaluate.protocols.linear import L2_GRID, choose_l2, linear_probe, stratified_split
from simclr_dist.system.errors import DataError

L2 = 1e-2


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
    logits, info = scored(linear_probe, (train_h, train_y), test_h, classes=7, l2=l2)
    found = logits.argmax(dim=1)
    assert (logits.shape, logits.dtype) == ((2000, 7), torch.float32)
    assert info["converged"], info
    assert (found == expected).double().mean() >= 0.995
    assert 0.3 < (found == test_y).double().mean() < 0.95
    best = torch.from_numpy(oracle.decision_function(scaler.transform(train_h.double().numpy())))
    optimum = torch.nn.functional.cross_entropy(best, train_y) + 0.5 * l2 * float((oracle.coef_**2).sum())
    assert info["loss"] == pytest.approx(float(optimum), abs=2e-6)


def test_few_rows_of_many_columns_are_scikit_learns_too() -> None:
    """They are fitted in the space that they span; the rows asked about lie out of it."""
    train_h, train_y = overlapping(60, 0, d=400, classes=3)
    test_h, _ = overlapping(500, 1, d=400, classes=3)
    scaler = StandardScaler().fit(train_h.double().numpy())
    oracle = LogisticRegression(C=1 / (L2 * 60), solver="lbfgs", tol=1e-9, max_iter=20_000)
    oracle.fit(scaler.transform(train_h.double().numpy()), train_y.numpy())
    logits, info = scored(linear_probe, (train_h, train_y), test_h, classes=3, l2=L2)
    assert info["converged"], info
    expected = torch.from_numpy(oracle.predict_proba(scaler.transform(test_h.double().numpy())))
    assert (logits.double().softmax(1) - expected).abs().max() < 1e-2


def test_the_bias_is_not_penalised_and_the_weights_are() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    h = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    found, info = scored(linear_probe, (h, labels), h, classes=3, l2=1e6)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert info["loss"] == pytest.approx(entropy, abs=1e-5)
    assert found.argmax(dim=1).unique().tolist() == [0]


def test_the_test_rows_are_standardised_by_the_training_rows() -> None:
    train_h, train_y = overlapping(1000, 0)
    test_h, _ = overlapping(200, 1)
    found, _ = scored(linear_probe, (train_h, train_y), test_h, classes=7, l2=L2)
    alone = torch.cat([scored(linear_probe, (train_h, train_y), row[None], classes=7, l2=L2)[0] for row in test_h[:3]])
    torch.testing.assert_close(found[:3], alone)


def test_constant_columns_change_nothing() -> None:
    train_h, train_y = overlapping(1000, 0)
    test_h, _ = overlapping(500, 1)
    found, info = scored(linear_probe, (train_h, train_y), test_h, classes=7, l2=L2)
    constant = torch.tensor([0.1, -1e4, 0.0])
    wide, wide_info = scored(
        linear_probe,
        (torch.cat([train_h, constant.expand(1000, 3)], 1), train_y),
        torch.cat([test_h, constant.add(1e-3).expand(500, 3)], 1),
        classes=7,
        l2=L2,
    )
    assert (found.argmax(dim=1) == wide.argmax(dim=1)).double().mean() >= 0.995
    assert wide_info["loss"] == pytest.approx(info["loss"], abs=1e-6)


def test_inputs_stay_and_integers_do() -> None:
    train_h, train_y = overlapping(500, 0)
    before = train_h.clone()
    scored(linear_probe, (train_h, train_y), train_h, classes=7, l2=L2)
    assert torch.equal(train_h, before)
    pixels = torch.randint(256, (300, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = (pixels[:, 0] > 128).long()
    assert (scored(linear_probe, (pixels, y), pixels, classes=2, l2=1e-5)[0].argmax(dim=1) == y).all()


def test_an_unfinished_fit_says_so() -> None:
    train_h, train_y = overlapping(500, 0)
    _, info = scored(linear_probe, (train_h, train_y), train_h, classes=7, l2=L2, max_iter=2)
    assert info["converged"] is False
    assert info["iterations"] == 2


def test_more_columns_than_rows_converge() -> None:
    train_h, train_y = overlapping(30, 0, d=200)
    found, info = scored(linear_probe, (train_h, train_y), train_h, classes=7, l2=1e-2)
    assert info["converged"], info
    assert torch.equal(found.argmax(dim=1), train_y)
    assert info["train_top1"] == 100


def test_shuffled_labels_give_chance() -> None:
    train_h, train_y = overlapping(3000, 0)
    test_h, test_y = overlapping(2000, 1)
    # The test labels are in random order too: rows of a class share one prediction, and how many of them are right by luck
    # is no binomial number.
    generator = torch.Generator().manual_seed(3)
    shuffled, test_y = train_y[torch.randperm(3000, generator=generator)], test_y[torch.randperm(2000, generator=generator)]
    control, _ = scored(linear_probe, (train_h, shuffled), test_h, classes=7)  # with a choice of l2, which could leak too
    low, high = binom.interval(0.999, 2000, 1 / 7)
    assert low <= int((control.argmax(dim=1) == test_y).sum()) <= high


def test_features_in_files_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train_h, train_y = overlapping(500, 0)
    in_memory = scored(linear_probe, (train_h, train_y), train_h, classes=7)
    monkeypatch.setattr(space, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    in_files = scored(linear_probe, (train_h, train_y), train_h, classes=7)
    assert torch.equal(in_memory[0], in_files[0])
    assert in_memory[1] == in_files[1]


def test_it_is_deterministic() -> None:
    train_h, train_y = overlapping(500, 0)
    first, second = (scored(linear_probe, (train_h, train_y), train_h, classes=7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("few", [True, False])
def test_the_choice_is_the_best_of_the_grid_on_held_out_training_rows(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are held out once each, and the cross-entropy decides; of many a fifth is, and top-1 does."""
    monkeypatch.setattr(linear, "FEW", 401 if few else 400)
    generator = torch.Generator().manual_seed(0)
    train_y = torch.randint(7, (400,), generator=generator)
    train_h = torch.randn(400, 60, generator=generator)  # so much noise that a weak penalty learns it
    train_h[torch.arange(400), train_y] += 1.5
    choice = choose_l2(train_h, train_y, classes=7, seed=3)
    folds = range(5 if few else 1)
    splits = [stratified_split(train_y, share=0.2, seed=3, fold=fold) for fold in folds]
    rows = torch.cat([held_out for _, held_out in splits])
    assert (choice["folds"], choice["validation_rows"]) == (len(folds), len(rows))
    assert len(rows.unique()) == (400 if few else 80)
    top1, loss = [], []
    for l2 in choice["grid"]:  # each from zero and to the end, by the public probe
        fits = [scored(linear_probe, (train_h[fit], train_y[fit]), train_h[out], classes=7, l2=l2)[0] for fit, out in splits]
        logits = torch.cat(fits)
        top1.append(100 * float((logits.argmax(dim=1) == train_y[rows]).double().mean()))
        loss.append(float(torch.nn.functional.cross_entropy(logits.double(), train_y[rows])))
    row = 100 / len(rows)
    assert choice["validation_top1"] == pytest.approx(top1, abs=3.01 * row)  # the fits of the choice end a little earlier
    assert choice["validation_loss"] == pytest.approx(loss, rel=0.01)
    worse = choice["validation_loss"] if few else [-value for value in choice["validation_top1"]]
    best, second = sorted(range(len(worse)), key=worse.__getitem__)[:2]
    assert (choice["l2"], choice["runner_up"]) == (choice["grid"][best], choice["grid"][second])
    assert choice["margin"] == pytest.approx(worse[second] - worse[best], abs=1e-9)
    assert choice["margin_error"] > 0
    assert max(top1) > top1[-1] + 2 * row  # so the choice matters
    assert not choice["at_edge"]
    assert (len(choice["grid"]) == len(L2_GRID)) != few, "of few, what overfits more and more is left out"


def test_the_split_of_few_rows_hardly_matters() -> None:
    """By the top-1 of a fifth of 150 rows the seeds' choices lie decades apart."""
    h, labels = overlapping(150, 0)
    chosen = [math.log10(choose_l2(h, labels, classes=7, seed=seed)["l2"]) for seed in range(8)]
    assert max(chosen) - min(chosen) < 0.6  # neighbours on the grid


def test_the_chosen_fit_is_that_of_the_same_value_given() -> None:
    train_h, train_y = overlapping(600, 0)
    test_h, _ = overlapping(200, 1)
    chosen, info = scored(linear_probe, (train_h, train_y), test_h, classes=7, seed=5)
    assert info["choice"]["seed"] == 5
    assert info["choice"]["grid"] == list(L2_GRID)[: len(info["choice"]["grid"])]
    given, given_info = scored(linear_probe, (train_h, train_y), test_h, classes=7, l2=info["l2"])
    assert torch.equal(chosen, given)
    assert given_info == {**info, "choice": None}


def test_a_best_value_at_the_end_of_the_grid_is_told() -> None:
    train_h, train_y = overlapping(600, 0)
    assert choose_l2(train_h, train_y, classes=7, grid=[1e3, 1e4])["at_edge"]


def test_the_split_is_stratified_seeded_and_complete() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3] * 2 + [5])[
        torch.randperm(66, generator=torch.Generator().manual_seed(0))
    ]
    parts = [stratified_split(labels, share=0.2, seed=0, fold=fold) for fold in range(5)]
    assert sorted(row for _, part in parts for row in part.tolist()) == sorted(torch.nonzero(labels != 5)[:, 0].tolist())
    for fit, _ in parts:
        assert torch.bincount(labels[fit], minlength=6)[[0, 1, 2, 3, 5]].min() == 1
    fit, held_out = parts[0]
    assert torch.cat([fit, held_out]).sort().values.tolist() == list(range(66))
    assert torch.bincount(labels[held_out], minlength=6).tolist() == [10, 2, 1, 0, 0, 0]
    assert fit.tolist() == sorted(fit.tolist())
    again, other = (stratified_split(labels, share=0.2, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(held_out, again)
    assert not torch.equal(held_out, other)


def test_too_few_rows_to_choose_on_are_refused_and_l2_helps() -> None:
    train_h, train_y = torch.eye(4), torch.arange(4)
    with pytest.raises(DataError, match=r"4 labelled training images are too few to choose l2 on.*give l2"):
        scored(linear_probe, (train_h, train_y), train_h, classes=4)
    logits, _ = scored(linear_probe, (train_h, train_y), train_h, classes=4, l2=1e-2)
    assert torch.equal(logits.argmax(dim=1), train_y)


def test_of_two_rows_a_class_each_is_held_out_once() -> None:
    """The first of the five folds has none of them."""
    choice = choose_l2(torch.eye(6), torch.arange(6) % 3, classes=3)
    assert (choice["validation_rows"], choice["folds"]) == (6, 5)


@pytest.mark.parametrize(("l2", "max_iter"), [(-1.0, 5), (1.0, 0)])
def test_senseless_settings_are_refused(l2: float, max_iter: int) -> None:
    with pytest.raises(ValueError, match="l2 must not be negative"):
        scored(linear_probe, (torch.eye(2), torch.tensor([0, 1])), torch.eye(2), classes=2, l2=l2, max_iter=max_iter)


def test_many_more_columns_than_rows() -> None:
    """Raw pixels of a small set: the Hessian at zero has hardly a rank, and the weakest penalties no help to give."""
    generator = torch.Generator().manual_seed(5)
    smooth = torch.randn(120, 12, generator=generator) @ torch.randn(12, 3072, generator=generator)
    pixels = (smooth + 0.01 * torch.randn(120, 3072, generator=generator)).mul(20).add(128).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(120) % 2
    logits, info = scored(linear_probe, (pixels, labels), pixels[:30], classes=2)
    assert logits.isfinite().all()
    assert info["choice"]["l2"] in info["choice"]["grid"]
