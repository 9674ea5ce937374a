"""What predictions are worth: top-1 with its interval, top-5, each class, and which class is taken for which."""

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
    """One class, as in scikit-learn's classification_report: fractions of 1, and its images in the test set.

    Precision is 0 where the class is never predicted. A class without test images has nothing to be measured on: its
    three fractions are None.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """How right a score matrix is about `images` test images; percentages in [0, 100].

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
        """Plain values for JSON, names as here; `per_class` is a list of dicts, in the order of the classes.

        `confusion` has a row for each class: counts by predicted class, of more than `DENSE` classes those that are not 0 as
        {"predicted class": count}. `confusions` reads both.
        """
        plain = dataclasses.asdict(self)
        plain["interval"] = list(self.interval)
        plain["per_class"] = [dataclasses.asdict(one) for one in self.per_class]
        plain["confusion"] = [
            list(row) if len(row) <= DENSE else {str(other): count for other, count in enumerate(row) if count}
            for row in self.confusion
        ]
        return plain


def confusions(confusion: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """(true class, predicted class, images) of `Scores.to_dict`'s confusion matrix, where there are images."""
    for own, row in enumerate(confusion):
        for other, count in row.items() if isinstance(row, dict) else enumerate(row):
            if count:
                yield own, int(other), count


def score(scores: Tensor, labels: Tensor, *, seed: int = 0) -> Scores:
    """Measures a score matrix: logits, probabilities or votes, of which the largest in a row is the prediction.

    Equal scores rank by class, the lower first, so that nothing depends on how a sort breaks ties.

    Args:
        scores: [m, classes] of any real type, m > 0. labels: [m] int64 in [0, classes). seed: of the resamples.

    Raises DataError where scores are not finite.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"scores must be [m, classes] and labels [m], got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if bool((broken := ~scores.isfinite().all(dim=1)).any()):
        raise DataError(
            f"scores of {int(broken.sum())} of {len(scores)} test images are not finite: the probe diverged, or features "
            "are not finite; look at the encoder's training, and at the scale of its features"
        )
    scores, labels = scores.cpu(), labels.cpu()
    classes, own = scores.shape[1], scores.gather(1, labels[:, None])
    lower = torch.arange(classes) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    predictions = scores.argmax(dim=1)  # the first of equals
    confusion = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes).numpy()
    per_class = _per_class(confusion)
    right = int((rank == 0).sum())
    return Scores(
        images=len(labels),
        top1=100 * right / len(labels),
        interval=bootstrap_interval(right, len(labels), seed=seed),
        top5=100 * int((rank < TOP).sum()) / len(labels) if classes > TOP else None,
        mean_per_class=100 * float(np.mean([one.recall for one in per_class if one.recall is not None])),
        per_class=per_class,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )


def bootstrap_interval(right: int, images: int, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the share of right answers, in percent.

    A resample draws `images` images with replacement. How many of them are right is, exactly, a binomial number: that
    is what is drawn, in place of the images.
    """
    drawn = np.random.default_rng(seed).binomial(images, right / images, size=resamples)
    low, high = np.percentile(100 * drawn / images, [2.5, 97.5])
    return float(low), float(high)


def spread(runs: Sequence[Scores]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single run) over seeds, in percent, of `top1` and `mean_per_class`."""
    found: dict[str, Any] = {"runs": len(runs)}
    for name in ("top1", "mean_per_class"):
        values = [float(getattr(run, name)) for run in runs]
        found[name] = {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "values": values,
        }
    return found


def class_report(scores: Scores, names: Sequence[str] | None = None) -> str:
    """The table of scikit-learn's classification_report: a line per class, then accuracy, macro and weighted average.

    Averages are over the classes that the test set has; a class without test images shows dashes. Without `names`,
    classes are numbers.
    """
    names = [str(number) for number in range(len(scores.per_class))] if names is None else names
    present = [one for one in scores.per_class if one.support]
    macro, weighted = (
        tuple(
            float(np.average([getattr(one, field) for one in present], weights=weights))
            for field in ("precision", "recall", "f1")
        )
        for weights in (None, [one.support for one in present])
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
    found = []
    for right, support, predicted in zip(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0), strict=True):
        if support == 0:
            found.append(ClassScores(None, None, None, 0))
        else:
            precision = float(right / predicted) if predicted else 0.0
            found.append(ClassScores(precision, float(right / support), float(2 * right / (support + predicted)), int(support)))
    return tuple(found)
