"""The evaluation of one encoder: its features by each protocol, beside the baselines that it has to beat."""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_dist.encoder.file import file_digest, load_encoder, untrained_encoder
from simclr_dist.encoder.published import load_foreign
from simclr_dist.evaluate.classify import by_new_crops, classify
from simclr_dist.evaluate.collect import Collector
from simclr_dist.evaluate.features.augmented import training_views
from simclr_dist.evaluate.features.extraction import EncoderError, Features
from simclr_dist.evaluate.features.store import FeatureStore, features_folder
from simclr_dist.evaluate.measure import told
from simclr_dist.evaluate.options import Foreign, Settings, check_arguments, foreign
from simclr_dist.evaluate.result.board import board_folder, show_curve, show_projector
from simclr_dist.evaluate.result.earlier import Baselines, shape
from simclr_dist.evaluate.result.kept import write_result
from simclr_dist.evaluate.result.neighbours import choose_queries, find_neighbours, neighbour_sheet
from simclr_dist.evaluate.result.page import claim_page, page, write_page
from simclr_dist.evaluate.result.report import (
    FORMAT,
    TRAINED,
    Result,
    Say,
    UnwrittenError,
    claim,
    hardware,
    result_path,
    table,
    versions,
)
from simclr_dist.evaluate.sets import Sets, describe_set
from simclr_dist.evaluate.signals import false_negatives, signals, view_signals
from simclr_dist.method.distributed import World, on_rank_0, together, world
from simclr_dist.system.errors import DataError


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
    signals that need none are measured. `say` gets a line after each part of the work, and where an older result of something
    else is kept (see `kept`), on rank 0.

    Raises ConfigError for a setting out of range, DataError for an encoder file that is not one, a set that is empty, one
    that alone has no labels, and sets whose classes differ; UnwrittenError, which has the numbers, for a result or a page
    that cannot be written.
    """
    checked = Settings(**settings)
    folder = None
    if checked.keep_features:
        weights = encoder.weights if isinstance(encoder, Foreign) else encoder
        folder = Path(checked.features) if checked.features else features_folder(result_path(weights, out, checked.layer))
    with world(device) as here:
        result = measure(here, encoder, Sets(train, test), checked, out=out, features=folder, say=say, warn=say)
    if result and (run := _run(result_path(result["encoder"]["file"], out, checked.layer))):
        show_curve(run, result, say)
    return result


def measure(
    here: World,
    encoder: str | Path | Foreign,
    sets: Sets,
    settings: Settings,
    *,
    known: Baselines | None = None,
    out: str | Path | None = None,
    features: Path | None = None,
    say: Say = lambda _: None,
    warn: Say = lambda _: None,
) -> Result:
    """`evaluate` within a world; `known` baselines are taken over, which the result says. `features` is the store's folder.

    `say` gets the progress, `warn` what became of an older result. Raises EncoderError, on all ranks, where another encoder
    could do better.
    """
    begin = time.perf_counter()
    trained = together(lambda: _load(encoder, settings.layer, here))
    card: dict[str, Any] = trained.card  # type: ignore[assignment]
    file = encoder.weights if isinstance(encoder, Foreign) else encoder
    path = result_path(file, out, settings.layer)
    on_rank_0(lambda: _claim(path, named=out is not None))
    described = _describe_encoder(file, card)
    if known and known.shape != shape(described):
        known = None
    baselines = settings.baselines and known is None
    untrained = untrained_encoder(card, settings.seed, here.device) if baselines else None
    store = FeatureStore(features, say) if features is not None and here.is_main else None
    collector = Collector(here, sets, settings, trained, described["sha256"], untrained, store)
    found = collector.sets(pixels=baselines)
    drawn = training_views(card)
    views = collector.views(drawn)
    extracted = time.perf_counter()
    if here.is_main:
        say(_told(sets, store, extracted - begin))
    new_crops = sets.classes > 0 and "sgd" in settings.protocols
    if not here.is_main:
        for epoch in range(settings.sgd_epochs if new_crops else 0):
            collector.crops(epoch)
        return {}
    test_features = found["test"][TRAINED]
    sgd = by_new_crops(found, sets.classes, settings, collector.crops) if new_crops else None
    collector.keep()  # the other ranks, which would have waited for the disk, are done
    results = classify(found, sets.classes, settings, sgd=sgd, known=known, say=say)
    train, test = describe_set(sets.train), describe_set(sets.test)
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
        "test_images_in_train": sets.shared(),
        "settings": {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "workers": settings.workers,
            "views": "one, deterministic",
            "layer": settings.layer,
            "precision": settings.precision,
            "signal_views": drawn.told(),
        },
        "baselines_measured_for": known.measured_for if known else Path(file).name if baselines else None,
        "features_reused": store.reused if store else {},
        "protocols": parts,
        "signals": _signals(test_features, views, sets, card),
        "command": _command(encoder, sets, settings),
        "hardware": hardware(here),
        "versions": versions(),
        "seconds": {"features": extracted - begin, "total": time.perf_counter() - begin},
    }
    run = _run(path)
    text = page(result, run=run, neighbours=_neighbours(test_features, sets))
    if line := write_result(path, result):  # first: what else a full disk does not take can be made again from it
        warn(line)
    write_page(path.with_suffix(".html"), text, result)
    if run is not None:
        title = f"{settings.layer} of {len(sets.test)} test images, step {card['step']}"
        show_projector(board_folder(run, settings.layer), title, sets.images["test"], sets.test, test_features.h, say)
    return result


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """`evaluate` as `options.add_arguments` were told, then the table and the file's name; 0.

    What the disk does not take raises UnwrittenError, once the table is printed.
    """
    encoder = arguments.encoder
    if arguments.weights is not None:
        encoder = foreign(arguments)
    try:
        result = evaluate(
            encoder,
            arguments.train,
            arguments.test,
            out=arguments.out,
            device=arguments.device,
            say=_to_stderr,
            **{field.name: getattr(check_arguments(arguments), field.name) for field in dataclasses.fields(Settings)},
        )
    except UnwrittenError as error:
        print(table(error.result))
        raise
    if result:
        path = result_path(arguments.weights or arguments.encoder, arguments.out, arguments.layer)
        print(table(result))
        print(f"written: {path} and {path.with_suffix('.html').name}")
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(result: Path) -> Path | None:
    """The run whose folder of results this is in."""
    run = result.absolute().parent.parent
    return run if result.absolute().parent.name == "eval" and (run / "encoders").is_dir() else None


def _claim(path: Path, *, named: bool) -> None:
    claim(path, named=named)
    if named:  # else the name is made of the encoder's
        claim_page(path.with_suffix(".html"))


def _load(encoder: str | Path | Foreign, layer: str, here: World) -> nn.Module:
    try:
        if isinstance(encoder, Foreign):
            return load_foreign(**dataclasses.asdict(encoder), device=here.device)
        return load_encoder(encoder, here.device, layer)
    except DataError as error:
        raise EncoderError(str(error)) from None


def _command(encoder: str | Path | Foreign, sets: Sets, settings: Settings) -> list[str]:
    """What to type to have it all again."""
    told = {**sets.named, **_set(settings, Settings())}
    if isinstance(encoder, Foreign):
        told |= {"arch": encoder.arch, "weights": encoder.weights, **_set(encoder, Foreign("", ""), "arch", "weights")}
    command = ["simclr-dist", "eval", *([] if isinstance(encoder, Foreign) else [str(encoder)])]
    for name, value in told.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("baselines", "keep_features"):
            command.append(f"--no-{name.removeprefix('keep_')}")
        else:
            command += [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return command


def _set(values: Settings | Foreign, defaults: Settings | Foreign, *but: str) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(values) if field.name not in but)
    return {name: value for name in fields if (value := getattr(values, name)) != getattr(defaults, name)}


def _told(sets: Sets, store: FeatureStore | None, seconds: float) -> str:
    reused = f" ({len(store.reused)} files of them in {store.folder})" if store and store.reused else ""
    return f"features of {len(sets.train) + len(sets.test)} images{reused}: {seconds:.0f} s"


def _signals(test: Features, views: list[Features], sets: Sets, card: dict[str, Any]) -> dict[str, Any]:
    """What the test features say without labels; and what labels say about the batches of the training."""
    found = signals(test.h, sets.test.key.tolist())
    found["views"] = view_signals(*(view.h for view in views))
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
