"""Run the protocols on frozen features. Their settings and measurements are plain values for the result."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features
from simclr_dist.evaluate.protocols import mlp
from simclr_dist.evaluate.protocols.knn import MOST_NEIGHBOURS, neighbours, weighted_knn
from simclr_dist.evaluate.protocols.linear import folds, linear_probe
from simclr_dist.evaluate.protocols.scores import Predict, Scores, in_blocks, score, spread
from simclr_dist.evaluate.protocols.sgd import EpochFeatures, sgd_probe
from simclr_dist.evaluate.result.file import NAMES, TRAINED, UNTRAINED
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.settings import Settings


def protocol_settings(settings: Settings, rows: int) -> dict[str, dict[str, Any]]:
    """Return the settings of each protocol, of `rows` labelled training images.

    Two results with the same ones can be compared.
    """
    l2, views = "chosen" if settings.l2 is None else settings.l2, "new crop and flip of each image in every epoch"
    every: dict[str, dict[str, Any]] = {
        "knn": {"k": settings.k or MOST_NEIGHBOURS, "temperature": settings.temperature, "similarity": "cosine"},
        "linear": {"l2": l2, "max_iter": settings.max_iter, "solver": "L-BFGS", "features": "standardised"},
        "sgd": {"epochs": settings.sgd_epochs, "views": views, "seed": settings.seed},
        "mlp": {"hidden": mlp.HIDDEN, "dropout": mlp.DROPOUT, "learning_rate": mlp.LR, "epochs": settings.mlp_epochs},
    }
    every["knn"]["k_used"] = neighbours(settings.k, rows)
    if settings.l2 is None and folds(rows) > 1:
        every["linear"]["folds"] = folds(rows)
    return {name: every[name] for name in settings.protocols}


def classify(
    features: Mapping[str, dict[str, Features]],
    classes: int,
    settings: Settings,
    *,
    sgd: dict[str, Any] | None,
    reused: Mapping[str, dict[str, Any]],
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Measure each protocol on the features. Returns {protocol: {"settings": .., "results": {kind: row}}}; {} without classes.

    `features` are those of "train" and "test" by kind. `sgd` is the row from `by_new_crops`; `reused` has rows of baselines by
    protocol. A row is `scores.Scores.to_dict` (of baselines without confusions and classes), the probe's info, and `seconds`.
    """
    if not classes:
        return {}
    results: dict[str, dict[str, Any]] = {protocol: dict(reused.get(protocol, {})) for protocol in settings.protocols}
    for kind in (RAW_PIXELS, UNTRAINED, TRAINED):
        if kind not in features["train"]:
            continue
        train, test = (features[part][kind].labelled() for part in ("train", "test"))
        for protocol, rows in results.items():
            if protocol != "sgd":
                begin = time.perf_counter()
                row = _PROTOCOLS[protocol](train, test, classes, settings)
                rows[kind] = {**row, "seconds": time.perf_counter() - begin}
            elif kind != TRAINED or sgd is None:
                continue
            else:
                rows[kind] = sgd
            say(f"{kind}: {NAMES[protocol]} {rows[kind]['top1']:.2f} % in {rows[kind]['seconds']:.0f} s")
            if kind != TRAINED:
                del rows[kind]["confusion"], rows[kind]["per_class"]
    used = protocol_settings(settings, int((features["train"][TRAINED].label >= 0).sum()))
    return {name: {"settings": values, "results": results[name]} for name, values in used.items()}


def by_new_crops(test: Features, classes: int, settings: Settings, crops: EpochFeatures) -> dict[str, Any]:
    """Measure the protocol `sgd` for the trained encoder. It needs `crops`: all training images anew in every epoch."""
    begin, test = time.perf_counter(), test.labelled()
    predict, info = sgd_probe(crops, classes=classes, epochs=settings.sgd_epochs)
    return {**_score(predict, test, classes).to_dict(), **info, "seconds": time.perf_counter() - begin}


def _score(predict: Predict, test: Features, classes: int, *, votes: bool = False) -> Scores:
    return score(in_blocks(predict, test.h, classes), test.label, votes=votes)


def _knn(train: Features, test: Features, classes: int, settings: Settings) -> dict[str, Any]:
    k = neighbours(settings.k, len(train.h))
    how: dict[str, Any] = {"k": k, "temperature": settings.temperature, "classes": classes}
    return _score(partial(weighted_knn, train.h, train.label, **how), test, classes, votes=True).to_dict()


def _linear(train: Features, test: Features, classes: int, settings: Settings) -> dict[str, Any]:
    predict, info = linear_probe(train.h, train.label, classes=classes, l2=settings.l2, max_iter=settings.max_iter)
    return {**_score(predict, test, classes).to_dict(), **info}


def _mlp(train: Features, test: Features, classes: int, settings: Settings) -> dict[str, Any]:
    """Return the means over the seeds, with their `spread`. Confusions and classes are the first seed's."""
    by_seed, info = mlp.mlp_probe(train.h, train.label, classes=classes, epochs=settings.mlp_epochs)
    runs = [_score(predict, test, classes) for predict in by_seed]
    over_seeds = spread(runs)
    means: dict[str, Any] = {name: over_seeds[name]["mean"] for name in ("top1", "mean_per_class")}
    means["interval"] = np.mean([run.interval for run in runs], axis=0).tolist()
    means["top5"] = None if runs[0].top5 is None else float(np.mean([run.top5 for run in runs]))
    return {**runs[0].to_dict(), **means, "spread": over_seeds, **info}


_PROTOCOLS = {"knn": _knn, "linear": _linear, "mlp": _mlp}
