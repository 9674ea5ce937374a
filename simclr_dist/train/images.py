"""Open a run's images, plan their order, choose their colouring."""

import warnings

import numpy as np
import torch

from simclr_dist.config.settings import Config
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import cache_settings
from simclr_dist.data.remote.fetch import Patience
from simclr_dist.data.stream import StreamImages, StreamPlan
from simclr_dist.data.views.colour import Colour, colour_views
from simclr_dist.data.views.compiled import compile_colour
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import triton_problem

RunImages = ShardDataset | StreamImages


def open_images(config: Config, world: World) -> RunImages:
    """Open the images of `data` for this rank. Raises DataError and ConfigError where the settings do not fit them."""
    data = config.data
    cache = cache_settings(data.cache, data.cache_gib, patience=Patience(60 * data.retry_minutes))
    if data.reader == "manifest":
        images = ShardDataset(data.shards, open_shards=2 * data.window, cache=cache, kind=data.kind)
        # A reader is at most as many steps ahead as the DataLoader lets it be.
        shards = order(config, images, world).shards_at_once(2 * max(1, data.workers) + 2)
        images.check_room(shards, f"the {shards} shards that the readers may need at a time")
        return images
    assert data.samples is not None, "checked"
    place = {"rank": world.rank, "world_size": world.size, "workers": data.workers}
    mixed = {"seed": config.seed, "shuffle": data.shuffle_buffer}
    return StreamImages(
        data.shards, data.samples, allow_pipe=data.allow_pipe, cache=cache, kind=Kind(*data.kind), **place, **mixed
    )


def order(config: Config, images: RunImages, world: World, step: int = 0) -> Plan:
    """Plan which images each step takes on this rank. This start begins with `step`."""
    kind, sizes = Plan, images.manifest.shard_sizes if isinstance(images, ShardDataset) else np.array([images.samples])
    if isinstance(images, StreamImages):
        images.start, kind = step, StreamPlan
    batch, pieces = config.global_batch_size, config.micro_batches
    cut = {"global_batch_size": batch, "micro_batches": pieces, "window": config.data.window}
    return kind(sizes, seed=config.seed, rank=world.rank, world_size=world.size, **cut)


def choose_colour(config: Config, device: torch.device) -> Colour:
    """Choose what colours views on this device."""
    if device.type == "cpu":
        return compile_colour() if config.compile else colour_views
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a run says it among its first lines
        if triton_problem(device):
            return colour_views
    from simclr_dist.data.views import colour_cuda  # needs Triton

    return colour_cuda.colour_views
