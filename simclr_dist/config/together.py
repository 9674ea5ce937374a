"""Check settings against each other, and list the optimizers' names."""

import ast
import functools
import importlib.util
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from simclr_dist.config.networks import unknown_encoder
from simclr_dist.config.ranges import LARGEST, out_of_range
from simclr_dist.config.settings import ENCODERS, Config, DataConfig, ModelConfig, OptimConfig, ProbeConfig
from simclr_dist.config.strict_yaml import spell, suggest
from simclr_dist.system.errors import ConfigError, redact, shown
from simclr_dist.system.machine import cpp_compiler, has_bfloat16, memory_bytes, most_processes

RGB = ("red", "green", "blue")
BLURRING_PRESETS = ("imagenet",)
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
# What a run with `log.NAME` needs, as pip takes it; setup.cfg has them as extras.
LOGGERS = {
    "wandb": ("wandb>=0.31,<0.32",),
    "mlflow": ("mlflow-skinny>=3.17,<4", "sqlalchemy>=2.0.36,<3", "alembic<2"),
    "trackio": ("trackio>=0.43,<0.44",),
}

_Refuse = Callable[[str, str], NoReturn]  # of a key, with the reason


def check(config: Config, source: str) -> None:
    """Refuse values out of range and contradictions; `source` begins the ConfigError."""

    def refuse(key: str, why: str) -> NoReturn:
        raise ConfigError(f"{source}: {key}: {shown(operator.attrgetter(key)(config))} {why}")

    for key, _, why in out_of_range(config):
        refuse(key, why)
    if not config.run_folder:
        refuse("run_folder", "is empty; name the run folder, like runs/my-run")
    if not config.data.shards:
        refuse("data.shards", "is empty; name a folder that `simclr-dist shard` wrote")
    if (config.steps is None) == (config.epochs is None):
        cure = "" if config.steps is None else "; `--epochs null` takes a file's away"
        raise ConfigError(f"{source}: steps: {config.steps}, epochs: {config.epochs}: set exactly one of the two{cure}")
    if config.activation_checkpointing and config.compile:
        refuse("activation_checkpointing", "does not go with compile; set one of the two")
    for key in ("compile", "activation_checkpointing"):
        if config.deterministic == "exact" and getattr(config, key):
            refuse(key, "does not go with deterministic: exact; set one of the two")
    if config.global_batch_size % config.micro_batches:
        refuse("micro_batches", f"does not divide global_batch_size {config.global_batch_size}")
    model = config.model
    if reason := unknown_encoder(model.encoder):
        refuse("model.encoder", reason)
    for key in ("width", "stem") if model.encoder not in ENCODERS else ():
        if getattr(model, key) != getattr(ModelConfig, key):
            refuse(f"model.{key}", f"has no effect on {model.encoder}; leave it out")
    if model.encoder in ENCODERS and model.drop_path is not None:
        refuse("model.drop_path", f"has no effect on {model.encoder}, which has none; leave it out")
    if (model.init == "file") != bool(model.init_file):
        refuse("model.init_file", f"contradicts model.init: {model.init!r}; set both, or neither")
    for key in ("init_prefix", "init_except"):
        if model.init != "file" and getattr(model, key):
            refuse(f"model.{key}", f"has no effect with model.init: {model.init}; leave it out")
    has_weights = model.encoder in ENCODERS[1:] or model.encoder.startswith("torchvision/")
    is_torchvisions = has_weights and (model.width, model.stem) == (1, "imagenet")
    if model.init.startswith("imagenet") and not is_torchvisions:
        refuse("model.init", "needs torchvision's shape: width 1, stem imagenet, and an encoder other than resnet10 or timm's")
    _check_data(config, source, refuse)
    _check_channels(config, refuse)
    _check_probe(config, refuse)
    _check_optimizer(config, refuse)
    if not Path(config.run_folder, "config.yaml").is_file():  # a run that has begun goes on with what it was begun with
        _check_effects(config, refuse)


def _check_effects(config: Config, refuse: _Refuse) -> None:
    """Refuse what is set beside a setting that leaves it without effect."""
    views, depth, plain = config.views, config.model.projector_depth, Config()
    colours = ("views.brightness", "views.contrast", "views.saturation", "views.hue")
    no_blur = "views.blur: 0" if views.blur == 0 else ""
    if views.blur is None and views.preset not in BLURRING_PRESETS:
        no_blur = f"views.preset: {views.preset}"
    elif views.blur != 0 and views.image_size is not None and views.image_size < 20:
        no_blur = f"views.image_size: {views.image_size}, where a tenth of the view is one pixel"
    idle: list[tuple[tuple[str, ...], str]] = [
        (("data.max_bad_samples",), "data.on_bad_sample: error" if config.data.on_bad_sample == "error" else ""),
        (colours, "views.jitter: 0" if views.jitter == 0 else ""),
        (("views.blur_sigma",) if views.blur == 0 else ("views.blur", "views.blur_sigma"), no_blur),
        (("model.projector_hidden",), f"model.projector_depth: {depth}" if depth < 2 else ""),
        (("model.projector_dim", "model.projector_batch_norm"), "model.projector_depth: 0" if depth < 1 else ""),
        (("exact_piece",), "" if config.deterministic == "exact" else f"deterministic: {spell(config.deterministic)}"),
        (("log.views_every_epochs",), "" if config.log.tensorboard else "log.tensorboard: false"),
    ]
    for key, other in ((key, other) for keys, other in idle for key in keys if other):
        if operator.attrgetter(key)(config) != operator.attrgetter(key)(plain):
            refuse(key, f"has no effect with {other}; leave it out, or change that")


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
            refuse("data.shards", "runs a shell command; if you trust it, add --data.allow_pipe true")
    if not remote:
        for name in ("cache", "cache_gib", "retry_minutes"):
            if getattr(data, name) != getattr(plain, name):
                refuse(f"data.{name}", "has no effect, as data.shards is no URL; leave it out")
    if remote and data.retry_minutes >= config.timeout_minutes:
        refuse("data.retry_minutes", f"must be less than timeout_minutes, {config.timeout_minutes}: other ranks wait no longer")


def _check_channels(config: Config, refuse: _Refuse) -> None:
    """Refuse views of other channels than images have. Refuse colour without RGB."""
    views, channels = config.views, config.data.channels
    measure = f"`simclr-dist shard --statistics {redact(config.data.shards)}` measures it"
    for name, values in (("mean", views.mean), ("std", views.std)):
        if len(values or RGB) != channels:
            wanted = f"one number for each of data.channels: {channels}"
            refuse(f"views.{name}", f"must have {wanted}; {measure}" if values else f"must be set, {wanted}; {measure}")
    for name in ("saturation", "hue", "gray"):
        if channels != len(RGB) and getattr(views, name):
            refuse(f"views.{name}", f"has no effect with data.channels: {channels}, as there is no colour; leave it out")


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
    return ("lars", "muon", *TORCH_OPTIMIZERS, *(f"torch_optimizer.{name}" for name in names if name not in REFUSED_OPTIMIZERS))


def _check_optimizer(config: Config, refuse: _Refuse) -> None:
    name = config.optim.name
    third_party = name.removeprefix("torch_optimizer.") if name.startswith("torch_optimizer.") else ""
    if third_party in REFUSED_OPTIMIZERS:
        refuse("optim.name", f"is refused: {REFUSED_OPTIMIZERS[third_party]}")
    if name not in optimizer_names():
        refuse("optim.name", f"is unknown{suggest(name, optimizer_names())}; known: {', '.join(optimizer_names())}")
    if third_party in CONTIGUOUS_OPTIMIZERS and config.channels_last:
        refuse("optim.name", "cannot update weights in channels_last order; set channels_last to false, or take another")
    used = {
        "momentum": ("lars", "muon", "sgd", "torch_optimizer.lars"),
        "betas": ("adamw", "muon"),
        "trust_coefficient": ("lars", "torch_optimizer.lars"),
    }
    for key, names in used.items():
        plain = getattr(OptimConfig, key)
        if getattr(config.optim, key) != plain and name not in names:
            refuse(f"optim.{key}", f"has no effect on {name}; leave it out, or set it to its default {spell(plain)}")
    if third_party == "lars" and config.optim.weight_decay == 0:
        refuse("optim.name", "turns its own adaptation off at weight_decay 0; use lars, or set optim.weight_decay above 0")


def check_fits(config: Config, samples: int, world_size: int, done: int = 0) -> None:
    """Refuse a global batch, or a length, that does not fit.

    The batch must fit data, ranks and micro-batches. `done`: steps that the run has done, which are the least.
    """
    batch = config.global_batch_size
    if batch > samples:
        raise ConfigError(
            f"global_batch_size: {batch} is larger than the {samples} images of {config.data.shards}; lower it, or add images"
        )
    pieces = config.micro_batches * world_size * config.piece
    of_piece = f" x {config.piece} images of an exact_piece" if config.piece > 1 else ""
    if batch % pieces:
        raise ConfigError(
            f"global_batch_size: {batch} is not divided by {world_size} processes x {config.micro_batches} micro_batches"
            f"{of_piece}; {max(batch // pieces, 1) * pieces} would be"
        )
    total, warmup = config.total_steps(samples), config.warmup_steps(samples)
    if total > LARGEST:
        an_epoch = config.steps_per_epoch(samples)
        raise ConfigError(f"epochs: {config.epochs} of {an_epoch} steps are more than {LARGEST} steps, the most; lower it")
    if total < 1:
        raise ConfigError(f"epochs: {config.epochs} of {samples} images at global_batch_size {batch} is not one step")
    if warmup > total:
        key = _warmup_key(config)
        value = operator.attrgetter(key)(config)
        raise ConfigError(f"{key}: {value}: a warm-up of {warmup} steps is longer than the run of {total}; lower it")
    if done > total:
        length = f"steps: {total}" if config.epochs is None else f"epochs: {config.epochs:g}, or {total} steps"
        why = f"the run in {config.run_folder} has done {done} already"
        raise ConfigError(f"{length}: {why}; ask for more, or name another run_folder")


def _warmup_key(config: Config) -> str:
    return "optim.warmup_epochs" if config.optim.warmup_steps is None else "optim.warmup_steps"


def doubts(
    config: Config, samples: int, world_size: int, side: int, short_side: float | None, *, on_cpu: bool
) -> Iterator[str]:
    """Yield a line for each setting that is allowed and seldom meant.

    `side`: of a view in pixels; `short_side`: of the median image, None where it is not known.
    """
    batch = config.global_batch_size
    if on_cpu and config.precision == "bf16" and not has_bfloat16():
        slower = "a step takes 1.5 times as long as in fp32 with AVX-512, and 9 times without"
        yield f"precision: bf16: this CPU has no instructions for it: {slower}; --precision fp32 learns the same"
    if config.warmup_steps(samples) == config.total_steps(samples):
        yield f"{_warmup_key(config)}: all {config.total_steps(samples)} steps are warm-up, so the rate never falls; lower it"
    if 2 * batch > samples:
        step = f"a step takes {100 * batch / samples:.0f} % of the {samples} images"
        yield f"global_batch_size: {batch}: {step}, so others of an image's class are most of its negatives; lower it"
    if world_size > 3 and (each := batch // world_size) < 32:
        dealt = f"is dealt to {world_size} ranks, {each} images each; it counts the images of all ranks"
        yield f"global_batch_size: {batch}: {dealt}: with 256 each it is {256 * world_size}"
    if short_side is not None and side > short_side > 0:
        median = f"is more than the images have: the median's short side is {short_side:g} pixels"
        yield f"views.image_size: {side}: {median}, so most views are enlarged; {short_side:g} costs less and shows the same"


def check_machine(config: Config, side: int, ranks: int, world_size: int) -> None:
    """Refuse what `ranks` of the run cannot have on this machine. `side`: of a view, in pixels.

    Each sum is a part of what they need, so a run that fits is never refused; `plan` has the whole.
    """
    for name in (name for name in LOGGERS if getattr(config.log, name)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, as its own runs make one, is no package
            cure = f"pip install {' '.join(map(repr, LOGGERS[name]))}, or leave it out"
            raise ConfigError(f"log.{name}: True: the package {name} is not installed; {cure}")
    workers, model, memory = config.data.workers, config.model, memory_bytes()
    has = f"this machine has {memory / 2**30:.1f} GiB"
    if (processes := ranks * (workers + 1)) > most_processes():
        of_each = f"{workers} for each of {ranks} ranks are {processes} processes"
        raise ConfigError(f"data.workers: {of_each}; this machine allows {most_processes()}; lower it")
    on_cpu = config.device == "cpu"
    if config.compile and on_cpu:
        cpp_compiler()
    images, channels = 2 * ranks * config.global_batch_size // world_size, config.data.channels
    number = 4 if on_cpu else config.data.bit_depth // 8  # before a GPU they are no floats yet
    if (views := images * channels * side**2 * number) > memory:
        product = f"{images} views of {channels} x {side} x {side} x {number} bytes a step are {views / 2**30:.1f} GiB"
        raise ConfigError(f"views.image_size: {side}: {product}; {has}; lower it, or global_batch_size")
    hidden, dim, depth = model.projector_hidden, model.projector_dim, model.projector_depth
    weights = (hidden**2 * (depth - 2) + hidden * dim) * config.number_bytes if depth > 1 else 0
    if weights * (ranks if on_cpu else 1) > memory:
        layers = f"the layers between {hidden} and {dim} numbers are {weights / 2**30:.1f} GiB of weights a rank"
        raise ConfigError(f"model.projector_hidden: {hidden}: {layers}; {has}; lower it, projector_dim or projector_depth")
    if depth and (gram := dim**2 * 8) > memory:
        rank = f"the products of {dim} numbers with each other, for the effective rank, are {gram / 2**30:.1f} GiB"
        raise ConfigError(f"model.projector_dim: {dim}: {rank}; {has}; lower it")
