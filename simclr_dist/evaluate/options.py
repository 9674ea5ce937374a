"""What an evaluation can be told: defaults, command-line options and their limits, without importing torch."""

import argparse
import dataclasses
import math
from pathlib import Path

from simclr_dist.errors import ConfigError

K = 200
TEMPERATURE = 0.1
# One value for every row of a table. On 5,000 held-out training images of CIFAR-10 a short SimCLR run's features prefer 1e-3
# (58.2 against 57.3 %); raw pixels prefer this one (by 1.7 points on test images). It stays at what favours the baseline.
L2 = 1e-2
MAX_ITER = 1000
BATCH_SIZE = 256
WORKERS = 2
POLL = 30.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How features are made and classified; raises ConfigError for the first value out of its range.

    `seed` is that of the untrained encoder's weights, `baselines` whether it and raw pixels are measured too.
    """

    k: int = K
    temperature: float = TEMPERATURE
    l2: float = L2
    max_iter: int = MAX_ITER
    batch_size: int = BATCH_SIZE
    workers: int = WORKERS
    seed: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_iter", 1), ("batch_size", 1), ("workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}: {value}: must be {least} or more")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: {self.temperature}: must be above 0, and finite")
        if not 0 <= self.l2 < math.inf:
            raise ConfigError(f"l2: {self.l2}: must be 0 or more, and finite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist eval`."""
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help="an exported encoder: RUN/encoders/step-XXXXXXXX.safetensors")
    add("--watch", metavar="RUN", help="evaluate every encoder of this run once, as it is exported, until the run has ended")
    add("--poll", type=float, metavar="SECONDS", help=f"with --watch: how often to look for encoders (default: {POLL:g})")
    add("--train", required=True, metavar="SHARDS", help="folder of labelled shards that kNN and the probe learn from")
    add("--test", required=True, metavar="SHARDS", help="folder of labelled shards that the accuracy is measured on")
    add("--k", type=int, default=K, help="neighbours that vote, at most the training images (default: %(default)s)")
    add(
        "--temperature", type=float, default=TEMPERATURE, help="a neighbour's weight is exp(cosine / temperature) (%(default)s)"
    )
    add("--l2", type=float, default=L2, help="weight penalty of the linear probe, on standardised features (%(default)s)")
    add("--max-iter", type=int, default=MAX_ITER, help="limit of the linear probe's iterations (%(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images that an encoder sees at a time (%(default)s)")
    add("--workers", type=int, default=WORKERS, help="reading processes beside each rank (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the untrained encoder's weights (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (%(default)s)")
    add("--out", metavar="JSON", help="the result's file (default: RUN/eval/step-XXXXXXXX.json); an older one is replaced")
    add(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="leave out raw pixels and the untrained encoder of the same shape",
    )


def check_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings among `add_arguments`' options; raises ConfigError for what is out of range or does not go together."""
    if arguments.encoder is None and arguments.watch is None:
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


def check_watch(run: str | Path, poll: float) -> None:
    """Raises ConfigError for a folder that is no run's, and for seconds that nobody could wait."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"--watch: {str(run)!r} is not a run folder (it has no config.yaml); start the training first")
    if not 0 < poll < math.inf:
        raise ConfigError(f"--poll: {poll:g}: must be above 0, and finite")
