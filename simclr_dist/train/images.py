"""The images of a run and the order that they come in, as the config says."""

import numpy as np

from simclr_dist.config.settings import Config
from simclr_dist.data.order import Plan, Rows
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import cache_settings
from simclr_dist.data.remote.fetch import Patience
from simclr_dist.data.stream import StreamImages, StreamPlan
from simclr_dist.method.distributed import World

RunImages = ShardDataset | StreamImages


def open_images(config: Config, here: World) -> RunImages:
    """What `data` names, for this rank; raises DataError and ConfigError when it cannot be read as told."""
    data = config.data
    cache = cache_settings(data.cache, data.cache_gib, patience=Patience(60 * data.retry_minutes))
    if data.reader == "manifest":
        images = ShardDataset(data.shards, open_shards=2 * data.window, cache=cache)
        # A reader is at most as many steps ahead as the DataLoader lets it be.
        shards = order(config, images, here).shards_at_once(2 * max(1, data.workers) + 2)
        images.check_room(shards, f"the {shards} shards that the readers may need at a time")
        return images
    assert data.samples is not None, "checked"
    return StreamImages(
        data.shards,
        data.samples,
        seed=config.seed,
        rank=here.rank,
        world_size=here.size,
        workers=data.workers,
        shuffle=data.shuffle_buffer,
        allow_pipe=data.allow_pipe,
        cache=cache,
    )


def order(config: Config, images: RunImages, here: World, step: int = 0) -> Plan:
    """Which images each step takes on this rank; `step` is the one that this start begins with."""
    sizes: Rows
    if isinstance(images, StreamImages):
        images.start, sizes = step, np.array([images.samples])
    else:
        sizes = images.manifest.shard_sizes
    return (StreamPlan if isinstance(images, StreamImages) else Plan)(
        sizes,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batches=config.micro_batches,
        window=config.data.window,
        rank=here.rank,
        world_size=here.size,
    )
