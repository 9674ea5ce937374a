"""Scores against scikit-learn and scipy; ties; classes that a test set does not have, and many of them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix, top_k_accuracy_score

from simclr_dist.evaluate.classify import by_new_crops, classify
from simclr_dist.evaluate.features.extraction import Features
from simclr_dist.evaluate.protocols import mlp
from simclr_dist.evaluate.protocols.mlp import classifier
from simclr_dist.evaluate.protocols.scores import class_report, confusions, in_blocks, score, spread, top1, wilson_interval
from simclr_dist.evaluate.result.file import TRAINED, write_result
from simclr_dist.evaluate.settings import Settings
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
    assert measured.confusion[1] == [0, 0, 0, 1]
    assert measured.mean_per_class == pytest.approx(100 * 2 / 3)
    lines = class_report(measured).splitlines()
    assert lines[5].split() == ["3", "-", "-", "-", "0"]
    assert lines[8].split()[2:] == ["0.6667"] * 3 + ["4"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_of_equal_scores_the_lower_class_ranks_first(dtype: torch.dtype) -> None:
    """Where all are equal, where two or three best ones are, and where the fifth and sixth are."""
    all_equal = score(torch.zeros(4, 7, dtype=dtype), torch.tensor([0, 1, 4, 5]))
    assert (all_equal.top1, all_equal.top5) == (25, 75)
    assert [row[0] for row in all_equal.confusion] == [1, 1, 0, 0, 1, 1, 0]
    best = torch.tensor([[1, 5, 5, 0, 0, 5, 0]], dtype=dtype).expand(3, 7)
    two_of_three = score(best, torch.tensor([1, 2, 5]))
    assert two_of_three.top1 == pytest.approx(100 / 3)
    assert [row[1] for row in two_of_three.confusion] == [0, 1, 1, 0, 0, 1, 0]
    last = torch.tensor([[9, 1, 8, 1, 7, 6]], dtype=dtype).expand(2, 6)
    assert score(last, torch.tensor([1, 3])).top5 == 50
    assert top1(lambda h: h, best, torch.tensor([1, 1, 5]), 7) == pytest.approx(200 / 3)


@pytest.mark.parametrize("protocol", ["knn", "linear", "sgd", "mlp"])
def test_every_protocol_sends_a_tie_to_the_lower_class(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of zeros, two of each class: every vote and every logit is equal."""

    def zero(*shape: int) -> torch.nn.Module:
        network = classifier(*shape)
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        return network

    monkeypatch.setattr(mlp, "classifier", zero)
    train = Features(torch.zeros(16, 4), torch.arange(16) % 8, torch.arange(16))
    test = Features(torch.zeros(4, 4), torch.tensor([0, 1, 4, 5]), torch.arange(4))
    how: dict[str, Any] = {"knn": {"k": 16}, "linear": {"l2": 1e-3}}.get(protocol, {})
    settings = Settings(protocols=(protocol,), **how)  # type: ignore[arg-type]
    by_kind = {"train": {TRAINED: train}, "test": {TRAINED: test}}
    sgd = by_new_crops(test, 8, settings, lambda _: (train.h, train.label))
    row = classify(by_kind, 8, settings, given={"sgd": {TRAINED: sgd}}, say=print)[protocol]["results"][TRAINED]
    assert (row["top1"], row["top5"]) == (25, 75)
    assert [counts[0] for counts in row["confusion"]] == [1, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("classes", [7, 150])
def test_blocks_of_rows_count_as_the_whole(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = guesses(50, classes, seed=0)
    monkeypatch.setattr("simclr_dist.evaluate.protocols.scores.AT_ONCE", 16 * classes)
    blocks = list(in_blocks(lambda h: h, scores, classes))
    assert [len(block) for block in blocks] == [16, 16, 16, 2]
    assert score(blocks, labels) == score(scores, labels)
    assert top1(lambda h: h, scores, labels, classes) == score(scores, labels).top1
    with pytest.raises(ValueError, match="got 48 rows"):
        score(blocks[:3], labels)


def test_what_is_kept_grows_with_the_classes_and_not_with_their_square(tmp_path: Path) -> None:
    """21,000 classes: nothing of 21,000 x 21,000 in time, memory or JSON."""
    labels = torch.arange(0, 21_000, 7)
    guess = torch.where(labels % 3 == 0, labels, 0)
    blocks = (torch.nn.functional.one_hot(rows, 21_000).bfloat16() for rows in guess.split(500))
    measured = score(blocks, labels)
    assert (measured.top1, len(measured.per_class)) == (pytest.approx(100 / 3), 21_000)
    assert sum(map(len, measured.confusion)) == 3_000
    assert list(confusions(measured.confusion))[:4] == [(0, 0, 1), (7, 0, 1), (14, 0, 1), (21, 21, 1)]
    path = tmp_path / "result.json"
    write_result(path, measured.to_dict())
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_any_real_type_of_scores(dtype: torch.dtype) -> None:
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(10, 6)
    labels = torch.arange(10) % 6
    assert score(scores.to(dtype), labels) == score(scores.float(), labels)


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [
        (10, 10, 72.246720014, 100),
        (0, 10, 0, 27.753279986),
        (1, 1, 20.654931438, 100),
        (0, 1, 0, 79.345068562),
        (97, 150, 56.738137922, 71.862734910),
        (1, 7, 2.567962434, 51.312782927),
        (9_999, 10_000, 99.943373110, 99.998234733),
        (25_000, 50_000, 49.561755564, 50.438244436),
    ],
)
def test_the_interval_is_wilsons(right: int, images: int, low: float, high: float) -> None:
    """Constants are of scipy's binomtest(right, images).proportion_ci(method="wilson")."""
    found = wilson_interval(right, images)
    assert found == pytest.approx((low, high), abs=1e-8)
    assert 0 <= found[0] <= 100 * right / images <= found[1] <= 100
    labels = torch.zeros(images, dtype=torch.int64)
    scores = torch.tensor([1.0, 0]).repeat(images, 1)
    scores[right:] = torch.tensor([0.0, 1])
    assert score(scores, labels).interval == found


def test_the_dict_is_plain() -> None:
    measured = score(*guesses(50, 7, seed=0))
    plain = measured.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert sum(map(sum, plain["confusion"])) == 50
    assert set(plain) == {"images", "top1", "interval", "top5", "mean_per_class", "right", "per_class", "confusion"}
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
