"""Scores against scikit-learn and against resampling image by image; classes that a test set does not have."""

import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix, top_k_accuracy_score

from simclr_dist.evaluate.protocols.scores import bootstrap_interval, class_report, score, spread
from simclr_dist.system.errors import DataError


def guesses(m: int, classes: int, seed: int, right: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (m,), generator=generator)
    scores = torch.randn(m, classes, generator=generator)
    scores[torch.arange(m), labels] += right
    return scores, labels


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_same_as_scikit_learn(classes: int) -> None:
    scores, labels = guesses(700, classes, seed=0)
    predicted = scores.argmax(dim=1)
    measured = score(scores, labels)
    assert np.array_equal(measured.confusion, confusion_matrix(labels, predicted, labels=range(classes)))
    report = classification_report(labels, predicted, output_dict=True)
    for number, found in enumerate(measured.per_class):
        expected = report[str(number)]
        assert (found.precision, found.recall, found.f1) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"]), abs=1e-12
        )
        assert found.support == expected["support"]
    assert measured.images == 700
    assert measured.top1 == pytest.approx(100 * report["accuracy"], abs=1e-12)
    assert measured.mean_per_class == pytest.approx(100 * report["macro avg"]["recall"], abs=1e-12)
    if classes <= 5:
        assert measured.top5 is None
    else:
        assert measured.top5 == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5), abs=1e-12)


def test_the_text_has_scikit_learns_numbers() -> None:
    scores, labels = guesses(300, 4, seed=1)
    names = ["cat", "dog", "a rather long name", "sheep"]
    expected = classification_report(labels, scores.argmax(dim=1), target_names=names, digits=4)
    found = class_report(score(scores, labels), names)
    numbers = re.compile(r"-?\d+\.\d{4}|\b\d+\b")
    assert [numbers.findall(line) for line in found.splitlines() if line.strip()] == [
        numbers.findall(line) for line in expected.splitlines() if line.strip()
    ]
    for name in (*names, "accuracy", "macro avg", "weighted avg"):
        assert f"{name}  " in found


def test_absent_and_never_predicted_classes() -> None:
    scores = torch.tensor([[3.0, 1, 0, 2], [3, 1, 0, 2], [1, 0, 0, 3], [2, 0, 3, 1]])
    labels = torch.tensor([0, 0, 1, 2])  # 1 is taken for 3, which no image is
    measured = score(scores, labels)
    absent, missed = measured.per_class[3], measured.per_class[1]
    assert (absent.precision, absent.recall, absent.f1, absent.support) == (None, None, None, 0)
    assert (missed.precision, missed.recall, missed.f1, missed.support) == (0, 0, 0, 1)
    assert measured.confusion[1] == (0, 0, 0, 1)
    assert measured.mean_per_class == pytest.approx(100 * 2 / 3)
    lines = class_report(measured).splitlines()
    assert lines[5].split() == ["3", "-", "-", "-", "0"]
    assert lines[8].split()[2:] == ["0.6667"] * 3 + ["4"]


def test_equal_scores_rank_by_class() -> None:
    flat = score(torch.zeros(7, 7), torch.arange(7))
    assert flat.top1 == pytest.approx(100 / 7)
    assert flat.top5 == pytest.approx(500 / 7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_any_real_type_of_scores(dtype: torch.dtype) -> None:
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(10, 6)
    labels = torch.arange(10) % 6
    assert score(scores.to(dtype), labels) == score(scores.float(), labels)


def test_the_interval_is_that_of_resampled_images() -> None:
    right = torch.zeros(150, dtype=torch.bool)
    right[:97] = True
    resampled = right[torch.randint(150, (20_000, 150), generator=torch.Generator().manual_seed(0))].double().mean(dim=1)
    expected = np.percentile(100 * resampled.numpy(), [2.5, 97.5])
    assert bootstrap_interval(97, 150, resamples=20_000) == pytest.approx(expected, abs=0.7)  # one image in 150
    low, high = bootstrap_interval(97, 150)
    assert (low, high) == pytest.approx(expected, abs=1.4)
    assert (low, high) == bootstrap_interval(97, 150)
    assert (low, high) != bootstrap_interval(97, 150, seed=1)
    assert bootstrap_interval(150, 150) == (100, 100)


def test_the_dict_is_plain() -> None:
    measured = score(*guesses(50, 7, seed=0))
    plain = measured.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert sum(map(sum, plain["confusion"])) == 50
    assert set(plain) == {"images", "top1", "interval", "top5", "mean_per_class", "per_class", "confusion"}
    assert set(plain["per_class"][0]) == {"precision", "recall", "f1", "support"}


def test_spread_over_seeds() -> None:
    runs = [score(*guesses(50, 7, seed=seed)) for seed in range(3)]
    found = spread(runs)
    values = [run.top1 for run in runs]
    assert found["runs"] == 3
    assert found["top1"]["values"] == values
    assert found["top1"]["mean"] == pytest.approx(sum(values) / 3)
    assert found["top1"]["sd"] == pytest.approx(float(torch.tensor(values).double().std()))
    assert spread(runs[:1])["mean_per_class"]["sd"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores, labels = guesses(5, 3, seed=0)
    scores[2, 1] = value
    with pytest.raises(DataError, match="scores of 1 of 5 test images are not finite"):
        score(scores, labels)


@pytest.mark.parametrize(("scores", "labels"), [((0, 3), 0), ((4, 3), 5), ((4,), 4)])
def test_shapes_that_do_not_fit_are_refused(scores: tuple[int, ...], labels: int) -> None:
    with pytest.raises(ValueError, match="scores must be"):
        score(torch.zeros(scores), torch.zeros(labels, dtype=torch.int64))
