"""Who reads what, when: pure functions of (seed, epoch, position). So a run's place in its data is a step number.

An epoch shuffles the shards, then the samples inside each window of shards, and is cut into global batches. No image is
in an epoch twice; the N mod B images that do not fill a batch are left out, others every epoch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def epoch_order(shard_sizes: Rows, *, seed: int, epoch: int, window: int) -> Rows:
    """Return the order in which epoch `epoch` reads all manifest rows. It is a permutation, int64 [N].

    shard_sizes: int64 [shards], samples in each; rows are numbered through the shards. Samples of one window of shards are
    mixed with each other, so a reader needs no more than two windows' files open.
    """
    # Sorting raw counter-based draws, and not Generator.permutation, which numpy may change between versions.
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)[:-1]])
    shards = _sorting(draws.random_raw(len(shard_sizes)))
    parts = []
    for first in range(0, len(shards), window):
        rows = np.concatenate([np.arange(starts[s], starts[s] + shard_sizes[s]) for s in shards[first : first + window]])
        parts.append(rows[_sorting(draws.random_raw(len(rows)))])
    return np.concatenate(parts).astype(np.int64, copy=False)


def _sorting(keys: NDArray[np.uint64]) -> Rows:
    """Return the indices that sort stably. Where no key comes twice there is one order only, and a sort four times faster."""
    order = np.argsort(keys)
    ordered = keys[order]
    return np.argsort(keys, kind="stable") if (ordered[1:] == ordered[:-1]).any() else order


@dataclass(frozen=True)
class Plan:
    """The whole run's order, cut for one rank. `plan[step]` needs no state but the epoch in hand.

    A global batch is cut into `micro_batches`, and each of these into the ranks' equal slices. So micro-batch k holds the same
    images at any world size. Both must divide global_batch_size.
    """

    shard_sizes: Rows
    seed: int
    global_batch_size: int
    micro_batches: int = 1
    window: int = 16
    rank: int = 0
    world_size: int = 1

    @property
    def samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch_size

    @property
    def left_over(self) -> int:
        """Count the images that an epoch leaves out. Each epoch leaves out other ones."""
        return self.samples % self.global_batch_size

    def order(self, epoch: int) -> Rows:
        """Return the epoch's permutation. The last one is kept."""
        kept: dict[int, Rows] = self.__dict__.get("_order", {})
        if epoch not in kept:
            kept = {epoch: epoch_order(self.shard_sizes, seed=self.seed, epoch=epoch, window=self.window)}
            self.__dict__["_order"] = kept
        return kept[epoch]

    def slots(self) -> Rows:
        """Return this rank's positions in a global batch. They are int64 [n], micro-batch after micro-batch."""
        slots = np.arange(self.global_batch_size).reshape(self.micro_batches, self.world_size, -1)
        return slots[:, self.rank].ravel()

    def __getitem__(self, step: int) -> tuple[int, Rows]:
        """Return (epoch, this rank's manifest rows) of a global step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return epoch, self.order(epoch)[start : start + self.global_batch_size][self.slots()]

    def shards_around(self, step: int) -> tuple[Rows, Rows]:
        """Return (shards of a step's windows, shards of the next window). Both are int64, in the order of need.

        After an epoch's last window comes the next epoch's first. All ranks get the same shards: those of the step, and more.
        Spares are left out.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        shards, ends = self._windows(epoch)
        first = position * self.global_batch_size
        low, high = np.searchsorted(ends, [first, first + self.global_batch_size - 1], side="right")
        now = shards[low * self.window : (high + 1) * self.window]
        ahead = shards[(high + 1) * self.window : (high + 2) * self.window]
        if position + 1 == self.steps_per_epoch or not len(ahead):  # windows of left-over images alone may follow
            ahead = self._windows(epoch + 1)[0][: self.window]
        return now, ahead

    def shards_at_once(self, steps: int) -> int:
        """Return the most shards that any `steps` consecutive steps read."""
        rows = np.sort(self.shard_sizes)[: self.window].sum()
        windows = -(-steps * self.global_batch_size // int(rows)) + 1
        return min(len(self.shard_sizes), windows * self.window + len(self.shard_sizes) % self.window)

    def _windows(self, epoch: int) -> tuple[Rows, Rows]:
        """Return (the epoch's shards in order, position of each window's end). Two epochs are kept."""
        kept: dict[int, tuple[Rows, Rows]] = self.__dict__.get("_shards", {})
        if epoch not in kept:
            draws = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
            shards = _sorting(draws.random_raw(len(self.shard_sizes)))  # as `epoch_order` does first
            ends = np.cumsum(np.add.reduceat(self.shard_sizes[shards], np.arange(0, len(shards), self.window)))
            kept = {old: windows for old, windows in kept.items() if old >= epoch - 1} | {epoch: (shards, ends)}
            self.__dict__["_shards"] = kept
        return kept[epoch]

    def spares(self, step: int, slot: int) -> Rows:
        """Return the rows that may replace the image at `slot`, best first. `slot` is its place in the global batch.

        The epoch's images are dealt into global_batch_size columns, one a slot; the left-over ones too. A spare comes
        from its slot's own column: first the left-over image, then those of the following steps, cyclically. Columns are
        disjoint, so whatever fails on whatever rank, nothing is in one batch twice, and no rank needs to ask another.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        column = self.order(epoch)[slot :: self.global_batch_size]
        steps = self.steps_per_epoch
        following = [(position + k) % steps for k in range(1, steps)]
        return np.concatenate([column[steps:], column[following]]).astype(np.int64)
