"""What a config will need, before it runs; answers without a GPU and without allocating the model."""

from pathlib import Path

import torch

from simclr_dist.config import Config, check_fits
from simclr_dist.data.collection import load_collection, names_tars
from simclr_dist.data.draws import PRESETS
from simclr_dist.data.remote import is_url
from simclr_dist.errors import ConfigError
from simclr_dist.model import build_simclr

_OPTIMIZER_BUFFERS = {"lars": 1, "sgd": 1, "adamw": 2}


def plan(config: Config, *, world_size: int = 1, samples: int | None = None) -> str:
    """A table of derived numbers for `world_size` ranks; `samples` when the shards are not here.

    Raises ConfigError when the config cannot run (batch larger than the data, or not divided).
    """
    samples = config.data.samples if samples is None else samples
    if samples is None:
        where = config.data.shards
        if not is_url(where) and not names_tars(where) and not Path(where).exists():
            raise ConfigError(f"data.shards: {config.data.shards!r} is not here; give the number of images by --samples N")
        samples = len(load_collection(where))
    check_fits(config, samples, world_size)
    with torch.device("meta"):
        model = build_simclr(**config.model.shape)
    encoder, projector = model.encoder, model.projector
    sizes = [sum(p.numel() for p in part.parameters()) for part in (encoder, projector)]
    batch, number = config.global_batch_size, 8 if config.precision == "fp64" else 4
    piece = batch // config.micro_batches
    buffers = _OPTIMIZER_BUFFERS.get(config.optim.name)
    dim = config.model.projector_dim if config.model.projector_depth else encoder.feature_size
    rows, local = 2 * batch, 2 * batch // world_size
    side = config.views.image_size or PRESETS[config.views.preset].image_size
    total, an_epoch = config.total_steps(samples), config.steps_per_epoch(samples)
    width = max(8, len(str(total)))
    lines = [
        ("images", f"{samples}; {an_epoch} steps an epoch, {samples % batch} left over (others every epoch)"),
        ("global batch", f"{batch} = {config.micro_batches} micro-batches x {world_size} ranks x {piece // world_size}"),
        ("negatives an anchor", f"{2 * (batch - 1)}"),
        ("BatchNorm group", f"{piece} images, both views: one micro-batch over all ranks"),
        (
            "steps",
            f"{total:{width}d} = {total / an_epoch:.1f} epochs, the first {config.warmup_steps(samples)} warm-up".strip(),
        ),
        ("peak learning rate", f"{config.peak_lr:.6g} ({config.optim.base_lr} by the {config.optim.lr_rule} rule)"),
        ("parameters", f"{sum(sizes) / 1e6:.2f} M (encoder {sizes[0] / 1e6:.2f} M, projector {sizes[1] / 1e6:.2f} M)"),
        ("memory a rank: weights", _mib(sum(sizes) * number)),
        ("memory a rank: gradients", _mib(sum(sizes) * number * (2 if world_size > 1 else 1)) + _buckets(world_size)),
        (
            "memory a rank: optimizer",
            _mib(sum(sizes) * number * buffers) if buffers else f"not known for {config.optim.name}",
        ),
        (
            "memory a rank: loss",
            f"{_mib((rows + 3 * local) * dim * number + 2 * min(64 * 2**20, local * rows * number))}"
            f" (the whole {rows} x {rows} matrix would be {_mib(rows * rows * number)})",
        ),
        ("memory a rank: views", f"{_mib(local * 3 * side * side * 4)}, as float32, of one step"),
        ("memory a rank: activations", f"not counted; they are those of {2 * piece // world_size} views at a time"),
    ]
    return "\n".join(f"{name:28s}{value}" for name, value in lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def _buckets(world_size: int) -> str:
    return " (DDP's buckets included)" if world_size > 1 else ""
