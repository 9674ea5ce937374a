"""Define settings of evaluation, neighbours, finetuning and embedding. The import is quick."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from simclr_dist.config.ranges import Count, NonNegative, Positive, Range, Share, Workers, check_ranges
from simclr_dist.system.errors import ConfigError

POLL = 30.0  # seconds
SUBSETS = 3  # of a share of the labels; as many finetunings
_LAYER = re.compile(r"projector\.[1-9][0-9]*")

_ONLY_FOR = {
    "k": "knn", "temperature": "knn", "l2": "linear", "max_iter": "linear", "sgd_epochs": "sgd", "mlp_epochs": "mlp",
    "finetune_epochs": "finetune",
}  # fmt: skip

Precision = Literal["fp32", "tf32", "bf16"]
Protocol = Literal["knn", "linear", "sgd", "mlp", "finetune"]


@dataclass(frozen=True)
class FeatureSettings:
    """How features are made. Raises ConfigError for the first value out of its range."""

    batch_size: Count = 256
    """Images that the encoder sees at a time, on each rank."""
    workers: Workers = 2
    """Reading processes beside each rank."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: fp32, TF32 in its convolutions (of GPUs), or bf16 autocast; features are stored as fp32."""
    layer: str = "h"
    """What the features are: h, projector.N or z; the last two need the projector beside the encoder."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SearchSettings(FeatureSettings):
    """How the features of shards are had."""

    features: str | None = None
    """Folder of feature files: those that fit are used, others added (default: RUN/eval/features)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features is not None and (not self.features or Path(self.features).is_file()):
            raise ConfigError(f"features: {self.features!r}: is not a folder; name one, it is made if it is not there")


@dataclass(frozen=True)
class Settings(SearchSettings):
    """How features are classified."""

    k: Count | None = None
    """Neighbours that vote (default: chosen on --val, else a twentieth of the training images, from 10 to 200)."""
    temperature: Positive | None = None
    """A neighbour's weight is exp(cosine / temperature) (default: chosen on --val, else 0.1)."""
    l2: NonNegative | None = None
    """Weight penalty of the linear probe (default: chosen on --val, else on held-out training images)."""
    max_iter: Count = 1000
    """Limit of the linear probe's iterations."""
    seed: Annotated[int, Range(least=0, below=2**63)] = 0
    """Decides the untrained encoder's weights, and the crops of the protocol sgd."""
    baselines: bool = True
    """Measure raw pixels and an untrained encoder of the same shape, too."""
    protocols: tuple[Protocol, ...] = ("knn", "linear")
    """Some of knn, linear (L-BFGS), sgd (linear, as in the paper), mlp and finetune, with commas between."""
    labels: tuple[Share, ...] | None = None
    """Shares of the training labels, like 0.01/0.1/1: how many labels does an encoder save? (default: all)"""
    sgd_epochs: Count = 90
    """Epochs of the protocol sgd; the default is the paper's."""
    mlp_epochs: Count = 50
    """Epochs of the protocol mlp, with --val at most."""
    finetune_epochs: Count | None = None
    """Epochs of the protocol finetune (default: the paper's, 60 below 0.1 of the labels, else 30)."""
    keep_features: bool = True
    """Use the feature files that fit, and write the others."""

    @property
    def measured(self) -> list[tuple[str, Protocol, float]]:
        """List what is measured: its name in results, protocol, share of labels."""
        every = (
            (protocol, share)
            for protocol in self.protocols
            for share in self.labels or (1.0,)
            if protocol != "sgd" or share == 1
        )
        return [(protocol if share == 1 else f"{protocol}@{share:g}", protocol, share) for protocol, share in every]

    @property
    def choosing(self) -> set[str]:
        """Name the protocols that choose something on validation images."""
        free = {"knn": None in (self.k, self.temperature), "linear": self.l2 is None, "mlp": True}
        return {name for name in self.protocols if free.get(name)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ConfigError(f"protocols: {','.join(self.protocols)!r} must name one protocol or more, each once")
        if self.labels is not None and len({f"{share:g}" for share in self.labels}) < max(1, len(self.labels)):
            raise ConfigError(f"labels: {'/'.join(map(str, self.labels))} must be one share or more, each once")
        if "sgd" in self.protocols and 1 not in (self.labels or (1,)):
            raise ConfigError("labels: the protocol sgd learns from all of them; add 1, or leave it out")
        if "finetune" in self.protocols:
            check_alone("finetune")
        if self.features is not None and not self.keep_features:
            raise ConfigError(f"features: {self.features!r}: has no effect with --no-features")
        for name, protocol in _ONLY_FOR.items():
            if (value := getattr(self, name)) != getattr(Settings, name) and protocol not in self.protocols:
                raise ConfigError(f"{name}: {value}: has no effect without the protocol {protocol}; leave it out")
        if self.seed and not self.baselines and "sgd" not in self.protocols:
            raise ConfigError(f"seed: {self.seed}: has no effect without baselines and the protocol sgd; leave it out")


@dataclass(frozen=True)
class EmbedSettings(FeatureSettings):
    """How the features of images are written."""

    skip_bad: bool = False
    """Leave out and count images that cannot be read, instead of refusing."""
    map: str | None = None
    """Picture (.png) of the images as points by two principal components, coloured by class; of few, as thumbnails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map is not None and (Path(self.map).suffix != ".png" or not Path(self.map).absolute().parent.is_dir()):
            raise ConfigError(f"map: {self.map!r}: the map is a .png file, in a folder that is there")


@dataclass(frozen=True)
class NeighbourSettings(SearchSettings):
    """How neighbours are found."""

    k: Count = 10
    """Nearest images of each picture."""


@dataclass(frozen=True)
class DuplicateSettings(SearchSettings):
    """How near-duplicates are found."""

    # 2,000 of CIFAR-10's test images and their copies by an encoder of 900 steps, among 10,000 images: .97 finds 98 to 100 % of
    # the copies (JPEG of quality 50, half as large, a pixel cut off all round, 15 % brighter) beside 306 of 20 million other
    # pairs, .98 finds 93 to 100 % beside 86, .95 finds 99 to 100 % beside 2,323. Of an untrained encoder 107,470 are above .97.
    above: Annotated[float, Range(above=0, below=1)] = 0.97
    """Cosine above which two images are near-duplicates; what is usual depends on the encoder, and is printed."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How an encoder is trained further. Raises ConfigError for the first value out of its range."""

    labels: Share
    """Share of the training labels: 0.01, 0.1 (as many of each class), 1 (all)."""
    start: str = "encoder"
    """Weights to start from: encoder, a projector's layer (projector.1), random."""
    seeds: Count = 3
    """Runs, seeds 0 to seeds - 1: each has its own subset, head and order."""
    epochs: Count | None = None
    """Epochs of each run (default: the paper's, 60 below 0.1 of the labels, else 30)."""
    batch_size: Annotated[int, Range(least=2)] = 256
    """Images a step; fewer where the subset is smaller."""
    base_lr: Positive = 0.05
    """Learning rate for 256 images a step."""
    workers: Workers = 2
    """Reading processes."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.start not in ("encoder", "random") and not _LAYER.fullmatch(self.start):
            raise ConfigError(f"start: {self.start!r} must be encoder, random, or a layer of the projector like projector.1")

    @property
    def epochs_used(self) -> int:
        """Return `epochs`, else the paper's (appendix B.5). Those are 60 for 1 % of the labels; 30 for 10 % and more."""
        return self.epochs if self.epochs is not None else 30 if self.labels >= 0.1 else 60


def check_watch(run: str | Path, poll: float) -> None:
    """Raise ConfigError for a folder that is no run's. Also for seconds that nobody can wait."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"--watch: {str(run)!r} is not a run folder (it has no config.yaml); start the training first")
    if not 0 < poll < math.inf:
        raise ConfigError(f"--poll: {poll:g}: must be above 0, and finite")


def check_val(settings: Settings, val: str | None) -> None:
    """Raise ConfigError for validation images that have nothing to choose."""
    if val is not None and not settings.choosing:
        raise ConfigError(f"val: {val}: there is nothing to choose by it, as all is set; leave it out")


def check_alone(verb: str) -> None:
    """Raise ConfigError under torchrun: the verb runs in one process."""
    if "WORLD_SIZE" in os.environ:
        started = f"this one is of {os.environ['WORLD_SIZE']} that torchrun started"
        raise ConfigError(f"{verb}: runs in one process, and {started}; start it without torchrun, or unset WORLD_SIZE")
