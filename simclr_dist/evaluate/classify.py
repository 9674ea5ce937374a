"""Run the protocols on frozen features. Their settings and measurements are plain values for the result."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features
from simclr_dist.evaluate.protocols import mlp
from simclr_dist.evaluate.protocols.knn import GRID, MOST_NEIGHBOURS, TEMPERATURE, neighbours, weighted_knn
from simclr_dist.evaluate.protocols.linear import folds, linear_probe
from simclr_dist.evaluate.protocols.scores import ON_VALIDATION, Predict, Scores, in_blocks, score, spread, top1
from simclr_dist.evaluate.protocols.sgd import EpochFeatures, sgd_probe
from simclr_dist.evaluate.protocols.subsets import Rows
from simclr_dist.evaluate.result.file import TRAINED, UNTRAINED, title
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.rows import copied
from simclr_dist.evaluate.settings import SUBSETS, Settings
from simclr_dist.system.progress import Progress

Labelled = tuple[Tensor, Tensor]  # features [n, d], and labels of all
_Probes = tuple[list[Predict], dict[str, Any]]  # several where there are several seeds, and what they say of themselves


def protocol_settings(settings: Settings, rows: int, *, chosen: bool = False) -> dict[str, dict[str, Any]]:
    """Return the settings of each measurement, by its name. `rows` labelled images are for training.

    Two results with the same ones can be compared. `chosen` ones are by validation images, where they are not set.
    """
    views, choosing = "new crop and flip of each image in every epoch", settings.choosing if chosen else ()
    every, l2 = {}, "chosen" if settings.l2 is None else settings.l2
    usual: tuple[Any, Any] = ("chosen", "chosen") if chosen else (MOST_NEIGHBOURS, TEMPERATURE)
    for name, protocol, share in settings.measured:
        k, temperature = settings.k or usual[0], settings.temperature or usual[1]
        several = "knn" in choosing or share < 1  # of a part, each row has its k and folds
        k_used = None if several else neighbours(settings.k, rows)
        kinds: dict[str, dict[str, Any]] = {
            "knn": {"k": k, "temperature": temperature, "similarity": "cosine", "k_used": k_used},
            "linear": {"l2": l2, "max_iter": settings.max_iter, "solver": "L-BFGS", "features": "standardised"},
            "sgd": {"epochs": settings.sgd_epochs, "views": views, "seed": settings.seed},
            "mlp": {"hidden": mlp.HIDDEN, "dropout": mlp.DROPOUT, "learning_rate": mlp.LR, "epochs": settings.mlp_epochs},
            "finetune": {"epochs": settings.finetune_epochs or "the paper's"},
        }
        one = kinds[protocol]
        if protocol == "linear" and settings.l2 is None and not chosen and share == 1 and folds(rows) > 1:
            one["folds"] = folds(rows)
        if share < 1 or protocol == "finetune":
            one |= {"labels": share, "seeds": SUBSETS}
        every[name] = one | ({"chosen_on": ON_VALIDATION} if protocol in choosing else {})
    return every


def classify(
    features: Mapping[str, dict[str, Features]],
    classes: int,
    settings: Settings,
    *,
    given: Mapping[str, dict[str, Any]],
    subsets: Mapping[float, Sequence[Rows]] | None = None,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Measure each protocol on the features. Returns {name: {"settings": .., "results": {kind: row}}}; {} without classes.

    `features` are those of "train", "test" and, if it shall choose, "val", by kind. `given` has rows by name and kind that are
    measured already (baselines), or not on these features (sgd, finetune). `subsets` are the training rows of each share of
    the labels. A row is as `row_of` has it (of baselines without confusions and classes), with `seconds`.
    """
    if not classes:
        return {}
    results: dict[str, dict[str, Any]] = {name: dict(given.get(name, {})) for name, _, _ in settings.measured}
    for kind in (RAW_PIXELS, UNTRAINED, TRAINED):
        if kind not in features["train"]:
            continue
        every, test = features["train"][kind], features["test"][kind].labelled()
        val = labelled(features["val"][kind]) if "val" in features else None
        for name, protocol, share in settings.measured:
            what = f"{kind.replace('_', ' ')}, {title(name)}"
            if protocol in _PROTOCOLS:
                begin, runs, infos = time.perf_counter(), [], []
                by = val if protocol in settings.choosing else None
                for rows in [None] if share == 1 else (subsets or {})[share]:
                    train = labelled(every) if rows is None else (copied(every.h, torch.from_numpy(rows)), every.label[rows])
                    with Progress(what):
                        predictions, info = _PROTOCOLS[protocol](*train, by, classes, settings)
                    runs += [_score(one, test, classes, votes=protocol == "knn") for one in predictions]
                    infos.append(info)
                results[name][kind] = {**row_of(runs, infos), "seconds": time.perf_counter() - begin}
            if kind in results[name]:
                say(f"{what}: {results[name][kind]['top1']:.2f} % in {results[name][kind]['seconds']:.0f} s")
    for row in (row for rows in results.values() for kind, row in rows.items() if kind != TRAINED):
        row.pop("confusion", None)
        row.pop("per_class", None)
    images = int((features["train"][TRAINED].label >= 0).sum())
    used = protocol_settings(settings, images, chosen="val" in features)
    return {name: {"settings": values, "results": results[name]} for name, values in used.items()}


def labelled(features: Features) -> Labelled:
    """Return features and labels of the images that have one."""
    return (one := features.labelled()).h, one.label


def by_new_crops(test: Features, classes: int, settings: Settings, crops: EpochFeatures) -> dict[str, Any]:
    """Measure the protocol `sgd` for the trained encoder. It needs `crops`: all training images anew in every epoch."""
    begin, epochs = time.perf_counter(), settings.sgd_epochs
    with Progress("trained, SGD", epochs, "epochs") as shown:

        def train(epoch: int) -> Labelled:
            shown.done = epoch
            return crops(epoch)

        predict, info = sgd_probe(train, classes=classes, epochs=epochs)
        shown.done = epochs
    return {**row_of([_score(predict, test.labelled(), classes)], [info]), "seconds": time.perf_counter() - begin}


def row_of(runs: Sequence[Scores], infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a row of a result. Of several runs it has the means, with their `spread`; confusions and classes are the first's.

    `right` has a text a run (`Scores.right`). What the probes say of themselves is the first subset's; `subsets` has all.
    """
    row = {**runs[0].to_dict(), **infos[0], "right": [run.right for run in runs]}
    if len(runs) > 1:
        row["spread"] = spread(runs)
        row |= {name: row["spread"][name]["mean"] for name in ("top1", "mean_per_class")}
        row["interval"] = np.mean([run.interval for run in runs], axis=0).tolist()
        row["top5"] = None if runs[0].top5 is None else float(np.mean([run.top5 for run in runs]))
    return row | ({"subsets": list(infos)} if len(infos) > 1 else {})


def _score(predict: Predict, test: Features, classes: int, *, votes: bool = False) -> Scores:
    return score(in_blocks(predict, test.h, classes), test.label, votes=votes)


def _chosen(
    usual: dict[str, Any], grid: Mapping[str, Sequence[Any]], fit: Callable[..., Sequence[Predict]], val: Labelled | None,
    classes: int,
) -> tuple[dict[str, Any], dict[str, Any] | None]:  # fmt: skip
    """Choose values of `grid` by top-1 on validation images. Without such images, take the `usual` ones.

    Returns the values, and for the result what was tried. Of a fit's several predictions the mean counts, of equals the first.
    """
    if val is None:
        return usual, None
    every = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    top1s = [float(np.mean([top1(predict, *val, classes) for predict in fit(**values)])) for values in every]
    best = every[top1s.index(max(top1s))]
    return best, {"chosen_on": ON_VALIDATION, "values": best, "tried": every, "validation_top1": top1s}


def _knn(h: Tensor, y: Tensor, val: Labelled | None, classes: int, settings: Settings) -> _Probes:
    def fit(**values: Any) -> list[Predict]:
        return [partial(weighted_knn, h, y, classes=classes, **values)]

    usual = {"k": neighbours(settings.k, len(h)), "temperature": settings.temperature or TEMPERATURE}
    free = {name: GRID[name] if getattr(settings, name) is None else (value,) for name, value in usual.items()}
    values, choice = _chosen(usual, free | {"k": sorted({min(k, len(h)) for k in free["k"]})}, fit, val, classes)
    return fit(**values), {**values, "choice": choice}


def _linear(h: Tensor, y: Tensor, val: Labelled | None, classes: int, settings: Settings) -> _Probes:
    predict, info = linear_probe(h, y, classes=classes, l2=settings.l2, val=val, max_iter=settings.max_iter)
    return [predict], info


def _mlp(h: Tensor, y: Tensor, val: Labelled | None, classes: int, settings: Settings) -> _Probes:
    fit, most = partial(mlp.mlp_probe, h, y, classes=classes), settings.mlp_epochs
    grid = {"lr": mlp.GRID, "epochs": sorted({max(1, most // 4), max(1, most // 2), most})}
    values, choice = _chosen({"lr": mlp.LR, "epochs": most}, grid, lambda **values: fit(**values)[0], val, classes)
    by_seed, info = fit(**values)
    return by_seed, {**info, "choice": choice}


_PROTOCOLS = {"knn": _knn, "linear": _linear, "mlp": _mlp}
