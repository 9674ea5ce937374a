"""What an evaluation can be told: defaults, command-line options and their limits, without importing torch."""

import argparse
import math

from simclr_dist.errors import ConfigError

K = 200
TEMPERATURE = 0.1
# One value for every row of a table. On 5,000 held-out training images of CIFAR-10 a short SimCLR run's features prefer 1e-3
# (58.2 against 57.3 %); raw pixels prefer this one (by 1.7 points on test images). It stays at what favours the baseline.
L2 = 1e-2
MAX_ITER = 1000
BATCH_SIZE = 256
WORKERS = 2
NAMES = ("k", "temperature", "l2", "max_iter", "batch_size", "workers", "seed", "baselines", "out", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist eval`; their names are the arguments of `job.evaluate`."""
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="an exported encoder: RUN/encoders/step-XXXXXXXX.safetensors")
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


def check_settings(*, k: int, temperature: float, l2: float, max_iter: int, batch_size: int, workers: int) -> None:
    """Raises ConfigError for the first setting out of its range."""
    for name, value, least in (("k", k, 1), ("max_iter", max_iter, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ConfigError(f"{name}: {value}: must be {least} or more")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: {temperature}: must be above 0, and finite")
    if not 0 <= l2 < math.inf:
        raise ConfigError(f"l2: {l2}: must be 0 or more, and finite")
