"""What befalls a rank at one exact moment: hooks for `training_runs.started`, to be made picklable by functools.partial."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from simclr_dist.data import memory
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.steps import Portion, StepDataset
from simclr_dist.train import loop
from simclr_dist.train.learner import Learner


def is_rank(rank: int | None) -> bool:
    """Whether this process is `rank`; None for every rank."""
    return rank is None or os.environ["RANK"] == str(rank)


def signalled_in_step(step: int, number: signal.Signals, rank: int | None = None) -> None:
    """A signal while the `step`-th step of this start is made."""
    _before_step(step, rank, lambda: os.kill(os.getpid(), number))


def late_in_step(step: int, seconds: float, rank: int) -> None:
    """A rank that takes longer, once."""
    _before_step(step, rank, lambda: time.sleep(seconds))


def slow_optimizer(seconds: float, rank: int) -> None:
    """A rank whose own work takes longer in every step, as that of a throttled device."""
    if is_rank(rank):
        register_optimizer_step_post_hook(lambda *_: time.sleep(seconds))


def slow_reader(seconds: float, rank: int) -> None:
    """A rank whose images come late in every step."""
    portion = StepDataset.portion

    def patched(dataset: StepDataset, number: int) -> Portion:
        time.sleep(seconds)
        return portion(dataset, number)

    if is_rank(rank):
        StepDataset.portion = patched  # type: ignore[method-assign]


def signalled_while_decoding(image: int, number: signal.Signals, rank: int | None = None) -> None:
    """A signal when the `image`-th image is decoded to be held in memory; those after it take 0.1 s each."""
    counted = 0
    read = ShardDataset.__getitem__

    def patched(images: ShardDataset, row: int) -> Sample:
        nonlocal counted
        counted += 1
        time.sleep(0.1 if counted > image else 0)
        if counted == image and is_rank(rank):
            os.kill(os.getpid(), number)
        return read(images, row)

    setattr(ShardDataset, "__getitem__", patched)  # noqa: B010 (mypy knows no method that changes)
    memory._PAUSE_BYTES = 10 * 18 * 18 * 3


def signalled_during_export(number: signal.Signals) -> None:
    """A signal to rank 0 when it begins to write the encoder."""
    export = loop.export_encoder

    def patched(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        export(*arguments, **options)

    loop.export_encoder = patched


def corrupted_after_step(step: int, rank: int) -> None:
    """One number of one parameter changes in a rank's memory."""
    counted = 0
    training_step = loop.training_step

    def patched(learner: Learner, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        nonlocal counted
        outcome = training_step(learner, *arguments, **named)
        counted += 1
        if counted == step and is_rank(rank):
            with torch.no_grad():
                learner.model.encoder.get_parameter("conv1.weight")[0, 0, 0, 0] *= 1.5
        return outcome

    loop.training_step = patched


def _before_step(step: int, rank: int | None, action: Callable[[], None]) -> None:
    counted = 0
    training_step = loop.training_step

    def patched(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        nonlocal counted
        counted += 1
        if counted == step and is_rank(rank):
            action()
        return training_step(*arguments, **named)

    loop.training_step = patched
