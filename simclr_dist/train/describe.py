"""Describe a run: its first lines, first pictures, and encoder's card."""

import dataclasses
import os
import shlex
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from simclr_dist.config.networks import titled
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.data.order import Plan
from simclr_dist.data.views.crops import visible
from simclr_dist.data.views.draws import ViewSettings, preset_views
from simclr_dist.method.distributed import World
from simclr_dist.method.optim import learning_rate
from simclr_dist.system.ranks import TYPED
from simclr_dist.train.learner import Learner


def view_settings(config: Config) -> ViewSettings:
    """Put the config's values into its preset."""
    values = dataclasses.asdict(config.views)
    return preset_views(values.pop("preset"), values)


def encoder_card(config: Config, feature_size: int, init: str, step: int, images: dict[str, Any]) -> dict[str, Any]:
    """List what users of the encoder need to know. `images`: their number, and "data_digest"."""
    settings, model = view_settings(config), config.model
    return {
        "encoder": model.encoder,
        "width": model.width,
        "stem": model.stem,
        "channels": config.data.channels,
        "feature_size": feature_size,
        "image_size": settings.image_size,
        "mean": list(settings.mean),
        "std": list(settings.std),
        "step": step,
        "images_seen": step * config.global_batch_size,
        "init": init,
        **images,
        "config": config.to_dict(),
    }


_RARE = ("vertical_flip", "rotate", "solarize")  # no preset has them


def views_line(settings: ViewSettings) -> str:
    """Describe the views' settings in one line. A probability of 0 reads `no ...`."""
    side, (least, most), (narrow, wide) = settings.image_size, settings.crop_scale, settings.crop_ratio
    strengths = ", ".join(f"{name} {getattr(settings, name):g}" for name in ("brightness", "contrast", "saturation", "hue"))
    sigmas = "-".join(f"{sigma:g}" for sigma in settings.blur_sigma)
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (settings.mean, settings.std))
    return "; ".join(
        [
            f"{side}x{side} crops of {100 * least:g}-{100 * most:g} % of the area, width/height {narrow:.3g}-{wide:.3g},"
            f" {settings.interpolation}",
            f"flip {settings.flip:g}" if settings.flip else "no flip",
            *(f"{name.replace('_', ' ')} {getattr(settings, name):g}" for name in _RARE if getattr(settings, name)),
            f"jitter {settings.jitter:g} ({strengths})" if settings.jitter else "no jitter",
            f"gray {settings.gray:g}" if settings.gray else "no gray",
            f"blur {settings.blur:g} (sigma {sigmas} pixels)" if settings.blur else "no blur",
            f"mean {mean}, std {std}",
        ]
    )


def describe(config: Config, plan: Plan, learner: Learner, world: World, step: int) -> str:
    """Describe the run by derived numbers. The config does not show them."""
    total, warmup = config.total_steps(plan.samples), config.warmup_steps(plan.samples)
    parameters = sum(p.numel() for p in learner.model.parameters())
    batch, world_size = config.global_batch_size, world.size
    micro_batch = batch // config.micro_batches
    has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in learner.model.modules())
    norm = f"BatchNorm over {micro_batch} images (both views)" if has_norm else "no BatchNorm: the gradient is that of any cut"
    stream = ""
    if config.data.reader == "stream":
        stream = (
            "\n  stream     WARNING: without a manifest exact epochs and resume in mid-epoch do not hold: an image may come"
            f" twice in an epoch or not at all{f'; resumed at step {step}, it starts anew in another order' if step else ''}"
        )
    return (
        f"{'resumed at step ' + str(step) if step else 'new run'}: {config.run_folder}\n"
        f"  data       {plan.samples} images, {plan.steps_per_epoch} steps an epoch, {plan.left_over} left over"
        f" (others every epoch){stream}\n"
        f"  batch      {batch} = {config.micro_batches} micro-batch{'es' * (config.micro_batches != 1)} x {world_size}"
        f" rank{'s' * (world_size != 1)} x {micro_batch // world_size};"
        f" {2 * (batch - 1)} negatives an anchor; {norm}\n"
        f"  model      {titled(config.model.encoder, config.model.width)}, {parameters / 1e6:.2f} M parameters,"
        f" started from: {learner.init}; {config.precision} on {world.device.type}\n"
        f"  views      {views_line(view_settings(config))}\n"
        f"  steps      {total} ({total / plan.steps_per_epoch:.1f} epochs), warm-up {warmup}, peak learning rate"
        f" {config.peak_lr:.4g} ({config.optim.name}, rule {config.optim.lr_rule})"
    )


def rate_doubt(before: Config, config: Config, samples: int, step: int) -> str | None:
    """Describe how another length changes the learning rate. None where it stays."""
    totals = [c.total_steps(samples) for c in (before, config)]
    then, now = (
        learning_rate(step, peak=c.peak_lr, warmup_steps=c.warmup_steps(samples), total_steps=total)
        for c, total in zip((before, config), totals, strict=True)
    )
    if totals[0] == totals[1] or then == now:
        return None
    key, value = ("steps", config.steps) if config.epochs is None else ("epochs", f"{config.epochs:g}")
    lengths = f"{totals[1]} steps and not {totals[0]} as before"
    return f"{key}: {value}: {lengths}, so the learning rate goes from {then:.4g} to {now:.4g} at step {step}"


def run_card(config: Config, described: str) -> str:
    """Describe in Markdown the run and how it was started."""
    settings = write_yaml(config.to_dict())
    return "\n\n".join(
        f"**{title}**\n\n```\n{body.strip()}\n```"
        for title, body in (
            ("run", described),
            ("command", os.environ.get(TYPED) or shlex.join(sys.orig_argv)),
            ("settings", settings),
        )
    )


def view_grid(view_a: Tensor, view_b: Tensor, settings: ViewSettings) -> Tensor:
    """Draw the views of the first 16 images, white between pairs. Returns float [3, h, w] in 0..1."""
    pairs = torch.cat([view_a[:16], view_b[:16]], dim=3).cpu()  # the two touch
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    grid: Tensor = make_grid(visible((pairs * std + mean).clamp(0, 1)), nrow=4, padding=8, pad_value=1)
    return grid
