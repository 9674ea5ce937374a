"""Which settings are refused: values out of range, settings that contradict each other or have no effect, and a batch that does
not fit the data and the processes. Each refusal is one line with key, value and cure.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

from simclr_dist.config.settings import Config, DataConfig, ModelConfig, OptimConfig, ProbeConfig, ViewsConfig
from simclr_dist.config.strict_yaml import suggest
from simclr_dist.system.errors import ConfigError, redact

TORCH_OPTIMIZERS = ("sgd", "adamw")
# torch_optimizer.get's names: those that train on the tested torch (a test does so), and those that do not, with the reason.
THIRD_PARTY_OPTIMIZERS = (
    "accsgd",
    "adabelief",
    "adabound",
    "adamod",
    "adamp",
    "aggmo",
    "diffgrad",
    "lars",
    "madgrad",
    "novograd",
    "pid",
    "qhadam",
    "qhm",
    "radam",
    "sgdp",
    "sgdw",
    "shampoo",
    "swats",
    "yogi",
)
CONTIGUOUS_OPTIMIZERS = ("adamp", "sgdp", "swats")  # these fail on weights in channels_last order
REFUSED_OPTIMIZERS = {
    "lamb": "torch-optimizer's Lamb has no bias correction and clamps the weight norm at 10; it is not the paper's",
    "lookahead": "torch-optimizer's Lookahead wraps another optimizer, and fails on torch 2.14",
    **dict.fromkeys(
        ("ranger", "rangerqh", "rangerva"),
        "pytorch-ranger calls forms of add_, addcmul_ and addcdiv_ that torch has deprecated; take torch_optimizer.radam",
    ),
}


_AT_LEAST: dict[str, float] = {
    "seed": 0, "global_batch_size": 1, "micro_batches": 1, "max_skipped_steps": 1, "check_ranks_every": 0,
    "data.workers": 0, "data.window": 1, "data.max_bad_samples": 0, "data.shuffle_buffer": 1, "model.projector_depth": 0,
    "model.projector_hidden": 1, "model.projector_dim": 1, "optim.base_lr": 0, "optim.weight_decay": 0,
    "optim.trust_coefficient": 0, "optim.warmup_epochs": 0, "optim.clip_norm": 0, "checkpoint.every": 1,
    "checkpoint.keep_last": 1, "checkpoint.keep_every": 0, "checkpoint.export_every": 0, "log.every": 1,
    "log.views_every_epochs": 0, "probe.every_epochs": 0, "probe.images": 4,
}  # fmt: skip

_Refuse = Callable[[str, str], NoReturn]  # of a key, with the reason


def check(config: Config, source: str) -> None:
    """Refuse values out of range and settings that contradict each other; `source` begins the ConfigError."""

    def refuse(key: str, why: str) -> NoReturn:
        raise ConfigError(f"{source}: {key}: {_value(config, key)!r} {why}")

    for key, bound in _AT_LEAST.items():
        if not _value(config, key) >= bound:
            refuse(key, f"is too small; the least is {bound}")
    _check_views(config.views, refuse)
    _check_training(config, refuse)
    if not config.run_folder:
        refuse("run_folder", "is empty; name the run folder, like runs/my-run")
    if not config.data.shards:
        refuse("data.shards", "is empty; name a folder that `simclr-dist shard` wrote")
    _check_length(config, source, refuse)
    if config.global_batch_size % config.micro_batches:
        refuse("micro_batches", f"does not divide global_batch_size {config.global_batch_size}")
    _check_model(config.model, refuse)
    _check_data(config, source, refuse)
    _check_probe(config, refuse)
    _check_optimizer(config, refuse)


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _check_views(views: ViewsConfig, refuse: _Refuse) -> None:
    for name in ("flip", "jitter", "gray", "blur"):
        probability = getattr(views, name)
        if probability is not None and not 0 <= probability <= 1:
            refuse(f"views.{name}", "is not a probability from 0 to 1")
    for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
        strength = getattr(views, name)
        if strength is not None and not 0 <= strength <= most:
            refuse(f"views.{name}", f"is out of range; 0 to {most}")
    if (scale := views.crop_scale) is not None and not 0 < scale[0] <= scale[1] <= 1:
        refuse("views.crop_scale", "must be two numbers with 0 < smallest <= largest <= 1")
    for name in ("crop_ratio", "blur_sigma"):
        bounds = getattr(views, name)
        if bounds is not None and not 0 < bounds[0] <= bounds[1]:
            refuse(f"views.{name}", "must be two numbers with 0 < smallest <= largest")
    if views.std is not None and min(views.std) <= 0:
        refuse("views.std", "must be above 0")
    if views.image_size is not None and views.image_size < 8:
        refuse("views.image_size", "is too small; the least is 8")


def _check_training(config: Config, refuse: _Refuse) -> None:
    if config.loss.temperature <= 0:
        refuse("loss.temperature", "must be above 0")
    if not 0 < config.loss.scale < math.inf:
        refuse("loss.scale", "must be above 0")
    if config.activation_checkpointing and config.compile:
        refuse("activation_checkpointing", "does not go with compile; set one of the two")
    if not 0 <= config.optim.momentum < 1:
        refuse("optim.momentum", "must be from 0 to below 1")
    if config.seed >= 2**64:
        refuse("seed", "is too large; it must be below 2**64")
    for name in ("timeout_minutes", "first_step_timeout_minutes"):
        if not 0 < getattr(config, name) <= 100_000:
            refuse(name, "must be above 0 and at most 100000")


def _check_length(config: Config, source: str, refuse: _Refuse) -> None:
    if (config.steps is None) == (config.epochs is None):
        raise ConfigError(f"{source}: steps: {config.steps}, epochs: {config.epochs}: set exactly one of the two")
    if config.steps is not None and config.steps < 1:
        refuse("steps", "is too small; the least is 1")
    if config.epochs is not None and config.epochs <= 0:
        refuse("epochs", "must be above 0")
    if config.optim.warmup_steps is not None and config.optim.warmup_steps < 0:
        refuse("optim.warmup_steps", "is too small; the least is 0")


def _check_model(model: ModelConfig, refuse: _Refuse) -> None:
    if (model.init == "file") != bool(model.init_file):
        refuse("model.init_file", f"contradicts model.init: {model.init!r}; set both, or neither")
    if (model.init.startswith("imagenet") and (model.width, model.stem) != (1, "imagenet")) or (
        model.encoder == "resnet10" and model.init.startswith("imagenet")
    ):
        refuse("model.init", "needs torchvision's shape: width 1, stem imagenet, and an encoder other than resnet10")


def _check_data(config: Config, source: str, refuse: _Refuse) -> None:
    data, plain = config.data, DataConfig()
    pipe = data.shards.startswith("pipe:")
    remote = "://" in data.shards and not pipe
    if remote and (shown := redact(data.shards)) != data.shards:
        raise ConfigError(
            f"{source}: data.shards: {shown!r} holds a user, password, query or fragment, which would stand in config.yaml and"
            " in each encoder's card; put a login into ~/.netrc, or where the protocol's package looks for it"
        )
    if data.reader == "manifest":
        if pipe:
            refuse("data.shards", "is a shell command; it can only be read with data.reader: stream")
        for name in ("samples", "shuffle_buffer", "allow_pipe"):
            if getattr(data, name) != getattr(plain, name):
                refuse(f"data.{name}", "has no effect without data.reader: stream; leave it out")
    else:
        if data.samples is None:
            refuse("data.samples", "must be set for data.reader: stream: how many images the tars hold in all")
        if data.samples < 1:
            refuse("data.samples", "is too small; the least is 1")
        if data.window != plain.window:
            refuse("data.window", "has no effect with data.reader: stream, which mixes by data.shuffle_buffer; leave it out")
        if data.in_memory == "always":
            refuse("data.in_memory", "does not go with data.reader: stream, which knows no image before it comes; leave it out")
        if pipe and not data.allow_pipe:
            refuse("data.shards", "runs a shell command; set data.allow_pipe: true if you mean it")
    if not remote:
        for name in ("cache", "cache_gib", "retry_minutes"):
            if getattr(data, name) != getattr(plain, name):
                refuse(f"data.{name}", "has no effect, as data.shards is no URL; leave it out")
    if data.cache_gib is not None and not 0 < data.cache_gib <= 1e9:
        refuse("data.cache_gib", "must be above 0")
    if not 0 < data.retry_minutes <= 100_000:
        refuse("data.retry_minutes", "must be above 0 and at most 100000")
    if remote and data.retry_minutes >= config.timeout_minutes:
        refuse("data.retry_minutes", f"must be less than timeout_minutes, {config.timeout_minutes}: other ranks wait no longer")


def _check_probe(config: Config, refuse: _Refuse) -> None:
    probe = config.probe
    if probe.shards and not probe.every_epochs:
        refuse("probe.shards", "has no effect while probe.every_epochs is 0; set that too, or leave it out")
    if probe.every_epochs and config.data.reader == "stream":
        refuse("probe.every_epochs", "does not go with data.reader: stream, whose images nobody can tell from the probe's")
    if probe.every_epochs and not probe.shards:
        refuse("probe.every_epochs", "needs probe.shards: a folder of labelled shards that the run does not train on")
    if probe.images != ProbeConfig.images and not probe.every_epochs:
        refuse("probe.images", "has no effect while probe.every_epochs is 0; leave it out")


def _check_optimizer(config: Config, refuse: _Refuse) -> None:
    name = config.optim.name
    prefix, _, third_party = name.partition("torch_optimizer.")
    if prefix or not third_party:
        if name not in ("lars", *TORCH_OPTIMIZERS):
            known = ["lars", *TORCH_OPTIMIZERS, *(f"torch_optimizer.{n}" for n in THIRD_PARTY_OPTIMIZERS)]
            refuse("optim.name", f"is unknown{suggest(name, known)}; known: lars, sgd, adamw, torch_optimizer.NAME")
    elif third_party in REFUSED_OPTIMIZERS:
        refuse("optim.name", f"is refused: {REFUSED_OPTIMIZERS[third_party]}")
    elif third_party not in THIRD_PARTY_OPTIMIZERS:
        refuse("optim.name", f"is unknown; torch_optimizer has {', '.join(THIRD_PARTY_OPTIMIZERS)}")
    if third_party in CONTIGUOUS_OPTIMIZERS and config.channels_last:
        refuse("optim.name", "cannot update weights in channels_last order; set channels_last to false, or take another")
    if config.optim.momentum != OptimConfig.momentum and name not in ("lars", "sgd", "torch_optimizer.lars"):
        refuse("optim.momentum", f"has no effect on {name}; leave it out")
    if config.optim.trust_coefficient != OptimConfig.trust_coefficient and name not in ("lars", "torch_optimizer.lars"):
        refuse("optim.trust_coefficient", f"has no effect on {name}; leave it out")
    if third_party == "lars" and config.optim.weight_decay == 0:
        refuse("optim.name", "turns its own adaptation off at weight_decay 0; use lars, or set optim.weight_decay above 0")


def check_fits(config: Config, samples: int, world_size: int) -> None:
    """Refuse a global batch that the data cannot fill or that ranks and micro-batches do not divide."""
    batch = config.global_batch_size
    if batch > samples:
        raise ConfigError(
            f"global_batch_size: {batch} is larger than the {samples} images of {config.data.shards}; lower it, or add images"
        )
    pieces = config.micro_batches * world_size
    if batch % pieces:
        raise ConfigError(
            f"global_batch_size: {batch} is not divided by {world_size} processes x {config.micro_batches} micro_batches;"
            f" {max(batch // pieces, 1) * pieces} would be"
        )
    total, warmup = config.total_steps(samples), config.warmup_steps(samples)
    if total < 1:
        raise ConfigError(f"epochs: {config.epochs} of {samples} images at global_batch_size {batch} is not one step")
    if warmup > total:
        key = "warmup_epochs" if config.optim.warmup_steps is None else "warmup_steps"
        given = getattr(config.optim, key)
        raise ConfigError(f"optim.{key}: {given}: a warm-up of {warmup} steps is longer than the run of {total}; lower it")
