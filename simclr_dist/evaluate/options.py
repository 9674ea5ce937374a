"""What an evaluation can be told: defaults, command-line options and their limits, without importing torch."""

import argparse
import dataclasses
import math
from pathlib import Path

from simclr_dist.system.errors import ConfigError

K = 200
TEMPERATURE = 0.1
MAX_ITER = 1000
BATCH_SIZE = 256
WORKERS = 2
POLL = 30.0
PROTOCOLS = ("knn", "linear", "sgd", "mlp")
PRECISIONS = ("fp32", "bf16")
DEFAULT_PROTOCOLS = ("knn", "linear")
IMAGE_SIZE = 224
_OF_WEIGHTS = ("image_size", "width", "stem", "prefix")
SGD_EPOCHS = 90
MLP_EPOCHS = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How features are made and classified; raises ConfigError for the first value out of its range.

    `seed` is that of the untrained encoder's weights and of the crops that sgd draws, `baselines` whether that encoder and raw
    pixels are measured too, `l2` None when it is to be chosen on training images, `layer` what the features are (see
    `export.load_encoder`), `precision` that of the encoders' computation. `features` is the folder of feature files (None:
    `features.store.features_folder`), `keep_features` whether there is one at all.
    """

    k: int = K
    temperature: float = TEMPERATURE
    l2: float | None = None
    max_iter: int = MAX_ITER
    batch_size: int = BATCH_SIZE
    workers: int = WORKERS
    seed: int = 0
    baselines: bool = True
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    layer: str = "h"
    sgd_epochs: int = SGD_EPOCHS
    mlp_epochs: int = MLP_EPOCHS
    precision: str = "fp32"
    features: str | None = None
    keep_features: bool = True

    def __post_init__(self) -> None:
        limits = {"k": 1, "max_iter": 1, "batch_size": 1, "workers": 0, "sgd_epochs": 1, "mlp_epochs": 1}
        for name, least in limits.items():
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}: {value}: must be {least} or more")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed}: must be from 0 to below 2**63")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: {self.temperature}: must be above 0, and finite")
        if self.l2 is not None and not 0 <= self.l2 < math.inf:
            raise ConfigError(f"l2: {self.l2}: must be 0 or more, and finite")
        if not self.protocols or set(self.protocols) - set(PROTOCOLS) or len(set(self.protocols)) < len(self.protocols):
            raise ConfigError(
                f"protocols: {','.join(self.protocols)!r}: must be some of {', '.join(PROTOCOLS)}, with commas between"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: {self.precision!r}: must be one of {', '.join(PRECISIONS)}")
        if self.features is not None and not self.keep_features:
            raise ConfigError(f"features: {self.features!r}: has no effect with --no-features")
        if self.features is not None and (not self.features or Path(self.features).is_file()):
            raise ConfigError(f"features: {self.features!r}: is not a folder; name one, it is made if it is not there")
        for name in ("sgd", "mlp"):
            if getattr(self, f"{name}_epochs") != getattr(Settings, f"{name}_epochs") and name not in self.protocols:
                raise ConfigError(f"{name}_epochs: has no effect without the protocol {name}")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An encoder that another program wrote: see `foreign.load_foreign`."""

    arch: str
    weights: str
    image_size: int = IMAGE_SIZE
    width: int = 1
    stem: str = "imagenet"
    prefix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist eval`."""
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="an exported encoder: RUN/encoders/step-XXXXXXXX.safetensors")
    add("--watch", metavar="RUN", help="evaluate every encoder of this run once, as it is exported, until the run has ended")
    add("--poll", type=float, metavar="SECONDS", help=f"with --watch: how often to look for encoders (default: {POLL:g})")
    add(
        "--train",
        required=True,
        metavar="SHARDS",
        help="shards that kNN and the probe learn from; without any label: signals alone",
    )
    add("--test", required=True, metavar="SHARDS", help="shards that the accuracy is measured on")
    add("--k", type=int, default=K, help="neighbours that vote, at most the training images (default: %(default)s)")
    add(
        "--temperature", type=float, default=TEMPERATURE, help="a neighbour's weight is exp(cosine / temperature) (%(default)s)"
    )
    add(
        "--protocols",
        type=lambda names: tuple(names.split(",")),
        default=DEFAULT_PROTOCOLS,
        metavar="NAMES",
        help="some of knn, linear (L-BFGS), sgd (linear, as in the paper) and mlp, with commas between (default: knn,linear)",
    )
    add("--layer", default="h", help="h, or of an encoder with its projector: projector.N, z (default: %(default)s)")
    add("--arch", help="with --weights, in place of ENCODER: resnet18 ... resnet152")
    add("--weights", metavar="FILE", help="with --arch: a published checkpoint with torchvision's or timm's names")
    add("--image-size", type=int, help=f"with --weights: side of the images in pixels (default: {IMAGE_SIZE})")
    add("--width", type=int, help="with --weights: 1, 2 or 4 (default: 1)")
    add("--stem", help="with --weights: imagenet, small or small_stride2 (default: imagenet)")
    add("--prefix", help="with --weights: of the encoder's names, where the file holds several")
    add("--sgd-epochs", type=int, default=SGD_EPOCHS, help="of the protocol sgd; the paper's: %(default)s")
    add("--mlp-epochs", type=int, default=MLP_EPOCHS, help="of the protocol mlp (%(default)s)")
    add("--l2", type=float, help="weight penalty of the linear probe (default: chosen on a part of the training images)")
    add("--max-iter", type=int, default=MAX_ITER, help="limit of the linear probe's iterations (%(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images that an encoder sees at a time (%(default)s)")
    add("--workers", type=int, default=WORKERS, help="reading processes beside each rank (%(default)s)")
    add("--seed", type=int, default=0, help="of the untrained encoder's weights and of the protocol sgd's crops (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (%(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="of the encoder's computation (%(default)s)")
    add(
        "--features",
        metavar="FOLDER",
        help="of feature files: those that fit are used, others added (default: RUN/eval/features)",
    )
    add("--no-features", dest="keep_features", action="store_false", help="neither use feature files nor write any")
    add(
        "--out",
        metavar="JSON",
        help="the result's file (default: RUN/eval/step-XXXXXXXX.json); an older one of other settings is kept",
    )
    add(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="leave out raw pixels and the untrained encoder of the same shape",
    )


def check_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings among `add_arguments`' options; raises ConfigError for what is out of range or does not go together."""
    if (arguments.arch is None) != (arguments.weights is None):
        raise ConfigError("--arch and --weights go together")
    for name in _OF_WEIGHTS:
        if (value := getattr(arguments, name)) is not None and arguments.weights is None:
            raise ConfigError(f"--{name.replace('_', '-')}: {value}: goes with --weights only; an ENCODER knows its own")
    if arguments.weights is not None:
        if arguments.encoder is not None or arguments.watch is not None:
            raise ConfigError(f"--weights {arguments.weights!r}: name no ENCODER and no --watch beside it")
        if arguments.layer != "h":
            raise ConfigError(f"--layer: {arguments.layer!r}: a published checkpoint has h alone")
    elif arguments.encoder is None and arguments.watch is None:
        raise ConfigError("eval: name an ENCODER, or a run with --watch RUN")
    if arguments.watch is None:
        if arguments.poll is not None:
            raise ConfigError(f"--poll: {arguments.poll:g}: goes with --watch only")
    elif arguments.encoder is not None:
        raise ConfigError(f"eval: {arguments.encoder!r} and --watch {arguments.watch!r}: name one encoder, or one run")
    elif arguments.out is not None:
        raise ConfigError(f"--out: {arguments.out!r}: not with --watch, which writes RUN/eval/step-XXXXXXXX.json")
    else:
        check_watch(arguments.watch, POLL if arguments.poll is None else arguments.poll)
    return Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})


def foreign(arguments: argparse.Namespace) -> Foreign:
    """What `--arch`, `--weights` and the options that go with them name."""
    more = {name: value for name in _OF_WEIGHTS if (value := getattr(arguments, name)) is not None}
    return Foreign(arguments.arch, arguments.weights, **more)


def check_watch(run: str | Path, poll: float) -> None:
    """Raises ConfigError for a folder that is no run's, and for seconds that nobody could wait."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"--watch: {str(run)!r} is not a run folder (it has no config.yaml); start the training first")
    if not 0 < poll < math.inf:
        raise ConfigError(f"--poll: {poll:g}: must be above 0, and finite")
