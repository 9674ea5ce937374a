"""Train an encoder further with labels (finetuning). It uses all labels or a class-balanced part, from each start.

The paper's procedure (appendix B.5): SGD with Nesterov momentum 0.9, learning rate 0.05 x batch size / 256 (its 0.8 at 4096),
no warm-up, no weight decay nor other regularisation, random resized crops and flips alone, 60 epochs for 1 % of the labels
and 30 for 10 %; a test image is seen once, resized and cut out at its centre. Ours: a cosine to 0, a new linear head of small
normal weights, and batches of at most 256 images, over each of which BatchNorm has its statistics.
The last epoch counts: no test image is read before it has ended, and nothing is chosen by them. `random` with all labels is
the supervised bound, for as many epochs as it gets; the paper's are for pre-trained encoders.
"""

import copy
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.views.crops import normalise
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.data.workers import Loader
from simclr_dist.encoder.card import Card, LoadedEncoder
from simclr_dist.encoder.file import load_encoder, untrained_encoder
from simclr_dist.encoder.names import result_path
from simclr_dist.evaluate.features.extraction import EncoderError, extract
from simclr_dist.evaluate.features.views import crop, crop_and_flip
from simclr_dist.evaluate.protocols.scores import Scores, in_blocks, score, spread
from simclr_dist.evaluate.protocols.subsets import Rows, balanced_subset, describe_subsets
from simclr_dist.evaluate.result.file import Result, UnwrittenError, claim, write_result
from simclr_dist.evaluate.result.report import Say, hardware, leak, unlabelled, versions
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import FinetuneSettings, check_alone
from simclr_dist.method.distributed import process_group
from simclr_dist.method.optim import learning_rate
from simclr_dist.method.precision import computing
from simclr_dist.system.errors import ConfigError, DataError, reason_of
from simclr_dist.system.files import write_atomically
from simclr_dist.system.progress import Progress

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
    """The numbers that follow from settings and subset size. `left_over` images sit out an epoch, others every time."""

    epochs: int
    batch_size_used: int
    steps_per_epoch: int
    left_over: int
    peak_lr: float


class Order:
    """The images of each step, by place in the subset. Each epoch has an order of its own, cut as the recipe says."""

    def __init__(self, images: int, seed: int, recipe: Recipe) -> None:
        self.seed, self._cut = seed, (recipe.steps_per_epoch, recipe.batch_size_used)
        self._epochs = Plan(np.array([images]), seed, images - recipe.left_over)  # whose step is an epoch of ours
        self._kept: tuple[int, Rows] = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> tuple[int, Rows]:
        """Return (epoch, places of its images) of a step."""
        epoch, position = divmod(step, self._cut[0])
        if self._kept[0] != epoch:
            self._kept = self._epochs[epoch]
        return epoch, self._kept[1].reshape(self._cut)[position]


class LastEpoch(NamedTuple):
    """Mean loss and top-1 in percent of the last epoch's batches. Each batch counts as the training met it."""

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
    """Train an exported encoder with labels, once a seed. Writes the result (`finetune_path` is its file), and returns it.

    Seed s draws the subset, the head, the order and the crops, and with `random` the encoder. So the spread over the
    seeds is that of all of these. One process; on a CPU the same settings and number of threads give the same bits. Images
    without a label are counted and left out. `say` gets a line a seed.

    Raises ConfigError under torchrun and where loss or scores are no longer finite; DataError for an encoder or a layer that is
    not there, sets that do not fit each other, a class with too few images, and an image that cannot be read; UnwrittenError,
    which has the numbers, for a result that cannot be written.
    """
    check_alone("finetune")
    begin, path = time.perf_counter(), finetune_path(encoder, settings, out)
    with process_group(device) as world:
        layer = "h" if settings.start in ("encoder", "random") else settings.start
        pretrained = load_encoder(encoder, world.device, layer)
        card, digests = pretrained.card, pretrained.digests
        named = {"file": str(encoder), **digests, "card": {key: value for key, value in card.items() if key != "config"}}
        claim(path, named=out is not None)
        sets = Sets(train, test)
        sets.check_channels(card, encoder)
        recipe, subsets, runs, scores = train_and_test(pretrained, sets, settings, say)
        described, beside = describe_subsets(sets.train, subsets, path, everything=settings.labels == 1)
        result = {
            "format": FORMAT, "encoder": named, **sets.describe(), **sets.shared(),
            "settings": {**dataclasses.asdict(settings), **recipe._asdict(), **PROTOCOL},
            "subsets": described,
            "runs": runs, "summary": spread(scores),
            "hardware": hardware(world), "versions": versions(), "seconds": time.perf_counter() - begin,
        }  # fmt: skip
    _write(path, result, beside, say)
    return result


def train_and_test(
    pretrained: LoadedEncoder, sets: Sets, settings: FinetuneSettings, say: Say
) -> tuple[Recipe, list[Rows], list[dict[str, Any]], list[Scores]]:
    """Train a copy of the encoder for each seed and test it. Returns the subsets, and of each seed its part of a result."""
    card, classes, device = pretrained.card, sets.classes, next(pretrained.parameters()).device
    subsets = draw_subsets(sets, settings.labels, settings.seeds)
    recipe, runs, scores = make_recipe(len(subsets[0]), settings), [], []
    for seed, rows in enumerate(subsets):
        start = untrained_encoder(card, seed, device) if settings.start == "random" else copy.deepcopy(pretrained)
        with computing("fp32", device):
            model = classifier(start, classes, card, seed)
            run, measured = _train_and_test(model, sets, rows, card, recipe, settings, seed)
        runs.append(run)
        scores.append(measured)
        say(f"seed {seed}: top-1 {measured.top1:.2f} % after {run['seconds']['training']:.0f} s of training")
    return recipe, subsets, runs, scores


def draw_subsets(sets: Sets, labels: float, seeds: int) -> list[Rows]:
    """Draw the training rows of each seed. Raises DataError for a set that cannot be learnt from."""
    if sets.classes < 2:
        lack = "has one class; finetuning needs two or more"
        lack = lack if sets.classes else "no image has a label; finetuning needs labelled shards"
        raise DataError(f"{sets.train.folder}: {lack}")
    return [balanced_subset(sets.train, labels, classes=sets.classes, seed=seed) for seed in range(seeds)]


def _write(path: Path, result: Result, beside: dict[Path, bytes], say: Say) -> None:
    """Write the result, then the files that it names."""
    if line := write_result(path, result):
        say(line)
    for file, content in beside.items():
        try:
            write_atomically(file, content)
        except OSError as error:
            why = f"{file}: cannot write the subsets' keys: {reason_of(error)}"
            raise UnwrittenError(why, result, stored=path) from None


def finetune_path(encoder: str | Path, settings: FinetuneSettings, out: str | Path | None = None) -> Path:
    """Return `out`, else a path beside `eval`'s result. Its name has the start and the share of the labels."""
    path = result_path(encoder, out)
    return path if out is not None else path.with_name(f"{path.stem}.finetune-{settings.start}-{settings.labels:g}.json")


def make_recipe(images: int, settings: FinetuneSettings) -> Recipe:
    """Plan an epoch over `images` (2 or more). Steps are as few as the batch size allows, of one size, so of one rate."""
    steps = min(math.ceil(images / settings.batch_size), images // 2)  # BatchNorm needs two
    batch = min(images // steps, settings.batch_size)
    return Recipe(settings.epochs_used, batch, steps, images - steps * batch, settings.base_lr * batch / 256)


def classifier(encoder: nn.Module, classes: int, card: Card, seed: int) -> nn.Sequential:
    """Put a new linear head on `encoder`. Maps float [n, c, s, s] to logits [n, classes]; all parameters take gradients."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        head = nn.Linear(card["feature_size"], classes, device="cpu")
        head.weight.normal_(0, HEAD_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return nn.Sequential(encoder, head.to(device)).requires_grad_(True)


def fit(
    model: nn.Module, images: ShardDataset, rows: Rows, card: Card, recipe: Recipe, *, seed: int, workers: int = 0
) -> LastEpoch:
    """Train `model` in place on these manifest rows. It is left in eval mode.

    Order and crops are functions of (seed, epoch, row); drop path and dropout draw from torch's generator, which `seed` starts.
    Raises ConfigError when an epoch's loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), recipe.peak_lr, momentum=MOMENTUM, nesterov=True)
    steps = recipe.epochs * recipe.steps_per_epoch
    order = Order(len(rows), seed, recipe)
    make = functools.partial(_crops, images, rows, order, crop_and_flip(card["image_size"]))
    loader: Loader[tuple[Tensor, Tensor]] = Loader(make, range(steps), workers=workers, pin_memory=device.type == "cuda")
    loss_sum, right = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    last = LastEpoch(math.nan, math.nan)
    model.train()
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    draws = torch.random.fork_rng([device] if device.type == "cuda" else [])  # of drop path and dropout
    with draws, repeatable, Progress(f"seed {seed}", steps, "steps") as shown:
        torch.manual_seed(seed)
        for step, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"] = learning_rate(step, peak=recipe.peak_lr, warmup_steps=0, total_steps=steps)
            crops, labels = (part.to(device, non_blocking=True) for part in batch)
            logits = model(normalise(crops, card["mean"], card["std"]))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            right += (logits.detach().argmax(dim=1) == labels).sum()
            shown.done += 1
            epoch, position = divmod(step + 1, recipe.steps_per_epoch)
            if position == 0:  # the host waits for the device here alone
                last = LastEpoch(float(loss_sum) / recipe.steps_per_epoch, 100 * int(right) / (len(rows) - recipe.left_over))
                if not math.isfinite(last.loss):
                    raise _diverged(f"the loss of seed {seed} is not finite in", epoch, recipe)
                loss_sum.zero_()
                right.zero_()
    model.eval()
    return last


def _diverged(what: str, epoch: int, recipe: Recipe) -> ConfigError:
    rate = f"a rate of {recipe.peak_lr:g} for {recipe.batch_size_used} images a step"
    return ConfigError(f"base_lr: {what} epoch {epoch} of {recipe.epochs}, at {rate}; give finetune a smaller --base-lr")


def _crops(images: ShardDataset, rows: Rows, order: Order, settings: ViewSettings, step: int) -> tuple[Tensor, Tensor]:
    """Make a step's crops and labels. They are uint8 or uint16 [n, c, s, s] and int64 [n]."""
    epoch, places = order[step]
    samples = [images[int(row)] for row in rows[places]]
    return crop(samples, settings, seed=order.seed, epoch=epoch), torch.tensor([sample.label for sample in samples])


def _train_and_test(
    model: nn.Sequential, sets: Sets, rows: Rows, card: Card, recipe: Recipe, settings: FinetuneSettings, seed: int
) -> tuple[dict[str, Any], Scores]:
    """Fit the model on `rows`, then score each test image once. Returns this seed's part of the result, and the scores."""
    begin, workers = time.perf_counter(), settings.workers
    last = fit(model, sets.images["train"], rows, card, recipe, seed=seed, workers=workers)
    trained, device = time.perf_counter(), next(model.parameters()).device
    how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": workers, "device": device, "title": "test images"}
    try:
        scored = extract(sets.images["test"], {"scores": model}, card, **how)["scores"].labelled()
    except EncoderError:  # its loss was finite; nobody computes that of the last step's weights
        raise _diverged(f"the scores of seed {seed} are not finite after", recipe.epochs, recipe) from None
    scores = score(in_blocks(nn.Identity(), scored.h, sets.classes), scored.label)
    seconds = {"training": trained - begin, "test": time.perf_counter() - trained}
    return {"seed": seed, **scores.to_dict(), "last_epoch": last._asdict(), "seconds": seconds}, scores


def table(result: Result) -> str:
    """Format the result for people."""
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
        mean, sd, values = (summary[name][key] for key in ("mean", "sd", "values"))
        around = "" if sd is None else f" +- {sd:.2f}"
        lines.append(f"{title:<14}  {mean:6.2f} %{around}  (seeds: {', '.join(f'{value:.2f}' for value in values)})")
    intervals = (f"{low:.2f}-{high:.2f}" for low, high in (run["interval"] for run in result["runs"]))
    lines.append(f"95 % intervals of top-1, for other test images: {', '.join(intervals)}")
    if result["runs"][0]["top5"] is not None:
        lines.append(f"{'top-5':<14}  {np.mean([run['top5'] for run in result['runs']]):6.2f} %")
    lines += unlabelled(result)
    if settings["left_over"]:
        lines.append(f"left out: {settings['left_over']} images an epoch, which fill no batch, others every time")
    return "\n".join([*lines, *leak(result)])
