"""Every protocol on every kind of features: what of a result says how good they are."""

from collections.abc import Mapping
from typing import Any

from simclr_dist.evaluate.collect import labelled
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features
from simclr_dist.evaluate.measure import Question, ViewsOfEpoch, measure
from simclr_dist.evaluate.options import Settings
from simclr_dist.evaluate.result.earlier import Baselines
from simclr_dist.evaluate.result.report import NAMES, TRAINED, UNTRAINED, Say

Found = Mapping[str, dict[str, Features]]


def by_new_crops(features: Found, classes: int, settings: Settings, crops: ViewsOfEpoch) -> dict[str, Any]:
    """The protocol `sgd` for the trained encoder, with the help of all ranks: it goes through all images in every epoch."""
    learn, ask = (labelled(features[part][TRAINED]) for part in ("train", "test"))
    return measure("sgd", Question(learn, ask, classes, settings, crops))


def classify(
    features: Found, classes: int, settings: Settings, *, sgd: dict[str, Any] | None, known: Baselines | None, say: Say
) -> dict[str, dict[str, Any]]:
    """By protocol, by kind of features, what `measure.measure` finds; of baselines without confusions and classes.

    `features` are those of "train" and "test" by kind. `known` baselines are taken over, and what `by_new_crops` has found
    is `sgd`. Nothing without classes.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in settings.protocols} if classes else {}
    if sgd is not None:
        results["sgd"][TRAINED] = sgd
    for name in (RAW_PIXELS, UNTRAINED, TRAINED):
        if name not in features["train"]:
            continue
        learn, ask = (labelled(features[part][name]) for part in ("train", "test"))
        for protocol, rows in results.items():
            if known and name == TRAINED:
                results[protocol] = rows = {**known.protocols.get(protocol, {}), **rows}
            if protocol != "sgd":
                rows[name] = measure(protocol, Question(learn, ask, classes, settings))
            if name in rows:
                say(f"{name}: {NAMES[protocol]} {rows[name]['top1']:.2f} % in {rows[name]['seconds']:.0f} s")
            if name != TRAINED and name in rows:
                del rows[name]["confusion"], rows[name]["per_class"]
    return results
