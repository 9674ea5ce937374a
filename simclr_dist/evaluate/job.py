"""Evaluate one encoder by each protocol. The baselines that it has to beat stand beside it."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_dist.encoder.card import Card, LoadedEncoder
from simclr_dist.encoder.file import load_encoder, untrained_encoder
from simclr_dist.encoder.names import Foreign, result_path, run_of_result
from simclr_dist.encoder.published import load_foreign
from simclr_dist.evaluate.classify import by_new_crops, classify, row_of
from simclr_dist.evaluate.collect import Collector
from simclr_dist.evaluate.features.extraction import EncoderError, Features, check_alike
from simclr_dist.evaluate.features.store import FeatureStore, features_folder
from simclr_dist.evaluate.features.views import TrainingViews, training_views
from simclr_dist.evaluate.finetune import draw_subsets, train_and_test
from simclr_dist.evaluate.map import feature_map
from simclr_dist.evaluate.protocols.linear import check_choice
from simclr_dist.evaluate.protocols.subsets import Rows, balanced_subset
from simclr_dist.evaluate.result.board import board_folder, show_curve, show_projector
from simclr_dist.evaluate.result.earlier import Baselines, shape
from simclr_dist.evaluate.result.file import FORMAT, TRAINED, UNTRAINED, Result, UnwrittenError, claim, write_result
from simclr_dist.evaluate.result.neighbours import choose_queries, find_neighbours, neighbour_sheet
from simclr_dist.evaluate.result.page import claim_page, page, write_page
from simclr_dist.evaluate.result.report import Say, hardware, versions
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import SUBSETS, FinetuneSettings, Settings, check_val
from simclr_dist.evaluate.signals import false_negatives, signals, view_signals
from simclr_dist.method.distributed import World, on_rank_0, process_group, together
from simclr_dist.system.errors import ConfigError, DataError


def evaluate(
    encoder: str | Path | Foreign,
    train: str | Path,
    test: str | Path,
    *,
    val: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    say: Say = lambda _: None,
    **settings: Any,
) -> Result:
    """Measure an encoder on labelled shards. Writes `names.result_path(encoder, out)` and a page beside it; returns the result.

    `settings` are the fields of `settings.Settings`. What they leave open is chosen on `val`, if there is one, before a test
    image's label is looked at; else on training images, or it is the usual value. Under torchrun the ranks share the
    extraction, rank 0 classifies and writes, and the others return {}. Images without a label are counted and left out; where
    no set has any, only the signals that need none are measured. `say` gets a line, on rank 0, after each part of the work,
    and where an older result of something else is kept (see `file.write_result`).

    Raises ConfigError for a setting out of range, DataError for an encoder file that is not one, a set that is empty, one
    that alone has no labels, and sets whose classes differ; UnwrittenError, which has the numbers, for a result or a page
    that cannot be written.
    """
    checked = Settings(**settings)
    check_layer(encoder, checked)
    with process_group(device) as world:
        return measure_one(world, encoder, Sets(train, test, val), checked, out=out, say=say)


def measure_one(
    world: World, encoder: str | Path | Foreign, sets: Sets, settings: Settings, *, reused: Baselines | None = None,
    out: str | Path | None = None, say: Say,
) -> Result:  # fmt: skip
    """Do `measure` with features that are kept, and show its result."""
    path = result_path(file_of(encoder), out, settings.layer)
    folder = (Path(settings.features) if settings.features else features_folder(path)) if settings.keep_features else None
    result = measure(world, encoder, sets, settings, reused=reused, out=out, features=folder, say=say, warn=say)
    if result and (run := run_of_result(path)):
        show_curve(run, result, say)
    return result


def measure(
    world: World,
    encoder: str | Path | Foreign,
    sets: Sets,
    settings: Settings,
    *,
    reused: Baselines | None = None,
    out: str | Path | None = None,
    features: Path | None = None,
    say: Say = lambda _: None,
    warn: Say = lambda _: None,
) -> Result:
    """Do `evaluate` within a world. `reused` baselines are not measured again, and the result says so.

    `features` is the store's folder. `say` gets the progress, `warn` what became of an older result. Raises EncoderError, on
    all ranks, where another encoder could do better.
    """
    begin = time.perf_counter()
    trained, card, drawn = together(lambda: _load(encoder, settings.layer, world))
    check_alike(trained, file_of(encoder))
    sets.check_channels(card, file_of(encoder))
    path = result_path(file_of(encoder), out, settings.layer)
    on_rank_0(lambda: claim_both(path, named=out is not None))
    subsets = _subsets(sets, settings)
    described = _describe_encoder(file_of(encoder), card, trained.digests)
    reused = reused if reused and reused.shape == shape(described) else None
    fresh = settings.baselines and reused is None
    untrained = untrained_encoder(card, settings.seed, world.device) if fresh else None
    store = FeatureStore(features, say) if features is not None and world.is_main else None
    collector = Collector(world, sets, settings, trained, described["sha256"], untrained, store)
    by_set, views = collector.sets(pixels=fresh and sets.classes > 0), collector.views(drawn)
    extracted = time.perf_counter() - begin
    epochs = settings.sgd_epochs if sets.classes and "sgd" in settings.protocols else 0
    if not world.is_main:
        for epoch in range(epochs):
            collector.crops(epoch)
        return {}
    stored = f" ({len(store.reused)} files of them in {store.folder})" if store and store.reused else ""
    say(f"features of {sum(map(len, sets.images.values()))} images{stored}: {extracted:.0f} s")
    test = by_set["test"][TRAINED]
    given: dict[str, dict[str, Any]] = dict(reused.protocols) if reused else {}
    if epochs:
        given["sgd"] = {TRAINED: by_new_crops(test, sets.classes, settings, collector.crops)}
    collector.keep()  # the other ranks, which would have waited for the disk, are done
    _finetune(given, lambda: _load(encoder, settings.layer, world)[0], fresh, sets, settings, say)
    result = {
        "format": FORMAT, "encoder": described, **sets.describe(),
        "largest_class_percent": sets.largest_class_percent(), **sets.shared(),
        "settings": _general(settings) | {"signal_views": drawn.describe()},
        "baselines_measured_for": reused.measured_for if reused else Path(described["file"]).name if fresh else None,
        "features_reused": store.reused if store else {},
        "protocols": classify(by_set, sets.classes, settings, given=given, subsets=subsets, say=say),
        "signals": _signals(TRAINED, by_set["test"], views, sets) | _false_negatives(sets, card),
        "untrained_signals": _signals(UNTRAINED, by_set["test"], views, sets) if fresh else reused.signals if reused else {},
        "command": command_of(encoder, sets, settings), "hardware": hardware(world), "versions": versions(),
        "seconds": {"features": extracted, "total": time.perf_counter() - begin},
    }  # fmt: skip
    _write(path, result, sets, test, say=say, warn=warn)
    return result


def _general(settings: Settings) -> dict[str, Any]:
    """Return what all protocols share. A protocol's own settings stand beside its results."""
    shared = {name: getattr(settings, name) for name in ("seed", "batch_size", "workers", "layer", "precision")}
    return shared | {"views": "one, deterministic"}


def claim_both(path: Path, *, named: bool) -> None:
    """Claim the result's path, and a `named` one's page."""
    claim(path, named=named)
    if named:
        claim_page(path.with_suffix(".html"))


def _write(path: Path, result: Result, sets: Sets, test: Features, *, say: Say, warn: Say) -> None:
    """Write the result, then its page and a run's projector. Those can be made again."""
    if line := write_result(path, result):
        warn(line)
    run, pictures, labels = run_of_result(path), dict[str, bytes](), test.label.tolist()
    try:
        if len(test.h) > 1:
            nearest = find_neighbours(test.h, choose_queries(test.label))
            classes = sets.test.classes
            pictures["Nearest neighbours"] = neighbour_sheet(sets.images["test"], nearest, test.label.cpu(), classes=classes)
            pictures["Map: the two largest principal components"] = feature_map(test.h, labels, classes)
        write_page(path.with_suffix(".html"), page(result, run=run, pictures=pictures))
        if run is not None:
            layer = result["settings"]["layer"]
            title = f"{layer} of {len(sets.test)} test images, step {result['encoder']['step']}"
            show_projector(board_folder(run, layer), title, sets.images["test"], sets.test, test.h, say)
    except DataError as error:
        raise UnwrittenError(str(error), result, stored=path) from None


def _subsets(sets: Sets, settings: Settings) -> dict[float, list[Rows]]:
    """Draw the rows of each share of the labels. Raises UserError for what is of no use, or would be refused hours later."""
    subsets: dict[float, list[Rows]] = {}
    check_val(settings, sets.named.get("val"))
    for _, protocol, share in settings.measured if sets.classes else ():
        if protocol == "finetune":
            subsets[share] = draw_subsets(sets, share, SUBSETS)
        elif share < 1:
            subsets[share] = [balanced_subset(sets.train, share, classes=sets.classes, seed=seed) for seed in range(SUBSETS)]
        if protocol == "linear" and settings.l2 is None and "val" not in sets.images:
            for rows in subsets.get(share, [sets.train.label >= 0]):
                check_choice(torch.from_numpy(sets.train.label[rows].astype(np.int64)))
    return subsets


def _finetune(
    given: dict[str, dict[str, Any]], load: Callable[[], LoadedEncoder], fresh: bool, sets: Sets, settings: Settings, say: Say
) -> None:
    """Add the rows of the protocol `finetune`. With `fresh` baselines they have one from random weights, too."""
    if not sets.classes or "finetune" not in settings.protocols:
        return
    pretrained = load()
    starts = {UNTRAINED: "random", TRAINED: "encoder"} if fresh else {TRAINED: "encoder"}
    for name, protocol, share in settings.measured:
        for kind, start in starts.items() if protocol == "finetune" else ():
            begin, epochs = time.perf_counter(), settings.finetune_epochs
            how = FinetuneSettings(share, start, SUBSETS, epochs, workers=settings.workers)
            try:
                recipe, _, _, scores = train_and_test(pretrained, sets, how, say)
            except ConfigError as error:  # it diverged; of another encoder the same recipe may not
                raise EncoderError(str(error)) from None
            row = {**row_of(scores, [recipe._asdict()]), "seconds": time.perf_counter() - begin}
            given[name] = {**given.get(name, {}), kind: row}


def check_layer(encoder: str | Path | Foreign, settings: Settings) -> None:
    """Raise ConfigError for a layer that a published checkpoint has not."""
    if isinstance(encoder, Foreign) and settings.layer != "h":
        raise ConfigError(f"layer: {settings.layer!r}: a published checkpoint has h alone")


def file_of(encoder: str | Path | Foreign) -> str | Path:
    """Return the file that the encoder is in."""
    return encoder.weights if isinstance(encoder, Foreign) else encoder


def _load(encoder: str | Path | Foreign, layer: str, world: World) -> tuple[LoadedEncoder, Card, TrainingViews]:
    try:
        if isinstance(encoder, Foreign):
            network = load_foreign(**dataclasses.asdict(encoder), device=world.device)
        else:
            network = load_encoder(encoder, world.device, layer)
        return network, network.card, training_views(network.card, f"{file_of(encoder)}: its card")
    except DataError as error:
        raise EncoderError(str(error)) from None


def command_of(encoder: str | Path | Foreign, sets: Sets, settings: Settings) -> list[str]:
    """Return the command that repeats the evaluation. It has the settings that differ from their defaults."""
    command, options = ["simclr-dist", "eval"], dict[str, Any](sets.named)
    chosen: tuple[Settings | Foreign, ...] = (settings, encoder) if isinstance(encoder, Foreign) else (settings,)
    for one in chosen:
        values = {field: getattr(one, field.name) for field in dataclasses.fields(one)}
        options |= {field.name: value for field, value in values.items() if value != field.default}
    if not isinstance(encoder, Foreign):
        command.append(str(encoder))
    for name, value in options.items():
        if name in ("baselines", "keep_features"):
            command.append(f"--no-{name.removeprefix('keep_')}")
        else:
            between = "," if name == "protocols" else "/"
            typed = between.join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            command += [f"--{name.replace('_', '-')}", typed]
    return command


def _signals(kind: str, test: dict[str, Features], views: list[dict[str, Features]], sets: Sets) -> dict[str, Any]:
    """Measure the test features of one encoder without labels."""
    measured = signals(test[kind].h)
    measured["views"] = view_signals(*(view[kind].h for view in views))
    return measured


def _false_negatives(sets: Sets, card: Card) -> dict[str, Any]:
    """Compute what labels say about the batches of the training."""
    batch = (card.get("config") or {}).get("global_batch_size")
    labels = torch.from_numpy(sets.train.label[sets.train.label >= 0].astype(np.int64))
    if batch and 1 < batch <= len(labels):
        return {"false_negatives": {"batch": batch, **false_negatives(labels, batch)._asdict()}}
    return {}


def _describe_encoder(path: str | Path, card: Card, digests: dict[str, Any]) -> dict[str, Any]:
    shown = ("width", "stem", "layer", "feature_size", "image_size", "mean", "std", "step", "init", "data_digest")
    named = {"file": str(path), "weights": card.get("weights"), **digests}
    return {**named, "name": card["encoder"], **{key: card[key] for key in shown}}
