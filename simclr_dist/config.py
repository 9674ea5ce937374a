"""A run's settings: frozen dataclasses, filled from a strict YAML file, then from the command line.

Every check here works without torch, so that a typo answers at once and before any process starts.
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simclr_dist.config_reader import leaves, merge, pairs, read_yaml, suggest
from simclr_dist.errors import ConfigError

ENCODERS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
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


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and who reads them."""

    shards: str = ""
    """Training shards: a folder with its manifest, the URL of one, or tars like shards/train-{000000..000099}.tar."""
    reader: Literal["manifest", "stream"] = "manifest"
    """`stream` reads tars without a manifest: no exact epochs, and no resume in the middle of one."""
    workers: int = 2
    """Reading processes beside each rank; 0 reads in the rank itself."""
    window: int = 16
    """Shards that are mixed with each other by the shuffle, and kept open by a reader."""
    on_bad_sample: Literal["error", "replace"] = "error"
    """What an unreadable image does: end the run, or give its place to a spare of the same epoch."""
    max_bad_samples: int = 100
    """With `replace`: more different bad images than this end the run all the same."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """Decode all images once and hold them in each rank's memory, shared with its workers; auto: up to 1 GiB of pixels."""
    cache: str = ""
    """Folder for remote shards, on a local disk; default: $SIMCLR_DIST_CACHE, else ~/.cache/simclr_dist/shards."""
    cache_gib: float | None = None
    """Most that the cache holds, in GiB; default: $SIMCLR_DIST_CACHE_GIB, else 100."""
    retry_minutes: float = 3.0
    """How long a server that fails is asked again before the run ends."""
    samples: int | None = None
    """With `reader: stream`: how many images the tars hold in all, which is the length of an epoch."""
    shuffle_buffer: int = 1000
    """With `reader: stream`: encoded images that each worker holds and mixes."""
    allow_pipe: bool = False
    """With `reader: stream`: let shards be `pipe:` commands, which a shell runs."""


@dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image; what is not set comes from the preset."""

    preset: Literal["imagenet", "small", "blog"] = "imagenet"
    """Named strengths: the paper's for ImageNet, the paper's for small images, the introductory blog's."""
    image_size: int | None = None
    """Side of a view in pixels."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest part of the image's area that a crop takes."""
    crop_ratio: tuple[float, float] | None = None
    """Smallest and largest width / height of a crop before it is resized."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How a crop is resized (always antialiased)."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Probability of colour jitter."""
    brightness: float | None = None
    """Strength of brightness jitter."""
    contrast: float | None = None
    """Strength of contrast jitter."""
    saturation: float | None = None
    """Strength of saturation jitter."""
    hue: float | None = None
    """Strength of hue jitter, at most 0.5."""
    gray: float | None = None
    """Probability that a view loses its colour."""
    blur: float | None = None
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] | None = None
    """Smallest and largest standard deviation of the blur, in pixels."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue on the scale 0-1."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue on the scale 0-1."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projector."""

    encoder: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Architecture; resnet10 is a small one for CPUs (base width 16), the others are torchvision's."""
    width: Literal[1, 2, 4] = 1
    """Multiplies every width of the encoder, as in the paper's 2x and 4x."""
    stem: Literal["imagenet", "small", "small_stride2"] = "imagenet"
    """First layers: 7x7 stride 2 with max-pool; 3x3 for 32-pixel images; 3x3 with stride 2, four times cheaper."""
    init: Literal["random", "imagenet", "imagenet_or_random", "file"] = "random"
    """Start weights; `imagenet` are torchvision's supervised ones (downloaded)."""
    init_file: str = ""
    """With `init: file`: an encoder of ours (.safetensors)."""
    projector_depth: int = 2
    """Linear layers of the projector; 0 is none."""
    projector_hidden: int = 2048
    """Width of the projector's inner layers."""
    projector_dim: int = 128
    """Size of the embedding z."""
    projector_batch_norm: bool = True
    """BatchNorm after each layer of the projector."""

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `model.build_simclr`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if not key.startswith("init")}


@dataclass(frozen=True)
class LossConfig:
    """NT-Xent."""

    temperature: float = 0.1
    """Divides the cosine similarities; the paper's best: 0.1 on ImageNet, 0.5 on CIFAR-10."""
    decoupled: bool = False
    """Leave the positive out of the denominator (decoupled contrastive learning, DCL)."""
    scale: float = 1.0
    """Multiplies the loss; 2 gives that of SimCLR's official code, which adds the means over the two views."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: str = "lars"
    """`lars`, `sgd`, `adamw`, or `torch_optimizer.NAME` for one of torch-optimizer's."""
    base_lr: float = 0.3
    """Learning rate before the rule below."""
    lr_rule: Literal["linear", "sqrt", "constant"] = "linear"
    """Peak rate: base_lr * global_batch_size/256, base_lr * sqrt(global_batch_size), or base_lr."""
    weight_decay: float = 1e-6
    """L2 weight decay of weights (never of BatchNorm parameters and biases)."""
    momentum: float = 0.9
    """Momentum of lars and sgd."""
    trust_coefficient: float = 0.001
    """LARS's eta."""
    warmup_epochs: float = 10.0
    """Linear warm-up in epochs; ignored only when warmup_steps is set, which then decides."""
    warmup_steps: int | None = None
    """Linear warm-up in steps, instead of epochs."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk, in steps."""

    every: int = 500
    """Steps between full checkpoints (one more at the end)."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps none."""
    export_every: int = 0
    """Steps between exported encoders (one more at the end); 0 exports at the end alone."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown, in steps."""

    every: int = 10
    """Steps between lines of the log, of metrics.jsonl and of TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    views_every_epochs: int = 10
    """Epochs between pictures of views in TensorBoard, beside those of the first step; 0 shows those alone."""


@dataclass(frozen=True)
class ProbeConfig:
    """kNN on labelled images while the run goes on: watched, never used to select."""

    every_epochs: int = 0
    """Epochs between two probes; 0 is none."""
    shards: str = ""
    """Folder of labelled shards that the run does not train on."""
    images: int = 2000
    """How many of them, at most: one half votes on the other."""


@dataclass(frozen=True)
class Config:
    """A run."""

    run_folder: str = ""
    """Run folder: resumed when it holds this run, refused when it holds another."""
    seed: int = 0
    """Decides start weights, order and views."""
    global_batch_size: int = 4096
    """Images a step over all ranks: each anchor has 2 * (global_batch_size - 1) negatives."""
    micro_batches: int = 1
    """Pieces that the global batch goes through the encoder in; the BatchNorm group is one piece over all ranks."""
    epochs: float | None = None
    """Length of the run in epochs; set this or steps."""
    steps: int | None = None
    """Length of the run in steps; set this or epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto takes CUDA when there is a GPU."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Encoder arithmetic: fp32, bf16 autocast, fp16 autocast with loss scaling, or fp64 (to prove things)."""
    activation_checkpointing: bool = False
    """Keep each residual block's input alone and compute the rest again in the backward: less memory, more time."""
    channels_last: bool = True
    """Memory order of images and weights; pays on GPUs and CPUs."""
    compile: bool = False
    """torch.compile the encoder."""
    deterministic: bool = False
    """CUDA: only deterministic kernels, and gradients summed in rank order; slower."""
    max_skipped_steps: int = 10
    """Non-finite steps in a row (each skipped) that end the run as diverged."""
    check_ranks_every: int = 100
    """Steps between checks that all ranks hold the same bits (one more before each checkpoint); 0 leaves the others out."""
    timeout_minutes: float = 5.0
    """How long a rank waits for the others in a collective: a lost machine is noticed so late."""
    first_step_timeout_minutes: float = 30.0
    """The same until the first step is done: start-up, data and compilation take each rank a different time."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up, from the rule on the GLOBAL batch (paper, appendix B.1)."""
        scale = {"linear": self.global_batch_size / 256, "sqrt": math.sqrt(self.global_batch_size), "constant": 1.0}
        return self.optim.base_lr * scale[self.optim.lr_rule]

    def steps_per_epoch(self, samples: int) -> int:
        """Whole global batches in `samples` images."""
        return samples // self.global_batch_size

    def total_steps(self, samples: int) -> int:
        """Length of the run in steps."""
        return self.steps if self.steps is not None else round((self.epochs or 0) * self.steps_per_epoch(samples))

    def warmup_steps(self, samples: int) -> int:
        """Length of the warm-up in steps."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return round(self.optim.warmup_epochs * self.steps_per_epoch(samples))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: what config.yaml and a checkpoint hold."""
        return dataclasses.asdict(self)


_KEYS = tuple(key for key, _ in leaves(Config().to_dict()))

# What another start of the same run may set anew; everything else decides the result (the world size is not a setting).
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_folder",
        "epochs",
        "steps",
        "max_skipped_steps",
        "check_ranks_every",
        "timeout_minutes",
        "first_step_timeout_minutes",
        "data.shards",
        "data.workers",
        "data.max_bad_samples",
        "data.in_memory",
        "data.cache",
        "data.cache_gib",
        "data.retry_minutes",
        "data.allow_pipe",
    }
    | {"checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.export_every"}
    | {"log.every", "log.tensorboard", "log.views_every_epochs", "probe.every_epochs", "probe.shards", "probe.images"}
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, then `--key value` pairs, and check the whole; raises ConfigError with one line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {getattr(error, 'strerror', None) or error}") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    config: Config = merge(Config(), values, str(path), known=_KEYS)
    known = dict(leaves(Config().to_dict()))
    for key, value in pairs(overrides):
        # Text stands for itself: a folder may be called 2024, or hold a # or a colon.
        nested: Any = value if isinstance(known.get(key), str) else read_yaml(value, f"command line: --{key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = merge(config, nested, "command line", known=_KEYS)
    check(config, f"{path} with the command line" if overrides else str(path))
    return config


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The Config that a checkpoint or run folder holds as a plain dict."""
    config: Config = merge(Config(), values, source, known=_KEYS)
    return config


def difference(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for each setting that differs and must not change on resume."""
    before, after = dict(leaves(old.to_dict())), dict(leaves(new.to_dict()))
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and key not in MAY_CHANGE_ON_RESUME
    ]


def check(config: Config, source: str) -> None:
    """Refuse values out of range and settings that contradict each other."""

    def refuse(key: str, why: str) -> typing.NoReturn:
        value = functools.reduce(getattr, key.split("."), config)
        raise ConfigError(f"{source}: {key}: {value!r} {why}")

    at_least: dict[str, float] = {
        "seed": 0, "global_batch_size": 1, "micro_batches": 1, "max_skipped_steps": 1, "check_ranks_every": 0,
        "data.workers": 0, "data.window": 1, "data.max_bad_samples": 0, "data.shuffle_buffer": 1, "model.projector_depth": 0,
        "model.projector_hidden": 1, "model.projector_dim": 1, "optim.base_lr": 0, "optim.weight_decay": 0,
        "optim.trust_coefficient": 0, "optim.warmup_epochs": 0, "optim.clip_norm": 0, "checkpoint.every": 1,
        "checkpoint.keep_last": 1, "checkpoint.keep_every": 0, "checkpoint.export_every": 0, "log.every": 1,
        "log.views_every_epochs": 0, "probe.every_epochs": 0, "probe.images": 4,
    }  # fmt: skip
    for key, bound in at_least.items():
        if not functools.reduce(getattr, key.split("."), config) >= bound:  # type: ignore[operator]
            refuse(key, f"is too small; the least is {bound}")
    for name in ("flip", "jitter", "gray", "blur"):
        probability = getattr(config.views, name)
        if probability is not None and not 0 <= probability <= 1:
            refuse(f"views.{name}", "is not a probability from 0 to 1")
    for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
        strength = getattr(config.views, name)
        if strength is not None and not 0 <= strength <= most:
            refuse(f"views.{name}", f"is out of range; 0 to {most}")
    if (scale := config.views.crop_scale) is not None and not 0 < scale[0] <= scale[1] <= 1:
        refuse("views.crop_scale", "must be two numbers with 0 < smallest <= largest <= 1")
    for name in ("crop_ratio", "blur_sigma"):
        bounds = getattr(config.views, name)
        if bounds is not None and not 0 < bounds[0] <= bounds[1]:
            refuse(f"views.{name}", "must be two numbers with 0 < smallest <= largest")
    if config.views.std is not None and min(config.views.std) <= 0:
        refuse("views.std", "must be above 0")
    if config.views.image_size is not None and config.views.image_size < 8:
        refuse("views.image_size", "is too small; the least is 8")
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
    if not config.run_folder:
        refuse("run_folder", "is empty; name the run folder, like runs/my-run")
    if not config.data.shards:
        refuse("data.shards", "is empty; name a folder that `simclr-dist shard` wrote")
    if (config.steps is None) == (config.epochs is None):
        raise ConfigError(f"{source}: steps: {config.steps}, epochs: {config.epochs}: set exactly one of the two")
    if config.steps is not None and config.steps < 1:
        refuse("steps", "is too small; the least is 1")
    if config.epochs is not None and config.epochs <= 0:
        refuse("epochs", "must be above 0")
    if config.optim.warmup_steps is not None and config.optim.warmup_steps < 0:
        refuse("optim.warmup_steps", "is too small; the least is 0")
    if config.global_batch_size % config.micro_batches:
        refuse("micro_batches", f"does not divide global_batch_size {config.global_batch_size}")
    if (config.model.init == "file") != bool(config.model.init_file):
        refuse("model.init_file", f"contradicts model.init: {config.model.init!r}; set both, or neither")
    model = config.model
    if (model.init.startswith("imagenet") and (model.width, model.stem) != (1, "imagenet")) or (
        model.encoder == "resnet10" and model.init.startswith("imagenet")
    ):
        refuse("model.init", "needs torchvision's shape: width 1, stem imagenet, and an encoder other than resnet10")
    _check_data(config, source, refuse)
    if config.probe.shards and not config.probe.every_epochs:
        refuse("probe.shards", "has no effect while probe.every_epochs is 0; set that too, or leave it out")
    if config.probe.every_epochs and config.data.reader == "stream":
        refuse("probe.every_epochs", "does not go with data.reader: stream, whose images nobody can tell from the probe's")
    if config.probe.every_epochs and not config.probe.shards:
        refuse("probe.every_epochs", "needs probe.shards: a folder of labelled shards that the run does not train on")
    if config.probe.images != ProbeConfig.images and not config.probe.every_epochs:
        refuse("probe.images", "has no effect while probe.every_epochs is 0; leave it out")
    _check_optimizer(config, refuse)


def _check_data(config: Config, source: str, refuse: typing.Callable[[str, str], typing.NoReturn]) -> None:
    data, plain = config.data, DataConfig()
    pipe = data.shards.startswith("pipe:")
    remote = "://" in data.shards and not pipe
    if (
        remote
        and (shown := re.sub(r"\?.*", "?***", re.sub(r"(://)[^/?#]*@", r"\1***@", data.shards), flags=re.DOTALL)) != data.shards
    ):
        raise ConfigError(
            f"{source}: data.shards: {shown!r} holds a user, password or query, which would stand in config.yaml and in"
            " each encoder's card; put a login into ~/.netrc, or where the protocol's package looks for it"
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


def _check_optimizer(config: Config, refuse: typing.Callable[[str, str], typing.NoReturn]) -> None:
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
        raise ConfigError(f"global_batch_size: {batch} is larger than the {samples} images of {config.data.shards}")
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
        raise ConfigError(f"optim: a warm-up of {warmup} steps is longer than the run of {total}; shorten it")
