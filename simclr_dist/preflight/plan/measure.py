"""Measure a config's training steps on this machine. Nothing is written."""

import time
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch

from simclr_dist.config.settings import Config
from simclr_dist.data.memory import held_in_memory
from simclr_dist.data.steps import StepDataset, coloured, load_steps
from simclr_dist.method.distributed import World, local_ranks, together
from simclr_dist.preflight.plan.hardware import GIB, Measured
from simclr_dist.preflight.plan.report import Plan
from simclr_dist.system.errors import ConfigError
from simclr_dist.system.machine import cores, memory_bytes
from simclr_dist.system.progress import Progress
from simclr_dist.train.agreement import StopAgreement
from simclr_dist.train.describe import view_settings
from simclr_dist.train.images import choose_colour, open_images, order
from simclr_dist.train.learner import MicroBatch, build_learner
from simclr_dist.train.loop import training_step

_Step = tuple[Sequence[MicroBatch], Sequence[torch.Tensor]]  # and the rows of each
SECONDS = 60.0


def measure(plan: Plan, world: World) -> Measured:
    """Take a minute of steps as `train` does, on every rank. Raises ConfigError where memory is short."""
    needs, has, on_cuda = plan.step.memory.peak * local_ranks() / GIB, memory_bytes() / GIB, world.device.type == "cuda"
    if needs > has and not on_cuda:
        raise ConfigError(f"--measure: a step needs {needs:.1f} of this machine's {has:.1f} GiB; raise micro_batches")
    learner, agreement = build_learner(plan.config, world), StopAgreement(world.device)
    times: list[float] = []  # the first step's begin, and each one's end
    steps = repeat(_random_step(plan, world)) if plan.shards is None else _steps(plan.config, world)
    with Progress("a minute of steps", unit="steps", shown=world.is_main) as line:
        for number, (micro_batches, rows) in enumerate(steps):
            times = times or [time.perf_counter()]
            training_step(learner, micro_batches, plan.config, 0.0, rows=rows, step=number)
            if on_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            line.done += 1
            if agreement.exchange(int(times[-1] - times[min(1, number)] >= SECONDS)):
                break
    agreement.finish()
    counted = times[1:] if len(times) > 2 else times  # the first step compiles and allocates
    where = torch.cuda.get_device_name() if on_cuda else f"{cores()} cores"
    return Measured(len(counted) - 1, counted[-1] - counted[0], world.size, where)


def _steps(config: Config, world: World) -> Iterator[_Step]:
    """Read, cut and colour the steps of this rank as `train` does."""
    settings, images = view_settings(config), together(lambda: open_images(config, world))
    source = held_in_memory(images, config.data.in_memory)
    dataset = StepDataset(source, order(config, images, world), settings, replace_bad=config.data.on_bad_sample == "replace")
    colour = together(lambda: choose_colour(config, world.device))
    for views in load_steps(dataset, range(10**9), workers=config.data.workers, pin_memory=world.device.type == "cuda"):
        yield coloured(views, settings, world.device, colour=colour), views.rows_of_each


def _random_step(plan: Plan, world: World) -> _Step:
    config, pieces, side = plan.config, plan.config.micro_batches, plan.footprint.side
    shape = (2, config.global_batch_size // pieces // world.size, config.data.channels, side, side)
    micro_batches = [(a, b) for a, b in (torch.randn(shape, device=world.device) for _ in range(pieces))]
    return micro_batches, list(torch.arange(shape[1] * pieces).chunk(pieces))
