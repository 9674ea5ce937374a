"""Score predictions: top-1 with its interval, top-5, each class, and confusions."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.system.errors import DataError

ON_VALIDATION = "validation images"
DENSE = 100  # classes, up to which every cell of a confusion matrix is written
TOP = 5
AT_ONCE = 2**26  # scores that are in memory at a time: those of all rows and 21,000 classes would take gigabytes

Predict = Callable[[Tensor], Tensor]  # from features [n, d] to scores [n, classes]


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
    classes that the test set has. `interval` is the 95 % interval of top1 (`wilson_interval`): it holds what other test
    images would change, not what another training run would.
    `right` has a 1 for each image whose prediction is right, else 0, in the order of the set.
    `confusion` has a row for each class: its images by predicted class. With more than `DENSE` classes a row has only counts
    that are not 0, as {"predicted class": count}. `confusions` reads both.
    """

    images: int
    top1: float
    interval: tuple[float, float]
    top5: float | None
    mean_per_class: float
    right: str
    per_class: tuple[ClassScores, ...]
    confusion: list[list[int]] | list[dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. `per_class` is a list of dicts, in the order of the classes."""
        return {**vars(self), "interval": list(self.interval), "per_class": [vars(one).copy() for one in self.per_class]}


def confusions(confusion: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (true class, predicted class, images) of `Scores.to_dict`'s confusion matrix. Cells without images are left out."""
    for true, row in enumerate(confusion):
        for other, count in row.items() if isinstance(row, dict) else enumerate(row):
            if count:
                yield true, int(other), count


def score(scores: Tensor | Iterable[Tensor], labels: Tensor, *, votes: bool = False) -> Scores:
    """Measure scores: logits, probabilities or votes. The largest in a row is the prediction.

    Equal scores rank by class, the lower first, so that nothing depends on how a sort breaks ties.

    Args:
        scores: [m, classes] of any real type, m > 0; or the same in blocks of rows. labels: [m] int64 in [0, classes).
        votes: whether 0 is no vote: a class without one is no answer, and not among the top five.

    Raises DataError where scores are not finite.
    """
    ranks, predictions, start, broken, classes = [], [], 0, 0, 0
    labels = labels.cpu()
    for block in [scores] if isinstance(scores, Tensor) else scores:
        true = labels[start : start + len(block), None]
        if block.dim() != 2 or len(true) != len(block) or len(true) == 0:
            raise ValueError(f"scores must be [m, classes] and labels [m], got {tuple(block.shape)} and {tuple(labels.shape)}")
        block, start, classes = block.cpu(), start + len(block), block.shape[1]
        broken += int((~block.isfinite().all(dim=1)).sum())
        right = block.gather(1, true)
        rank = ((block > right) | ((block == right) & (torch.arange(classes) < true))).sum(dim=1)
        ranks.append(rank.where(right[:, 0] > 0, classes) if votes else rank)
        predictions.append(block.argmax(dim=1))  # the first of equals
    if start != len(labels):
        raise ValueError(f"scores must be [m, classes] and labels [m], got {start} rows and {tuple(labels.shape)}")
    if broken:
        why = "the probe diverged, or features are not finite; look at the encoder's training, and at the scale of its features"
        raise DataError(f"scores of {broken} of {start} test images are not finite: {why}")
    rank, prediction = torch.cat(ranks), torch.cat(predictions)
    per_class, hits = _per_class(labels, prediction, classes), int((rank == 0).sum())
    return Scores(
        images=start,
        top1=100 * hits / start,
        interval=wilson_interval(hits, start),
        top5=100 * int((rank < TOP).sum()) / start if classes > TOP else None,
        mean_per_class=100 * float(np.mean([one.recall for one in per_class if one.recall is not None])),
        right="".join("01"[hit] for hit in (rank == 0).tolist()),
        per_class=per_class,
        confusion=_confusion(labels, prediction, classes),
    )


def in_blocks(predict: Predict, h: Tensor, classes: int) -> Iterator[Tensor]:
    """Predict scores block by block. `h` is [n, d]; at most `AT_ONCE` scores are in memory."""
    return map(predict, h.split(max(1, AT_ONCE // classes)))


def top1(predict: Predict, h: Tensor, labels: Tensor, classes: int) -> float:
    """Return the top-1 accuracy in percent."""
    predictions = torch.cat([block.argmax(dim=1) for block in in_blocks(predict, h, classes)])
    return 100 * int((predictions == labels).sum()) / len(labels)


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of the accuracy, in percent. `right` of the `images` answers are right.

    Wilson 1927: the accuracies from which `right` is at most 1.96 standard deviations away. Unlike that of resampled images it
    has a width where all or none are right.
    """
    z, share = NormalDist().inv_cdf(0.975), right / images
    centre, half = share + z * z / (2 * images), z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    low, high = ((centre + side) / (1 + z * z / images) for side in (-half, half))
    return 100 * low if right else 0.0, 100 * high if right < images else 100.0


def paired_difference(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """Compare two classifiers on the same test images. `ours` and `theirs` are `Scores.right`, a text a run.

    Returns `points` (ours minus theirs, in percentage points), `interval` (95 %, by 10,000 resamples of the images, each with
    its two answers), and on how many images ours is `better` and `worse`. What another training would change is not in it.
    """
    mine, other = (
        np.mean([np.frombuffer(run.encode(), dtype=np.uint8) == ord("1") for run in runs], axis=0) for runs in (ours, theirs)
    )
    values, counts = np.unique(mine - other, return_counts=True)
    drawn = np.random.Generator(np.random.PCG64(0)).multinomial(len(mine), counts / len(mine), size=10_000)
    low, high = np.quantile(100 * drawn @ values / len(mine), (0.025, 0.975)).tolist()
    sides = {"better": int((mine > other).sum()), "worse": int((mine < other).sum())}
    return {"points": 100 * float(np.mean(mine - other)), "interval": [low, high], **sides}


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


def _per_class(labels: Tensor, predictions: Tensor, classes: int) -> tuple[ClassScores, ...]:
    counted = (labels[labels == predictions], labels, predictions)
    counts = zip(*(one.bincount(minlength=classes).tolist() for one in counted), strict=True)
    return tuple(
        ClassScores(right / max(predicted, 1), right / support, 2 * right / (support + predicted), support)
        if support
        else ClassScores(None, None, None, 0)
        for right, support, predicted in counts
    )


def _confusion(labels: Tensor, predictions: Tensor, classes: int) -> list[list[int]] | list[dict[str, int]]:
    cells, counts = (labels * classes + predictions).unique(return_counts=True)
    if classes <= DENSE:
        dense = torch.zeros(classes * classes, dtype=torch.int64).index_put((cells,), counts)
        rows: list[list[int]] = dense.view(classes, classes).tolist()
        return rows
    sparse: list[dict[str, int]] = [{} for _ in range(classes)]
    for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
        sparse[cell // classes][str(cell % classes)] = count
    return sparse
