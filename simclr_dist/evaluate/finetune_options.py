"""`simclr-dist finetune`: what it can be told, refused where it cannot be, and stop signals, before torch is imported."""

import argparse
import dataclasses
import math
import os
import re

from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError

_STOPPED = "simclr-dist: stopped by {signal}; the same command starts the finetuning again"
_LAYER = re.compile(r"projector\.[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """How an encoder is trained further; raises ConfigError for the first value out of its range.

    `labels`: share of the training labels, in (0, 1]. `start`: `encoder`, `projector.K`, or `random`. `seeds`: how many, 0 to
    seeds - 1. `epochs` None: the paper's. `base_lr` is for 256 images a step.
    """

    labels: float
    start: str = "encoder"
    seeds: int = 3
    epochs: int | None = None
    batch_size: int = 256
    base_lr: float = 0.05
    workers: int = 2

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("epochs", 1), ("batch_size", 2), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}: {value}: must be {least} or more")
        if not 0 < self.labels <= 1:
            raise ConfigError(f"labels: {self.labels:g}: must be above 0, and at most 1 (all labels)")
        if self.start not in ("encoder", "random") and not _LAYER.fullmatch(self.start):
            raise ConfigError(f"start: {self.start!r}: must be encoder, random, or a layer of the projector like projector.1")
        if not 0 < self.base_lr < math.inf:
            raise ConfigError(f"base_lr: {self.base_lr:g}: must be above 0, and finite")

    @property
    def epochs_used(self) -> int:
        """`epochs`, else the paper's (appendix B.5): 60 for 1 % of the labels and 30 for 10 %; we take 30 from 10 % on."""
        return self.epochs if self.epochs is not None else 30 if self.labels >= 0.1 else 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist finetune`."""
    add, given = parser.add_argument, FinetuneSettings(labels=1.0)
    add("encoder", metavar="ENCODER", help="an exported encoder: RUN/encoders/step-XXXXXXXX.safetensors; it stays as it is")
    add("--train", required=True, metavar="SHARDS", help="folder of labelled shards to train on")
    add("--test", required=True, metavar="SHARDS", help="folder of labelled shards, seen once, after the last epoch")
    add("--labels", required=True, type=float, help="share of the training labels: 0.01, 0.1 (as many of each class), 1 (all)")
    add(
        "--start",
        default=given.start,
        metavar="WEIGHTS",
        help="encoder, a projector's layer (projector.1), random (%(default)s)",
    )
    add("--seeds", type=int, default=given.seeds, help="runs, each with its own subset, head and order (%(default)s)")
    add("--epochs", type=int, help="(default: the paper's, 60 below 0.1 of the labels, else 30)")
    add(
        "--batch-size",
        type=int,
        default=given.batch_size,
        help="images a step; fewer where the subset is smaller (%(default)s)",
    )
    add("--base-lr", type=float, default=given.base_lr, help="learning rate for 256 images a step (%(default)s)")
    add("--workers", type=int, default=given.workers, help="reading processes (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (%(default)s)")
    add("--out", metavar="JSON", help="the result's file (default: RUN/eval/step-XXXXXXXX.finetune-START-LABELS.json)")


def check_arguments(arguments: argparse.Namespace) -> FinetuneSettings:
    """The settings among `add_arguments`' options; raises ConfigError for what is out of range."""
    fields = dataclasses.fields(FinetuneSettings)
    return FinetuneSettings(**{field.name: getattr(arguments, field.name) for field in fields})


def check_alone() -> None:
    """Raises ConfigError under torchrun: finetuning runs in one process."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"finetune: runs in one process, and this one is of {os.environ['WORLD_SIZE']} that torchrun started; "
            "start it without torchrun"
        )


def run(arguments: argparse.Namespace) -> int:
    """Do what `add_arguments` were told; returns the exit code.

    Raises UserError, and SystemExit(75) when a stop signal comes: nothing is saved before the end.
    """
    if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        return 2  # rank 0 says it
    check_alone()
    settings = check_arguments(arguments)
    signals.leave_at_once(PREEMPTED, _STOPPED)
    from simclr_dist.evaluate.finetune import run_from_arguments

    signals.exit_when_asked(PREEMPTED, _STOPPED)
    return run_from_arguments(arguments, settings)
