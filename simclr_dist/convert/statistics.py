"""Measure each channel's mean and standard deviation over a folder of shards."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.convert.workers import workers
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.system.errors import DataError
from simclr_dist.system.machine import cores
from simclr_dist.system.progress import Progress

_LEAST = 1e-6  # a step of 16 bits is 15 times as much; sums in float64 are good to a hundredth of it
_IMAGES = 256  # a task: a shard of others may have a million


@dataclass(frozen=True)
class Statistics:
    """Each channel's mean and standard deviation over all `images`. The scale is 0-1."""

    images: int
    kind: Kind
    mean: tuple[float, ...]
    std: tuple[float, ...]


def measure(folder: str | Path, *, processes: int | None = None, progress: bool = False) -> Statistics:
    """Decode every image of `folder` once. Each counts alike, whatever its size, for each gives as many views of one size.

    The sums within an image are exact, so the result is the same for any number of `processes`. Raises DataError for
    an image that cannot be read, and for a channel that is the same everywhere: it tells nothing, and cannot be scaled.
    """
    manifest = load_manifest(folder)
    tasks = [(str(folder), first, min(first + _IMAGES, len(manifest))) for first in range(0, len(manifest), _IMAGES)]
    sums = np.zeros((2, manifest.kind.channels))
    shown = Progress("measuring", len(manifest), "images", shown=progress)
    with shown, workers(min(processes or cores(), len(tasks)), (__name__, "simclr_dist.data.reader"), Path(folder)) as run:
        for (_, first, end), part in zip(tasks, run(_sums, tasks), strict=True):
            sums += part
            shown.done += end - first
    mean, square = sums / len(manifest)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if std.min() < _LEAST:
        raise DataError(f"{folder}: channel {int(std.argmin()) + 1} is the same in all pixels; shard the images without it")
    return Statistics(len(manifest), manifest.kind, tuple(mean.tolist()), tuple(std.tolist()))


def _sums(task: tuple[str, int, int]) -> NDArray[np.float64]:
    """Add up each image's mean and mean square. Returns [2, channels]."""
    from simclr_dist.data.reader import ShardDataset  # with torch, which the command line need not wait for

    folder, first, end = task
    images = ShardDataset(folder)
    total, most = np.zeros((2, images.kind.channels)), np.array([images.kind.most, images.kind.most**2], dtype=np.float64)
    for row in range(first, end):
        for number, channel in enumerate(images[row].image.numpy()):
            whole = channel.astype(np.uint64)
            total[:, number] += np.array([whole.sum(), (whole * whole).sum()]) / (channel.size * most)
    return total
