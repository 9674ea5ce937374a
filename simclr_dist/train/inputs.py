"""Check what a run reads, before there is a run. Needs no torch."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config.settings import Config, ProbeConfig
from simclr_dist.config.together import check_fits
from simclr_dist.data.collection import digest_of_tars, find_tars, load_collection
from simclr_dist.data.manifest import Manifest
from simclr_dist.run.folder import check_same_images, digest_before, newest_step
from simclr_dist.system.errors import ConfigError, DamagedError

_ROWS = 1 << 18


def check_inputs(config: Config, ranks: int, *, beside: str | Path = ".") -> int:
    """Return the number of a run's images. Raises ConfigError and DataError for what `ranks` ranks would refuse.

    Shards, length, the probe's shards and the file of start weights; a relative path starts from the folder `beside`.
    """
    data, run = config.data, Path(config.run_folder)
    done = newest_step(run)
    if (samples := data.samples) is not None:
        tars = find_tars(data.shards, allow_pipe=data.allow_pipe, beside=beside, ranks=ranks, workers=data.workers)
        digest = digest_of_tars(tars, samples)
    else:
        images = load_collection(data.shards, beside=beside, kind=data.kind)
        samples, digest = len(images), images.identity
    check_fits(config, samples, ranks, done)
    with suppress(DamagedError):  # the start says it, and writes that file anew
        check_same_images(config, digest_before(run), digest)
    if config.probe.every_epochs:
        choose(config.probe, load_collection(config.probe.shards, beside=beside, kind=data.kind), images)
    if (file := config.model.init_file) and not done and not Path(beside, file).is_file():
        raise ConfigError(f"model.init_file: {file!r}: no such file; name one with start weights")
    return samples


def choose(probe: ProbeConfig, images: Manifest, train: Manifest) -> tuple[NDArray[np.int64], int]:
    """Choose rows of labelled images for the probe, evenly spread. Omits those in `train`; returns also their number.

    Raises ConfigError when too few remain.
    """
    labelled = np.flatnonzero(images.label >= 0)
    mine = images.sha256[labelled]
    last = np.uint64(2**64 - 1)  # so that each has a place before the end
    heads, trained = np.unique(np.append(mine.view("<u8")[:, 0], last)), set[bytes]()
    for first in range(0, len(train), _ROWS):  # not all at once, of many millions
        some = train.sha256[first : first + _ROWS]
        head = some.view("<u8")[:, 0]
        trained.update(sha256.tobytes() for sha256 in some[heads[heads.searchsorted(head)] == head])  # np.isin sorts each time
    trained_on = np.array([sha256.tobytes() in trained for sha256 in mine], dtype=bool)
    free, left_out = labelled[~trained_on], int(trained_on.sum())
    if (count := min(probe.images, len(free))) < 4:
        raise ConfigError(
            f"probe.shards: {probe.shards!r} has {count} labelled images that the run does not train on"
            f" ({left_out} that it does); name others, as `simclr-dist shard --split` makes them"
        )
    return free[np.arange(count) * len(free) // count], left_out
