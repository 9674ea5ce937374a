"""The evaluation of one encoder: its features by each protocol, beside the baselines that it has to beat."""

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
import torch
from torch import Tensor, nn

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.distributed import World, together, world
from simclr_dist.errors import DataError
from simclr_dist.evaluate.earlier import Baselines, shape
from simclr_dist.evaluate.features import RAW_PIXELS, EncoderError, Features, extract
from simclr_dist.evaluate.neighbours import choose_queries, find_neighbours, neighbour_sheet
from simclr_dist.evaluate.options import Foreign, Settings, check_arguments, foreign
from simclr_dist.evaluate.page import write_page
from simclr_dist.evaluate.protocols import NewCrops, Question, as_it_is, told
from simclr_dist.evaluate.protocols import measure as measure_by
from simclr_dist.evaluate.report import (
    FORMAT,
    NAMES,
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
from simclr_dist.evaluate.signals import false_negatives, signals
from simclr_dist.export import file_digest, load_encoder, untrained_encoder
from simclr_dist.foreign import load_foreign

Say = Callable[[str], None]


def evaluate(
    encoder: str | Path | Foreign,
    train: str | Path,
    test: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    say: Say = lambda _: None,
    **settings: Any,
) -> Result:
    """Measure an encoder on labelled shards; writes `report.result_path(encoder, out)`, a page beside it, and returns the same.

    `settings` are the fields of `options.Settings`. Under torchrun the ranks share the extraction, rank 0 classifies and
    writes, and the others return {}. Images without a label are counted and left out; where neither set has any, only the
    signals that need none are measured. `say` gets a line after each part of the work, on rank 0.

    Raises ConfigError for a setting out of range, DataError for an encoder file that is not one, a set that is empty, one
    that alone has no labels, sets whose classes differ, and a result that cannot be written.
    """
    checked = Settings(**settings)
    with world(device) as here:
        return measure(here, encoder, Sets(train, test), checked, out=out, say=say)


class Sets:
    """Training and test images; raises DataError, on all ranks, where the two cannot be compared."""

    def __init__(self, train: str | Path, test: str | Path) -> None:
        self.named = {"train": str(train), "test": str(test)}
        self.images = together(lambda: {"train": ShardDataset(train), "test": ShardDataset(test)})
        self.train, self.test = self.images["train"].manifest, self.images["test"].manifest
        self.classes = _count_classes(self.train, self.test)


def measure(
    here: World,
    encoder: str | Path | Foreign,
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
    trained = together(lambda: _load(encoder, settings.layer, here))
    card: dict[str, Any] = trained.card  # type: ignore[assignment]
    file = encoder.weights if isinstance(encoder, Foreign) else encoder
    path = result_path(file, out, settings.layer)
    if here.is_main:
        claim(path, named=out is not None)
    described = _describe_encoder(file, card)
    if known and known.shape != shape(described):
        known = None
    baselines = settings.baselines and known is None
    encoders = {UNTRAINED: untrained_encoder(card, settings.seed, here.device)} if baselines else {}
    encoders[TRAINED] = trained
    options: dict[str, Any] = {
        "image_size": card["image_size"],
        "mean": card["mean"],
        "std": card["std"],
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "device": here.device,
    }
    features = {
        name: extract(images, encoders, pixels=baselines, title=f"{name} features", **options)
        for name, images in sets.images.items()
    }
    extracted = time.perf_counter()
    if here.is_main:
        say(f"features of {len(sets.train) + len(sets.test)} images: {extracted - begin:.0f} s")
    results: dict[str, dict[str, Any]] = {name: {} for name in (settings.protocols if sets.classes else ())}

    def views(epoch: int) -> tuple[Tensor, Tensor]:
        crops = NewCrops(sets.images["train"], card["image_size"], seed=settings.seed, epoch=epoch)
        found = extract(crops, {TRAINED: trained}, view=as_it_is, title=f"epoch {epoch + 1}", **options)[TRAINED]
        found = _labelled(found)
        return found.h, found.label

    test_features = features["test"][TRAINED]
    if "sgd" in results:  # of all ranks, for all images once more in every epoch: before they wait for rank 0
        asked_for = Question(_labelled(features["train"][TRAINED]), _labelled(test_features), sets.classes, settings, views)
        results["sgd"][TRAINED] = measure_by("sgd", asked_for)
    if not here.is_main:
        return {}
    for name in (RAW_PIXELS, UNTRAINED, TRAINED) if baselines else (TRAINED,):
        learn, ask = _labelled(features["train"].pop(name)), _labelled(features["test"].pop(name))
        for protocol, rows in results.items():
            if known and name == TRAINED:
                results[protocol] = rows = {**known.protocols.get(protocol, {}), **rows}
            if protocol != "sgd":
                rows[name] = measure_by(protocol, Question(learn, ask, sets.classes, settings))
            if name in rows:
                say(f"{name}: {NAMES[protocol]} {rows[name]['top1']:.2f} % in {rows[name]['seconds']:.0f} s")
            if name != TRAINED and name in rows:
                del rows[name]["confusion"], rows[name]["per_class"]
    train, test = _describe_set(sets.train), _describe_set(sets.test)
    asked = sets.test.label[sets.test.label >= 0]
    parts = {
        name: {"settings": asked_for, "results": results[name]} for name, asked_for in told(settings).items() if name in results
    }
    if "knn" in parts:
        parts["knn"]["settings"]["k_used"] = min(settings.k, train["labelled"])
    result = {
        "format": FORMAT,
        "encoder": described,
        "train": train,
        "test": test,
        "classes": sets.classes,
        "class_names": list(sets.train.classes),
        "largest_class_percent": 100 * float(np.bincount(asked).max()) / len(asked) if len(asked) else None,
        "test_images_in_train": int(np.isin(_digests(sets.test), _digests(sets.train)).sum()),
        "settings": {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "workers": settings.workers,
            "views": "one, deterministic",
            "layer": settings.layer,
        },
        "baselines_measured_for": known.measured_for if known else Path(file).name if baselines else None,
        "protocols": parts,
        "signals": _signals(test_features, sets, card),
        "command": _command(encoder, sets, settings),
        "hardware": hardware(here),
        "versions": versions(),
        "seconds": {"features": extracted - begin, "total": time.perf_counter() - begin},
    }
    run = path.parent.parent if path.parent.name == "eval" else None
    write_page(path.with_suffix(".html"), result, run=run, neighbours=_neighbours(test_features, sets))
    write_result(path, result)  # last: with it, the encoder is evaluated
    return result


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """`evaluate` as `options.add_arguments` were told, then the table and the file's name; 0."""
    encoder = arguments.encoder
    if arguments.weights is not None:
        encoder = foreign(arguments)
    result = evaluate(
        encoder,
        arguments.train,
        arguments.test,
        out=arguments.out,
        device=arguments.device,
        say=_to_stderr,
        **{field.name: getattr(check_arguments(arguments), field.name) for field in dataclasses.fields(Settings)},
    )
    if result:
        path = result_path(arguments.weights or arguments.encoder, arguments.out, arguments.layer)
        print(table(result))
        print(f"written: {path} and {path.with_suffix('.html').name}")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load(encoder: str | Path | Foreign, layer: str, here: World) -> nn.Module:
    try:
        if isinstance(encoder, Foreign):
            return load_foreign(**dataclasses.asdict(encoder), device=here.device)
        return load_encoder(encoder, here.device, layer)
    except DataError as error:
        raise EncoderError(str(error)) from None


def _count_classes(train: Manifest, test: Manifest) -> int:
    """How many classes both sets have, 0 where neither has labels; raises DataError where they cannot be compared."""
    for manifest in (train, test):
        if len(manifest) == 0:
            raise DataError(f"{manifest.folder}: the set is empty; an evaluation needs images")
    without = [manifest for manifest in (train, test) if int(manifest.label.max()) < 0]
    if len(without) == 2:
        return 0
    if without:
        raise DataError(f"{without[0].folder}: no image has a label, but the other set's have; label both, or neither")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        how = f"{differing[0]!r} is in one of them only" if differing else "their order differs"
        raise DataError(
            f"{test.folder}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.folder}: {how}; "
            "shard both from one source (--split)"
        )
    return len(train.classes) or int(max(train.label.max(), test.label.max())) + 1


def _command(encoder: str | Path | Foreign, sets: Sets, settings: Settings) -> list[str]:
    """What to type to have it all again."""
    told = {**sets.named, **_set(settings, Settings())}
    if isinstance(encoder, Foreign):
        told |= {"arch": encoder.arch, "weights": encoder.weights, **_set(encoder, Foreign("", ""), "arch", "weights")}
    command = ["simclr-dist", "eval", *([] if isinstance(encoder, Foreign) else [str(encoder)])]
    for name, value in told.items():
        option = f"--{name.replace('_', '-')}"
        if name == "baselines":
            command.append("--no-baselines")
        else:
            command += [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return command


def _set(values: Settings | Foreign, defaults: Settings | Foreign, *but: str) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(values) if field.name not in but)
    return {name: value for name in fields if (value := getattr(values, name)) != getattr(defaults, name)}


def _signals(test: Features, sets: Sets, card: dict[str, Any]) -> dict[str, Any]:
    """What the test features say without labels; and what labels say about the batches of the training."""
    found = signals(test.h, sets.test.key.tolist())
    batch = (card.get("config") or {}).get("global_batch_size")
    labels = torch.from_numpy(sets.train.label[sets.train.label >= 0].astype(np.int64))
    if batch and 1 < batch <= len(labels):
        found["false_negatives"] = {"batch": batch, **false_negatives(labels, batch)._asdict()}
    return found


def _neighbours(test: Features, sets: Sets) -> bytes | None:
    if len(test.h) < 2:
        return None
    found = find_neighbours(test.h, choose_queries(test.label))
    return neighbour_sheet(sets.images["test"], found, test.label.cpu(), classes=sets.test.classes)


def _labelled(features: Features) -> Features:
    keep = features.label >= 0
    return features if bool(keep.all()) else Features(*(part[keep] for part in features))


def _describe_encoder(path: str | Path, card: dict[str, Any]) -> dict[str, Any]:
    shown = ("width", "stem", "layer", "feature_size", "image_size", "mean", "std", "step", "init", "data_digest")
    return {
        "file": str(path),
        "weights": card.get("weights"),  # of a published checkpoint
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
