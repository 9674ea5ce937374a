"""The evaluation of one encoder: features, kNN and linear probe, beside the baselines that it has to beat."""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.distributed import World, together, world
from simclr_dist.errors import DataError
from simclr_dist.evaluate import options
from simclr_dist.evaluate.earlier import Baselines, shape
from simclr_dist.evaluate.features import RAW_PIXELS, EncoderError, Features, extract
from simclr_dist.evaluate.knn import weighted_knn
from simclr_dist.evaluate.linear import linear_probe
from simclr_dist.evaluate.options import Settings, check_arguments
from simclr_dist.evaluate.report import (
    FORMAT,
    TRAINED,
    UNTRAINED,
    Result,
    claim,
    hardware,
    result_path,
    table,
    versions,
    write_result,
)
from simclr_dist.export import file_digest, load_encoder, untrained_encoder

Say = Callable[[str], None]


def evaluate(
    encoder: str | Path,
    train: str | Path,
    test: str | Path,
    *,
    k: int = options.K,
    temperature: float = options.TEMPERATURE,
    l2: float = options.L2,
    max_iter: int = options.MAX_ITER,
    batch_size: int = options.BATCH_SIZE,
    workers: int = options.WORKERS,
    seed: int = 0,
    baselines: bool = True,
    out: str | Path | None = None,
    device: str = "auto",
    say: Say = lambda _: None,
) -> Result:
    """Measure an exported encoder on labelled shards; writes `report.result_path(encoder, out)` and returns the same.

    Under torchrun the ranks share the extraction, rank 0 classifies and writes, and the others return {}. `seed` is that
    of the untrained encoder's weights; nothing else is random. Images without a label are counted and left out. `say`
    gets a line after each part of the work, on rank 0.

    Raises ConfigError for a setting out of range, DataError for an encoder file that is not one, a set that is empty or
    has no labels, sets whose classes differ, and a result that cannot be written.
    """
    settings = Settings(k, temperature, l2, max_iter, batch_size, workers, seed, baselines)
    with world(device) as here:
        return measure(here, encoder, Sets(train, test), settings, out=out, say=say)


class Sets:
    """Training and test images; raises DataError, on all ranks, where the two cannot be compared."""

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.images = together(lambda: {"train": ShardDataset(train), "test": ShardDataset(test)})
        self.train, self.test = self.images["train"].manifest, self.images["test"].manifest
        self.classes = _count_classes(self.train, self.test)


def measure(
    here: World,
    encoder: str | Path,
    sets: Sets,
    settings: Settings,
    *,
    known: Baselines | None = None,
    out: str | Path | None = None,
    say: Say = lambda _: None,
) -> Result:
    """`evaluate` within a world; `known` baselines are taken over, which the result says.

    Raises EncoderError, on all ranks, where another encoder could do better.
    """
    begin = time.perf_counter()
    trained = together(lambda: _load(encoder, here))
    card: dict[str, Any] = trained.card  # type: ignore[assignment]
    path = result_path(encoder, out)
    if here.is_main:
        claim(path)
    described = _describe_encoder(encoder, card)
    if known and known.shape != shape(described):
        known = None
    baselines = settings.baselines and known is None
    encoders = {UNTRAINED: untrained_encoder(card, settings.seed, here.device)} if baselines else {}
    encoders[TRAINED] = trained
    features = {
        name: extract(
            images,
            encoders,
            image_size=card["image_size"],
            mean=card["mean"],
            std=card["std"],
            pixels=baselines,
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=here.device,
            title=f"{name} features",
        )
        for name, images in sets.images.items()
    }
    extracted = time.perf_counter()
    if not here.is_main:
        return {}
    say(f"features of {len(sets.train) + len(sets.test)} images: {extracted - begin:.0f} s")
    knn, linear = (dict(known.knn), dict(known.linear)) if known else ({}, {})
    for name in (RAW_PIXELS, UNTRAINED, TRAINED) if baselines else (TRAINED,):
        learn, ask = _labelled(features["train"].pop(name)), _labelled(features["test"].pop(name))
        knn[name], linear[name] = _classify(learn, ask, sets.classes, settings)
        for protocol, measured in (("kNN", knn[name]), ("linear", linear[name])):
            say(f"{name}: {protocol} {measured['top1']:.2f} % in {measured['seconds']:.0f} s")
    train, test = _describe_set(sets.train), _describe_set(sets.test)
    asked = sets.test.label[sets.test.label >= 0]
    k, k_used = settings.k, min(settings.k, train["labelled"])
    result = {
        "format": FORMAT,
        "encoder": described,
        "train": train,
        "test": test,
        "classes": sets.classes,
        "largest_class_percent": 100 * float(np.bincount(asked).max()) / len(asked),
        "test_images_in_train": int(np.isin(_digests(sets.test), _digests(sets.train)).sum()),
        "settings": {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "workers": settings.workers,
            "views": "one, deterministic",
        },
        "baselines_measured_for": known.measured_for if known else Path(encoder).name if baselines else None,
        "protocols": {
            "knn": {
                "settings": {"k": k, "k_used": k_used, "temperature": settings.temperature, "similarity": "cosine"},
                "results": knn,
            },
            "linear": {
                "settings": {
                    "l2": settings.l2,
                    "max_iter": settings.max_iter,
                    "solver": "L-BFGS",
                    "features": "standardised",
                },
                "results": linear,
            },
        },
        "hardware": hardware(here),
        "versions": versions(),
        "seconds": {"features": extracted - begin, "total": time.perf_counter() - begin},
    }
    write_result(path, result)
    return result


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """`evaluate` as `options.add_arguments` were told, then the table and the file's name; 0."""
    result = evaluate(
        arguments.encoder,
        arguments.train,
        arguments.test,
        out=arguments.out,
        device=arguments.device,
        say=_to_stderr,
        **dataclasses.asdict(check_arguments(arguments)),
    )
    if result:
        print(table(result))
        print(f"written: {result_path(arguments.encoder, arguments.out)}")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load(encoder: str | Path, here: World) -> nn.Module:
    try:
        return load_encoder(encoder, here.device)
    except DataError as error:
        raise EncoderError(str(error)) from None


def _count_classes(train: Manifest, test: Manifest) -> int:
    """How many classes both sets have; raises DataError where they cannot be compared."""
    for manifest in (train, test):
        if len(manifest) == 0:
            raise DataError(f"{manifest.folder}: the set is empty; an evaluation needs images")
        if int(manifest.label.max()) < 0:
            raise DataError(f"{manifest.folder}: no image has a label; an evaluation needs labelled shards")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        how = f"{differing[0]!r} is in one of them only" if differing else "their order differs"
        raise DataError(
            f"{test.folder}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}; "
            "shard both from one source (--split)"
        )
    return len(train.classes) or int(max(train.label.max(), test.label.max())) + 1


def _classify(learn: Features, ask: Features, classes: int, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What kNN and the linear probe, in this order, make of the features."""
    start = time.perf_counter()
    voted = weighted_knn(learn.h, learn.label, ask.h, k=settings.k, temperature=settings.temperature, classes=classes)
    knn = {"top1": _top1(voted, ask.label), "seconds": time.perf_counter() - start}
    start = time.perf_counter()
    fitted, info = linear_probe(learn.h, learn.label, ask.h, classes=classes, l2=settings.l2, max_iter=settings.max_iter)
    return knn, {"top1": _top1(fitted, ask.label), **info, "seconds": time.perf_counter() - start}


def _labelled(features: Features) -> Features:
    keep = features.label >= 0
    return features if bool(keep.all()) else Features(*(part[keep] for part in features))


def _top1(predictions: Tensor, labels: Tensor) -> float:
    return 100 * int((predictions == labels).sum()) / len(labels)


def _describe_encoder(path: str | Path, card: dict[str, Any]) -> dict[str, Any]:
    shown = ("width", "stem", "feature_size", "image_size", "mean", "std", "step", "init", "data_digest")
    return {
        "file": str(path),
        "sha256": file_digest(path),
        "card_sha256": hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest(),
        "name": card["encoder"],
        **{key: card[key] for key in shown},
    }


def _describe_set(manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": str(manifest.folder),
        "digest": manifest.digest,
        "images": len(manifest),
        "labelled": int((manifest.label >= 0).sum()),
    }


def _digests(manifest: Manifest) -> np.ndarray[Any, np.dtype[np.void]]:
    return np.ascontiguousarray(manifest.sha256).view("V32").ravel()
