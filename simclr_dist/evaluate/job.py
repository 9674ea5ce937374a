"""The evaluation of one encoder: features, kNN and linear probe, beside the baselines that it has to beat."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.distributed import together, world
from simclr_dist.errors import DataError
from simclr_dist.evaluate import options
from simclr_dist.evaluate.features import RAW_PIXELS, Features, extract
from simclr_dist.evaluate.knn import weighted_knn
from simclr_dist.evaluate.linear import linear_probe
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
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure an exported encoder on labelled shards; writes `report.result_path(encoder, out)` and returns the same.

    Under torchrun the ranks share the extraction, rank 0 classifies and writes, and the others return {}. `seed` is that
    of the untrained encoder's weights; nothing else is random. Images without a label are counted and left out. `say`
    gets a line after each part of the work, on rank 0.

    Raises ConfigError for a setting out of range, DataError for an encoder file that is not one, a set that is empty or
    has no labels, sets whose classes differ, and a result that cannot be written.
    """
    options.check_settings(k=k, temperature=temperature, l2=l2, max_iter=max_iter, batch_size=batch_size, workers=workers)
    begin = time.perf_counter()
    with world(device) as here:
        trained = together(lambda: load_encoder(encoder, here.device))
        card: dict[str, Any] = trained.card  # type: ignore[assignment]
        sets = together(lambda: {"train": ShardDataset(train), "test": ShardDataset(test)})
        train_set, test_set = sets["train"].manifest, sets["test"].manifest
        classes = _count_classes(train_set, test_set)
        path = result_path(encoder, out)
        if here.is_main:
            claim(path)
        encoders = {UNTRAINED: untrained_encoder(card, seed, here.device)} if baselines else {}
        encoders[TRAINED] = trained
        features = {
            name: extract(
                images,
                encoders,
                image_size=card["image_size"],
                mean=card["mean"],
                std=card["std"],
                pixels=baselines,
                batch_size=batch_size,
                workers=workers,
                device=here.device,
                title=f"{name} features",
            )
            for name, images in sets.items()
        }
        extracted = time.perf_counter()
        if not here.is_main:
            return {}
        say(f"features of {len(train_set) + len(test_set)} images: {extracted - begin:.0f} s")
        knn: dict[str, Any] = {}
        linear: dict[str, Any] = {}
        for name in (RAW_PIXELS, UNTRAINED, TRAINED) if baselines else (TRAINED,):
            learn, ask = _labelled(features["train"].pop(name)), _labelled(features["test"].pop(name))
            start = time.perf_counter()
            voted = weighted_knn(learn.h, learn.label, ask.h, k=k, temperature=temperature, classes=classes)
            knn[name] = {"top1": _top1(voted, ask.label), "seconds": time.perf_counter() - start}
            start = time.perf_counter()
            fitted, info = linear_probe(learn.h, learn.label, ask.h, classes=classes, l2=l2, max_iter=max_iter)
            linear[name] = {"top1": _top1(fitted, ask.label), **info, "seconds": time.perf_counter() - start}
            for protocol, measured in (("kNN", knn[name]), ("linear", linear[name])):
                say(f"{name}: {protocol} {measured['top1']:.2f} % in {measured['seconds']:.0f} s")
        described = {"train": _describe_set(train_set), "test": _describe_set(test_set)}
        k_used = min(k, described["train"]["labelled"])
        result = {
            "format": FORMAT,
            "encoder": _describe_encoder(encoder, card),
            **described,
            "classes": classes,
            "largest_class_percent": 100 * float(np.bincount(test_set.label[test_set.label >= 0]).max()) / len(ask.label),
            "test_images_in_train": int(np.isin(_digests(test_set), _digests(train_set)).sum()),
            "settings": {"seed": seed, "batch_size": batch_size, "workers": workers, "views": "one, deterministic"},
            "protocols": {
                "knn": {
                    "settings": {"k": k, "k_used": k_used, "temperature": temperature, "similarity": "cosine"},
                    "results": knn,
                },
                "linear": {
                    "settings": {"l2": l2, "max_iter": max_iter, "solver": "L-BFGS", "features": "standardised"},
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
    """`evaluate` with the attributes of `arguments` (None: the default), then the table and the file's name; 0."""
    told = {name: value for name, value in vars(arguments).items() if name in options.NAMES and value is not None}
    result = evaluate(arguments.encoder, arguments.train, arguments.test, say=_to_stderr, **told)
    if result:
        print(table(result))
        print(f"written: {result_path(arguments.encoder, told.get('out'))}")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
