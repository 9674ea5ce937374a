"""The protocols on frozen features: what each is told, and what it measures, as plain values for the result."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from simclr_dist.evaluate.features.extraction import Features
from simclr_dist.evaluate.options import Settings
from simclr_dist.evaluate.protocols import mlp, sgd
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.evaluate.protocols.linear import linear_probe
from simclr_dist.evaluate.protocols.scores import score, spread

ViewsOfEpoch = Callable[[int], tuple[Tensor, Tensor]]


class Question(NamedTuple):
    """What a protocol learns from and is asked; `views` gives the training features of an epoch's new crops."""

    learn: Features
    ask: Features
    classes: int
    settings: Settings
    views: ViewsOfEpoch | None = None


def told(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings of each protocol that is asked for: two results with the same ones can be compared."""
    every: dict[str, dict[str, Any]] = {
        "knn": {"k": settings.k, "temperature": settings.temperature, "similarity": "cosine"},
        "linear": {
            "l2": "chosen" if settings.l2 is None else settings.l2,
            "max_iter": settings.max_iter,
            "solver": "L-BFGS",
            "features": "standardised",
        },
        "sgd": {
            "epochs": settings.sgd_epochs,
            "views": "new crop and flip of each image in every epoch",
            "seed": settings.seed,
        },
        "mlp": {"hidden": mlp.HIDDEN, "dropout": mlp.DROPOUT, "learning_rate": mlp.LR, "epochs": settings.mlp_epochs},
    }
    return {name: every[name] for name in settings.protocols}


def measure(protocol: str, question: Question) -> dict[str, Any]:
    """Scores (`scores.Scores.to_dict`) with what the protocol says of itself, and its seconds.

    Of a protocol with several seeds the percentages and the ends of the interval are means over the seeds, with the `spread`
    beside them; confusions and classes are the first seed's.
    """
    begin = time.perf_counter()
    found = _PROTOCOLS[protocol](question)
    return {**found, "seconds": time.perf_counter() - begin}


def _knn(question: Question) -> dict[str, Any]:
    learn, ask, classes, settings, _ = question
    votes = weighted_knn(learn.h, learn.label, ask.h, k=settings.k, temperature=settings.temperature, classes=classes)
    return score(votes, ask.label).to_dict()


def _linear(question: Question) -> dict[str, Any]:
    learn, ask, classes, settings, _ = question
    logits, info = linear_probe(learn.h, learn.label, ask.h, classes=classes, l2=settings.l2, max_iter=settings.max_iter)
    return {**score(logits, ask.label).to_dict(), **info}


def _sgd(question: Question) -> dict[str, Any]:
    assert question.views is not None
    logits, info = sgd.sgd_probe(question.views, question.ask.h, classes=question.classes, epochs=question.settings.sgd_epochs)
    return {**score(logits, question.ask.label).to_dict(), **info}


def _mlp(question: Question) -> dict[str, Any]:
    learn, ask, classes, settings, _ = question
    h, asked = learn.h.float(), ask.h.float()
    by_seed, info = mlp.mlp_probe(h, learn.label, asked, classes=classes, epochs=settings.mlp_epochs)
    runs = [score(logits, ask.label) for logits in by_seed]
    over_seeds = spread(runs)
    means: dict[str, Any] = {name: over_seeds[name]["mean"] for name in ("top1", "mean_per_class")}
    means["interval"] = np.mean([run.interval for run in runs], axis=0).tolist()
    means["top5"] = None if runs[0].top5 is None else float(np.mean([run.top5 for run in runs]))
    return {**runs[0].to_dict(), **means, "spread": over_seeds, **info}


_PROTOCOLS: dict[str, Callable[[Question], dict[str, Any]]] = {"knn": _knn, "linear": _linear, "sgd": _sgd, "mlp": _mlp}
