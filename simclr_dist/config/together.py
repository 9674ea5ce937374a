"""Check settings against each other, and list the optimizers' names."""

import ast
import functools
import importlib.util
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from simclr_dist.config.ranges import out_of_range
from simclr_dist.config.settings import Config, DataConfig, OptimConfig, ProbeConfig
from simclr_dist.config.strict_yaml import suggest
from simclr_dist.system.errors import ConfigError, redact

TORCH_OPTIMIZERS = ("sgd", "adamw")
CONTIGUOUS_OPTIMIZERS = ("adamp", "sgdp", "swats")  # these fail on weights in channels_last order
REFUSED_OPTIMIZERS = {
    "lamb": "torch-optimizer's Lamb has no bias correction and clamps the weight norm at 10; it is not the paper's",
    "lookahead": "torch-optimizer's Lookahead wraps another optimizer, and fails on torch 2.14",
    **dict.fromkeys(
        ("ranger", "rangerqh", "rangerva"),
        "pytorch-ranger calls forms of add_, addcmul_ and addcdiv_ that torch has deprecated; take torch_optimizer.radam",
    ),
}

_Refuse = Callable[[str, str], NoReturn]  # of a key, with the reason


def check(config: Config, source: str) -> None:
    """Refuse values out of range and contradictions; `source` begins the ConfigError."""

    def refuse(key: str, why: str) -> NoReturn:
        raise ConfigError(f"{source}: {key}: {operator.attrgetter(key)(config)!r} {why}")

    for key, _, why in out_of_range(config):
        refuse(key, why)
    if not config.run_folder:
        refuse("run_folder", "is empty; name the run folder, like runs/my-run")
    if not config.data.shards:
        refuse("data.shards", "is empty; name a folder that `simclr-dist shard` wrote")
    if (config.steps is None) == (config.epochs is None):
        raise ConfigError(f"{source}: steps: {config.steps}, epochs: {config.epochs}: set exactly one of the two")
    if config.activation_checkpointing and config.compile:
        refuse("activation_checkpointing", "does not go with compile; set one of the two")
    if config.global_batch_size % config.micro_batches:
        refuse("micro_batches", f"does not divide global_batch_size {config.global_batch_size}")
    model = config.model
    if (model.init == "file") != bool(model.init_file):
        refuse("model.init_file", f"contradicts model.init: {model.init!r}; set both, or neither")
    is_torchvisions = (model.width, model.stem) == (1, "imagenet") and model.encoder != "resnet10"
    if model.init.startswith("imagenet") and not is_torchvisions:
        refuse("model.init", "needs torchvision's shape: width 1, stem imagenet, and an encoder other than resnet10")
    _check_data(config, source, refuse)
    _check_probe(config, refuse)
    _check_optimizer(config, refuse)


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


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """List what `optim.name` may be. torch_optimizer's are read from its source, as its import takes seconds."""
    spec = importlib.util.find_spec("torch_optimizer")
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    names: list[str] = []
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name("_package_opts")], value=ast.List(classes)):  # what its `get` takes
                names = sorted(ast.unparse(cls).lower() for cls in classes)
    return ("lars", *TORCH_OPTIMIZERS, *(f"torch_optimizer.{name}" for name in names if name not in REFUSED_OPTIMIZERS))


def _check_optimizer(config: Config, refuse: _Refuse) -> None:
    name = config.optim.name
    third_party = name.removeprefix("torch_optimizer.") if name.startswith("torch_optimizer.") else ""
    if third_party in REFUSED_OPTIMIZERS:
        refuse("optim.name", f"is refused: {REFUSED_OPTIMIZERS[third_party]}")
    if name not in optimizer_names():
        refuse("optim.name", f"is unknown{suggest(name, optimizer_names())}; known: {', '.join(optimizer_names())}")
    if third_party in CONTIGUOUS_OPTIMIZERS and config.channels_last:
        refuse("optim.name", "cannot update weights in channels_last order; set channels_last to false, or take another")
    if config.optim.momentum != OptimConfig.momentum and name not in ("lars", "sgd", "torch_optimizer.lars"):
        refuse("optim.momentum", f"has no effect on {name}; leave it out")
    if config.optim.trust_coefficient != OptimConfig.trust_coefficient and name not in ("lars", "torch_optimizer.lars"):
        refuse("optim.trust_coefficient", f"has no effect on {name}; leave it out")
    if third_party == "lars" and config.optim.weight_decay == 0:
        refuse("optim.name", "turns its own adaptation off at weight_decay 0; use lars, or set optim.weight_decay above 0")


def check_fits(config: Config, samples: int, world_size: int) -> None:
    """Refuse a global batch that does not fit data, ranks or micro-batches."""
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
        value = getattr(config.optim, key)
        raise ConfigError(f"optim.{key}: {value}: a warm-up of {warmup} steps is longer than the run of {total}; lower it")
