"""Finetuning: an encoder trained further with labels, on all of them or on a class-balanced part, from each start.

The paper's procedure (appendix B.5): SGD with Nesterov momentum 0.9, learning rate 0.05 x batch size / 256 (its 0.8 at 4096),
no warm-up, no weight decay nor other regularisation, random resized crops and flips alone, 60 epochs for 1 % of the labels
and 30 for 10 %; a test image is seen once, resized and cut out at its centre. Ours: a cosine to 0, a new linear head of small
normal weights, and batches of at most 256 images, over each of which BatchNorm has its statistics.
The last epoch counts: no test image is read before it has ended, and nothing is chosen by them. `random` with all labels is
the supervised bound, for as many epochs as it gets; the paper's are for pre-trained encoders.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import mind_parent_only
from simclr_dist.data.views.crops import normalise
from simclr_dist.encoder.file import Card, file_digest, load_encoder, projector_path, untrained_encoder
from simclr_dist.evaluate.features import workers as processes
from simclr_dist.evaluate.features.crops import crop, crop_and_flip
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.finetune_options import FinetuneSettings, check_alone
from simclr_dist.evaluate.protocols.scores import Scores, score, spread
from simclr_dist.evaluate.protocols.subsets import Rows, balanced_subset, describe_subsets
from simclr_dist.evaluate.result.kept import write_result
from simclr_dist.evaluate.result.report import Result, Say, UnwrittenError, claim, hardware, leak, result_path, versions
from simclr_dist.evaluate.sets import Sets, describe_set
from simclr_dist.method.distributed import world
from simclr_dist.method.optim import learning_rate
from simclr_dist.system.errors import ConfigError, DataError

FORMAT = "simclr_dist finetuning 1"
MOMENTUM = 0.9
HEAD_STD = 0.01
PROTOCOL = {
    "optimizer": f"SGD, Nesterov momentum {MOMENTUM}, no weight decay",
    "schedule": "cosine to 0, no warm-up",
    "head": f"linear, normal weights of standard deviation {HEAD_STD}, bias 0",
    "batch_norm": "statistics of the batch",
    "training_views": "random resized crop (area 0.08 to 1, ratio 3/4 to 4/3, bicubic), horizontal flip",
    "test_views": "one, deterministic",
    "measured": "after the last epoch",
}


class Recipe(NamedTuple):
    """What follows from the settings and the subset's size; `left_over` images sit out an epoch, others every time."""

    epochs: int
    batch_size_used: int
    steps_per_epoch: int
    left_over: int
    peak_lr: float


class LastEpoch(NamedTuple):
    """Mean loss, and top-1 in percent, of the last epoch's batches as the training went through them."""

    loss: float
    top1: float


def finetune(
    encoder: str | Path,
    train: str | Path,
    test: str | Path,
    settings: FinetuneSettings,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    say: Say = lambda _: None,
) -> Result:
    """Train an exported encoder with labels, once a seed; writes `finetune_path(encoder, settings, out)`, returns the same.

    Seed s is that of the subset, the head, the order and the crops, and with `random` of the encoder: the spread over the
    seeds is that of all of these. One process; on a CPU the same settings and number of threads give the same bits. Images
    without a label are counted and left out. `say` gets a line a seed.

    Raises ConfigError under torchrun and where the loss is no longer finite; DataError for an encoder or a layer that is not
    there, sets that do not fit each other, a class with too few images, and an image that cannot be read; UnwrittenError, which
    has the numbers, for a result that cannot be written.
    """
    check_alone()
    begin = time.perf_counter()
    path = finetune_path(encoder, settings, out)
    with world(device) as here:
        loaded = _load(encoder, settings.start, here.device)
        card: Card = loaded.card  # type: ignore[assignment]
        described = _describe_encoder(encoder, card)
        claim(path, named=out is not None)
        sets = Sets(train, test)
        if sets.classes == 0:
            raise DataError(f"{sets.train.folder}: no image has a label; finetuning needs labelled shards")
        if sets.classes < 2:
            raise DataError(f"{sets.train.folder}: has one class; finetuning needs two or more")
        subsets = [
            balanced_subset(sets.train, settings.labels, classes=sets.classes, seed=seed) for seed in range(settings.seeds)
        ]
        recipe = make_recipe(len(subsets[0]), settings)
        runs: list[dict[str, Any]] = []
        scores: list[Scores] = []
        for seed, rows in enumerate(subsets):
            start = time.perf_counter()
            own = untrained_encoder(card, seed, here.device) if settings.start == "random" else copy.deepcopy(loaded)
            model = classifier(own, sets.classes, card, seed)
            last = fit(model, sets.images["train"], rows, card, recipe, seed=seed, workers=settings.workers)
            trained = time.perf_counter()
            scores.append(_measure(model, sets, card, settings))
            seconds = {"training": trained - start, "test": time.perf_counter() - trained}
            runs.append({"seed": seed, **scores[-1].to_dict(), "last_epoch": last._asdict(), "seconds": seconds})
            say(f"seed {seed}: top-1 {scores[-1].top1:.2f} % after {trained - start:.0f} s of training")
        result = {
            "format": FORMAT,
            "encoder": described,
            "train": describe_set(sets.train),
            "test": describe_set(sets.test),
            "classes": sets.classes,
            "class_names": list(sets.train.classes),
            "test_images_in_train": sets.shared(),
            "settings": {**dataclasses.asdict(settings), **recipe._asdict(), **PROTOCOL},
            "subsets": describe_subsets(sets.train, subsets, path, everything=settings.labels == 1),
            "runs": runs,
            "summary": spread(scores),
            "hardware": hardware(here),
            "versions": versions(),
            "seconds": time.perf_counter() - begin,
        }
        if line := write_result(path, result):
            say(line)
    return result


def finetune_path(encoder: str | Path, settings: FinetuneSettings, out: str | Path | None = None) -> Path:
    """Where the result goes: `out`, else beside `eval`'s result, with the start and the share of the labels in its name."""
    if out is not None:
        return Path(out)
    path = result_path(encoder)
    return path.with_name(f"{path.stem}.finetune-{settings.start}-{settings.labels:g}.json")


def run_from_arguments(arguments: argparse.Namespace, settings: FinetuneSettings) -> int:
    """`finetune` as `finetune_options.add_arguments` were told, then the table and the file's name; 0.

    A result that the disk does not take raises UnwrittenError, once the table is printed.
    """
    try:
        result = finetune(
            arguments.encoder,
            arguments.train,
            arguments.test,
            settings,
            out=arguments.out,
            device=arguments.device,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except UnwrittenError as error:
        print(_table(error.result))
        raise
    print(_table(result))
    print(f"written: {finetune_path(arguments.encoder, settings, arguments.out)}")
    return 0


def make_recipe(images: int, settings: FinetuneSettings) -> Recipe:
    """The steps of an epoch over `images` (2 or more): as few as the batch size allows, all of one size, so of one rate."""
    steps = min(math.ceil(images / settings.batch_size), images // 2)  # BatchNorm needs two
    batch = min(images // steps, settings.batch_size)
    return Recipe(settings.epochs_used, batch, steps, images - steps * batch, settings.base_lr * batch / 256)


def classifier(encoder: nn.Module, classes: int, card: Card, seed: int) -> nn.Module:
    """`encoder` with a new linear head: float [n, 3, s, s] to logits [n, classes]; its parameters take gradients."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        size = card["image_size"]
        width = encoder.eval()(torch.zeros(1, 3, size, size, device=device)).shape[1]
        head = nn.Linear(width, classes, device="cpu")
        head.weight.normal_(0, HEAD_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return nn.Sequential(encoder, head.to(device)).requires_grad_(True)


def fit(
    model: nn.Module, images: ShardDataset, rows: Rows, card: Card, recipe: Recipe, *, seed: int, workers: int = 0
) -> LastEpoch:
    """Train `model` in place on these manifest rows, and leave it in eval mode.

    Order and crops are functions of (seed, epoch, row). Raises ConfigError when an epoch's loss is not finite, DataError for
    an image that cannot be read.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), recipe.peak_lr, momentum=MOMENTUM, nesterov=True)
    steps = recipe.epochs * recipe.steps_per_epoch
    made = _Steps(images, rows, Plan(np.array([len(rows)]), seed, recipe.batch_size_used), card["image_size"])
    loader: DataLoader[_Crops | str] = DataLoader(
        made, batch_size=None, sampler=range(steps), num_workers=workers, collate_fn=_as_it_is, worker_init_fn=mind_parent_only
    )
    (r, g, b), (sr, sg, sb) = card["mean"], card["std"]
    loss_sum, right = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    last = LastEpoch(math.nan, math.nan)
    model.train()
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with repeatable, tqdm(total=steps, unit=" steps", desc=f"seed {seed}", disable=None) as bar:
        for step, batch in enumerate(processes.read(loader, made.abandoned)):
            if isinstance(batch, str):
                raise DataError(batch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=recipe.peak_lr, warmup_steps=0, total_steps=steps)
            labels = batch.labels.to(device, non_blocking=True)
            logits = model(normalise(batch.crops.to(device, non_blocking=True), (r, g, b), (sr, sg, sb)))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            right += (logits.detach().argmax(dim=1) == labels).sum()
            bar.update()
            epoch, position = divmod(step + 1, recipe.steps_per_epoch)
            if position == 0:  # the host waits for the device here alone
                last = LastEpoch(float(loss_sum) / recipe.steps_per_epoch, 100 * int(right) / (len(rows) - recipe.left_over))
                if not math.isfinite(last.loss):
                    raise ConfigError(
                        f"base_lr: the loss of seed {seed} is not finite in epoch {epoch} of {recipe.epochs}, at a rate of "
                        f"{recipe.peak_lr:g} for {recipe.batch_size_used} images a step; take a smaller --base-lr"
                    )
                loss_sum.zero_()
                right.zero_()
    model.eval()
    return last


class _Crops(NamedTuple):
    """`crops` uint8 [n, 3, s, s], `labels` int64 [n]."""

    crops: Tensor
    labels: Tensor


class _Steps(Dataset["_Crops | str"]):
    """Step to its crops and labels; or to the reason why an image cannot be read.

    The reason is a value because an exception out of a worker process would reach the user as a traceback.
    """

    def __init__(self, images: ShardDataset, rows: Rows, plan: Plan, image_size: int) -> None:
        self.images, self.rows, self.plan = images, rows, plan
        self.settings = crop_and_flip(image_size)
        self.abandoned = torch.zeros((), dtype=torch.uint8).share_memory_()

    def __getitem__(self, step: int) -> "_Crops | str":
        if self.abandoned:
            return "nobody waits for it"
        epoch, places = self.plan[step]
        try:
            samples = [self.images[int(row)] for row in self.rows[places]]
        except DataError as error:
            return str(error)
        crops = crop(samples, self.settings, seed=self.plan.seed, epoch=epoch)
        return _Crops(crops, torch.tensor([sample.label for sample in samples]))


def _load(encoder: str | Path, start: str, device: torch.device) -> nn.Module:
    """What is trained further, or gives its shape to random starts."""
    return load_encoder(encoder, device, layer="h" if start in ("encoder", "random") else start)


def _measure(model: nn.Module, sets: Sets, card: Card, settings: FinetuneSettings) -> Scores:
    """The test images' classes by the trained model, each image once."""
    found = extract(
        sets.images["test"],
        {"logits": model},
        image_size=card["image_size"],
        mean=card["mean"],
        std=card["std"],
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=next(model.parameters()).device,
        title="test images",
    )["logits"]
    keep = found.label >= 0
    return score(found.h[keep], found.label[keep])


def _as_it_is(batch: Any) -> Any:
    return batch


def _describe_encoder(encoder: str | Path, card: Card) -> dict[str, Any]:
    projector = None if card["layer"] == "h" else file_digest(projector_path(encoder))
    shown = {key: value for key, value in card.items() if key != "config"}
    return {"file": str(encoder), "sha256": file_digest(encoder), "projector_sha256": projector, "card": shown}


def _table(result: Result) -> str:
    settings, subsets, summary = result["settings"], result["subsets"], result["summary"]
    each = f", {subsets['images_per_class']} of each class" if subsets["images_per_class"] else ""
    lines = [
        f"{result['encoder']['card']['encoder']}, {result['encoder']['file']}, start: {settings['start']}",
        f"{subsets['images']} of {result['train']['labelled']} labelled training images{each}; "
        f"{result['test']['labelled']} test images, {result['classes']} classes",
        f"{settings['epochs']} epochs of {settings['steps_per_epoch']} steps of {settings['batch_size_used']} images, "
        f"rate {settings['peak_lr']:g}",
    ]
    for name, title in (("top1", "top-1"), ("mean_per_class", "mean per class")):
        found = summary[name]
        around = "" if found["sd"] is None else f" +- {found['sd']:.2f}"
        lines.append(
            f"{title:<14}  {found['mean']:6.2f} %{around}  (seeds: {', '.join(f'{value:.2f}' for value in found['values'])})"
        )
    if result["runs"][0]["top5"] is not None:
        lines.append(f"{'top-5':<14}  {np.mean([run['top5'] for run in result['runs']]):6.2f} %")
    for name, part in (("training", result["train"]), ("test", result["test"])):
        if part["labelled"] != part["images"]:
            lines.append(f"left out: {part['images'] - part['labelled']} {name} images without a label")
    if settings["left_over"]:
        lines.append(f"left out: {settings['left_over']} images an epoch, which fill no batch, others every time")
    lines += filter(None, [leak(result)])
    return "\n".join(lines)
