"""Check what a run reads, before there is a run. Needs no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config.settings import Config, ProbeConfig
from simclr_dist.config.together import check_fits
from simclr_dist.data.collection import find_tars, load_collection
from simclr_dist.data.manifest import Manifest
from simclr_dist.run.folder import newest_step
from simclr_dist.system.errors import ConfigError

_ROWS = 1 << 18


def check_inputs(config: Config, ranks: int, *, beside: str | Path = ".") -> int:
    """Return the number of a run's images. Raises ConfigError and DataError for what `ranks` ranks would refuse.

    Shards, length, the probe's shards and the file of start weights; a relative path starts from the folder `beside`.
    """
    data, probe, done = config.data, config.probe, newest_step(Path(config.run_folder))
    if data.samples is not None:
        find_tars(data.shards, allow_pipe=data.allow_pipe, beside=beside, ranks=ranks, workers=data.workers)
        check_fits(config, data.samples, ranks, done)
    else:
        images = load_collection(data.shards, beside=beside, kind=data.kind)
        check_fits(config, len(images), ranks, done)
        if probe.every_epochs:
            choose(probe, load_collection(probe.shards, beside=beside, kind=data.kind), images)
    if (file := config.model.init_file) and not done and not Path(beside, file).is_file():
        raise ConfigError(f"model.init_file: {file!r}: no such file; name one with start weights")
    return len(images) if data.samples is None else data.samples


def choose(probe: ProbeConfig, images: Manifest, train: Manifest) -> tuple[NDArray[np.int64], int]:
    """Choose rows of labelled images for the probe, evenly spread. Omits those in `train`; returns also their number.

    Raises ConfigError when too few remain.
    """
    labelled = np.flatnonzero(images.label >= 0)
    mine = images.sha256[labelled]
    heads, trained = np.unique(mine.view("<u8")[:, 0]), set[bytes]()
    for first in range(0, len(train), _ROWS):  # not all at once, of many millions
        some = train.sha256[first : first + _ROWS]
        trained.update(sha256.tobytes() for sha256 in some[np.isin(some.view("<u8")[:, 0], heads)])
    trained_on = np.array([sha256.tobytes() in trained for sha256 in mine], dtype=bool)
    free, left_out = labelled[~trained_on], int(trained_on.sum())
    if (count := min(probe.images, len(free))) < 4:
        raise ConfigError(
            f"probe.shards: {probe.shards!r} has {count} labelled images that the run does not train on"
            f" ({left_out} that it does); name others, as `simclr-dist shard --split` makes them"
        )
    return free[np.arange(count) * len(free) // count], left_out
