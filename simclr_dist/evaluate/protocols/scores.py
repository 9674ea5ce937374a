"""Score predictions: top-1 with its interval, top-5, each class, and confusions."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.system.errors import DataError

RESAMPLES = 1000
DENSE = 100  # classes, up to which every cell of a confusion matrix is written
TOP = 5


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """One class, as in scikit-learn's classification_report. Fractions are of 1; `support` is its images in the test set.

    Precision is 0 where the class is never predicted. A class without test images has nothing to be measured on: its
    three fractions are None.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of predictions for `images` test images; percentages in [0, 100].

    `top5` is None up to five classes, where it would always be right. `mean_per_class` is the mean recall of the
    classes that the test set has. `interval` is the 95 % bootstrap interval of top1 over `RESAMPLES` resamples of the
    test images: it holds what other test images would change, not what another training run would.
    `confusion[i][j]` counts images of class i that were taken for class j.
    """

    images: int
    top1: float
    interval: tuple[float, float]
    top5: float | None
    mean_per_class: float
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. `per_class` is a list of dicts, in the order of the classes.

        `confusion` has a row for each class: its counts by predicted class. With more than `DENSE` classes a row has only those
        that are not 0, as {"predicted class": count}. `confusions` reads both.
        """
        confusion = [
            list(row) if len(row) <= DENSE else {str(other): count for other, count in enumerate(row) if count}
            for row in self.confusion
        ]
        plain = {"interval": list(self.interval), "per_class": [vars(one).copy() for one in self.per_class]}
        return {**vars(self), **plain, "confusion": confusion}


def confusions(confusion: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (true class, predicted class, images) of `Scores.to_dict`'s confusion matrix. Cells without images are left out."""
    for true, row in enumerate(confusion):
        for other, count in row.items() if isinstance(row, dict) else enumerate(row):
            if count:
                yield true, int(other), count


def score(scores: Tensor, labels: Tensor) -> Scores:
    """Measure a score matrix: logits, probabilities or votes. The largest in a row is the prediction.

    Equal scores rank by class, the lower first, so that nothing depends on how a sort breaks ties.

    Args:
        scores: [m, classes] of any real type, m > 0. labels: [m] int64 in [0, classes).

    Raises DataError where scores are not finite.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"scores must be [m, classes] and labels [m], got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if bool((broken := ~scores.isfinite().all(dim=1)).any()):
        why = "the probe diverged, or features are not finite; look at the encoder's training, and at the scale of its features"
        raise DataError(f"scores of {int(broken.sum())} of {len(scores)} test images are not finite: {why}")
    scores, labels = scores.cpu(), labels.cpu()
    classes, true = scores.shape[1], scores.gather(1, labels[:, None])
    lower = torch.arange(classes) < labels[:, None]
    rank = ((scores > true) | ((scores == true) & lower)).sum(dim=1)
    predictions = scores.argmax(dim=1)  # the first of equals
    confusion = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes).numpy()
    per_class, right = _per_class(confusion), int((rank == 0).sum())
    return Scores(
        images=len(labels),
        top1=100 * right / len(labels),
        interval=bootstrap_interval(right, len(labels)),
        top5=100 * int((rank < TOP).sum()) / len(labels) if classes > TOP else None,
        mean_per_class=100 * float(np.mean([one.recall for one in per_class if one.recall is not None])),
        per_class=per_class,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )


def bootstrap_interval(right: int, images: int, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the accuracy, in percent. Accuracy is the share of right answers.

    A resample draws `images` images with replacement. How many of them are right is, exactly, a binomial number: that
    is what is drawn, in place of the images.
    """
    drawn = np.random.default_rng(seed).binomial(images, right / images, size=resamples)
    low, high = np.percentile(100 * drawn / images, [2.5, 97.5])
    return float(low), float(high)


def spread(runs: Sequence[Scores]) -> dict[str, Any]:
    """Summarise `top1` and `mean_per_class` over seeds, in percent. Mean and sample standard deviation (None for one run)."""
    summary: dict[str, Any] = {"runs": len(runs)}
    for name in ("top1", "mean_per_class"):
        values = [float(getattr(run, name)) for run in runs]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[name] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return summary


def class_report(scores: Scores, names: Sequence[str] | None = None) -> str:
    """Format scikit-learn's classification_report. It has a line per class, then accuracy, macro and weighted average.

    Averages are over the classes that the test set has; a class without test images shows dashes. Without `names`,
    classes are numbers.
    """
    names = [str(number) for number in range(len(scores.per_class))] if names is None else names
    present = [one for one in scores.per_class if one.support]
    fractions = np.array([(one.precision, one.recall, one.f1) for one in present], dtype=np.float64)
    macro, weighted = (
        np.average(fractions, axis=0, weights=weights).tolist() for weights in (None, [one.support for one in present])
    )
    width = max(len("weighted avg"), *map(len, names))
    lines = [f"{'':>{width}}  precision  recall      f1  support", ""]
    for name, one in zip(names, scores.per_class, strict=True):
        lines.append(_line(name, width, (one.precision, one.recall, one.f1), one.support))
    lines += [
        "",
        f"{'accuracy':>{width}}  {'':9}  {'':6}  {scores.top1 / 100:6.4f}  {scores.images:7d}",
        _line("macro avg", width, macro, scores.images),
        _line("weighted avg", width, weighted, scores.images),
    ]
    return "\n".join(lines)


def _line(name: str, width: int, fractions: Sequence[float | None], support: int) -> str:
    precision, recall, f1 = ("-" if value is None else f"{value:.4f}" for value in fractions)
    return f"{name:>{width}}  {precision:>9}  {recall:>6}  {f1:>6}  {support:7d}"


def _per_class(confusion: np.ndarray[Any, Any]) -> tuple[ClassScores, ...]:
    counts = zip(confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist(), strict=True)
    return tuple(
        ClassScores(right / max(predicted, 1), right / support, 2 * right / (support + predicted), support)
        if support
        else ClassScores(None, None, None, 0)
        for right, support, predicted in counts
    )
