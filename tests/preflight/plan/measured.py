"""What a training step really takes, for tests and for benchmarks/plan.py: bytes by torch's profiler, bytes on the wire."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_dist.config.settings import Config, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.preflight.plan.traffic import gathered, summed
from simclr_dist.train.agreement import StopAgreement
from simclr_dist.train.learner import Learner, build_learner, cut, step_metrics
from simclr_dist.train.loop import training_step


def config(**changes: Any) -> Config:
    """A small ResNet for 32 pixels on the CPU."""
    start: dict[str, Any] = {
        "global_batch_size": 64,
        "steps": 10,
        "device": "cpu",
        "model": ModelConfig(encoder="resnet18", stem="small_stride2", projector_hidden=512),
        "views": ViewsConfig(preset="small", image_size=32),
        "optim": OptimConfig(warmup_steps=0),
    }
    return Config(**{**start, **changes})


def peak_of(action: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator has given out at a time during `action`, over what it had given before.

    By its own records, of which the plan knows nothing.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def views(of: Config, images: int) -> tuple[Tensor, Tensor]:
    """Random ones."""
    side = of.views.image_size
    assert side is not None
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(images, 3, side, side, generator=generator) for _ in range(2))
    return a, b


def step_peak(of: Config) -> int:
    """Bytes of a step over weights, optimizer state, gradients and views, in a world of one."""
    learner = build_learner(of, World(0, 1, 0, torch.device("cpu")))
    view_a, view_b = views(of, of.global_batch_size)
    training_step(learner, [(view_a[:4], view_b[:4])], of, 0.1)  # makes the optimizer's state
    learner.optimizer.zero_grad()
    return peak_of(lambda: training_step(learner, cut(view_a, view_b, of.micro_batches), of, 0.1))


def loss_peak(images: int, dim: int) -> int:
    """Bytes of the loss from embeddings to their gradient."""
    z_a, z_b = (torch.randn(images, dim, requires_grad=True) for _ in range(2))
    return peak_of(lambda: torch.autograd.grad(NTXentLoss(0.1)(z_a, z_b), (z_a, z_b)))


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(bytes that this rank sends, calls) of each collective function of torch.distributed, as a ring would send them."""
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    ranks = dist.get_world_size()
    sizes: dict[str, Callable[..., float]] = {
        "all_gather": lambda _, tensor, **__: gathered(tensor.nbytes, ranks),
        "all_reduce": lambda tensor, *_, **__: summed(tensor.nbytes, ranks),
        "all_to_all_single": lambda _, given, **__: given.nbytes * (ranks - 1) / ranks,
    }

    def counting(name: str, real: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[name] += size(*args, **kwargs)  # type: ignore[assignment]
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    with ExitStack() as patched:
        for name, size in sizes.items():
            patched.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name), size)))
        yield sent, calls


def one_step(learner: Learner, of: Config, view_a: Tensor, view_b: Tensor, flag: StopAgreement) -> dict[str, Tensor]:
    """As the trainer does it."""
    outcome = training_step(learner, cut(view_a, view_b, of.micro_batches), of, 0.1)
    flag.exchange(0)
    return outcome


def wire(here: World, of: Config) -> dict[str, float]:
    """Bytes and calls of a step, and bytes of a step's metrics; after a first step, which makes DDP's buckets anew."""
    learner, flag = build_learner(of, here), StopAgreement(here.device)
    view_a, view_b = views(of, of.global_batch_size // here.size)
    one_step(learner, of, view_a, view_b, flag)
    with counted() as (sent, calls):
        outcome = one_step(learner, of, view_a, view_b, flag)
    with counted() as (sent_to_log, _):
        step_metrics(outcome, learner, of, 2, 0.1, 0)
    flag.finish()
    return {"bytes": float(sent.total()), "calls": float(calls.total()), "log": float(sent_to_log.total())}
