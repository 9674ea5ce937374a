"""Who reads what, when: pure functions of (seed, epoch, position). So a run's place in its data is a step number.

An epoch shuffles the shards, then the samples inside each window of shards, and is cut into global batches. No image is
in an epoch twice; the N mod B images that do not fill a batch are left out, others every epoch. Draws are counted: those of
any window are had without the ones before. So a step costs its own windows, however many images there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_DRAWS_A_COUNT = 4  # of a Philox generator


def _draws(seed: int, epoch: int, first: int, count: int) -> NDArray[np.uint64]:
    """Return the draws of an epoch from number `first` on."""
    # Raw counter-based draws that are sorted, and not Generator.permutation, which numpy may change between versions.
    key = np.array([seed, epoch], dtype=np.uint64)
    number, over = divmod(first, _DRAWS_A_COUNT)
    return np.random.Philox(key=key, counter=number).random_raw(over + count)[over:]


def _sorting(keys: NDArray[np.uint64]) -> Rows:
    """Return the indices that sort stably. Where no key comes twice there is one order only, and a sort four times faster."""
    order = np.argsort(keys)
    ordered = keys[order]
    return np.argsort(keys, kind="stable") if (ordered[1:] == ordered[:-1]).any() else order


@dataclass(frozen=True)
class Plan:
    """The whole run's order, cut for one rank. `plan[step]` needs no state; the windows in hand are kept.

    shard_sizes: int64 [shards], samples in each; manifest rows are numbered through the shards. Samples of one window of
    shards are mixed with each other, so a reader needs no more than two windows' files open.

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

    def slots(self) -> Rows:
        """Return this rank's positions in a global batch. They are int64 [n], micro-batch after micro-batch."""
        slots = np.arange(self.global_batch_size).reshape(self.micro_batches, self.world_size, -1)
        return slots[:, self.rank].ravel()

    def __getitem__(self, step: int) -> tuple[int, Rows]:
        """Return (epoch, this rank's manifest rows) of a global step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return epoch, self._rows(epoch, start, start + self.global_batch_size)[self.slots()]

    def shards_around(self, step: int) -> tuple[Rows, Rows]:
        """Return (shards of a step's windows, shards of the next window). Both are int64, in the order of need.

        After an epoch's last window comes the next epoch's first. All ranks get the same shards: those of the step, and more.
        Spares are left out.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        shards, ends = self._windows(epoch)
        first = position * self.global_batch_size
        low, high = _places(ends, first, first + self.global_batch_size)
        now = shards[low * self.window : (high + 1) * self.window]
        ahead = shards[(high + 1) * self.window : (high + 2) * self.window]
        if position + 1 == self.steps_per_epoch or not len(ahead):  # windows of left-over images alone may follow
            ahead = self._windows(epoch + 1)[0][: self.window]
        return now, ahead

    def shards_at_once(self, steps: int) -> int:
        """Return the most shards that any `steps` consecutive steps read."""
        rows = np.sort(self.shard_sizes)[: self.window].sum()
        windows = -(-steps * self.global_batch_size // max(1, int(rows))) + 1
        return min(len(self.shard_sizes), windows * self.window + len(self.shard_sizes) % self.window)

    def spares(self, step: int, slot: int) -> Iterator[int]:
        """Yield the rows that may replace the image at `slot`, best first. `slot` is its place in the global batch.

        The epoch's images are dealt into global_batch_size columns, one a slot; the left-over ones too. A spare comes
        from its slot's own column: first the left-over image, then those of the following steps, cyclically. Columns are
        disjoint, so whatever fails on whatever rank, nothing is in one batch twice, and no rank needs to ask another.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        steps, left_over = self.steps_per_epoch, [self.steps_per_epoch] * (slot < self.left_over)
        for step_of_epoch in (*left_over, *range(position + 1, steps), *range(position)):
            place = step_of_epoch * self.global_batch_size + slot
            yield int(self._rows(epoch, place, place + 1)[0])

    def _rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the manifest rows at these positions of an epoch."""
        ends = self._windows(epoch)[1]
        low, high = _places(ends, start, stop)
        rows = np.concatenate([self._window(epoch, number) for number in range(low, high + 1)])
        first = ends[low] - len(self._window(epoch, low))
        return rows[start - first : stop - first]

    @cached_property
    def _starts(self) -> Rows:
        return np.cumsum(self.shard_sizes) - self.shard_sizes

    @cached_property
    def _kept(self) -> dict[tuple[int, int], Rows]:
        return {}

    def _window(self, epoch: int, number: int) -> Rows:
        """Return the rows of an epoch's window, mixed. Those of a step, and some more, are kept."""
        if (rows := self._kept.pop((epoch, number), None)) is None:
            shards, ends = self._windows(epoch)
            shards = shards[number * self.window : (number + 1) * self.window]
            rows = np.concatenate([np.arange(self._starts[s], self._starts[s] + self.shard_sizes[s]) for s in shards])
            before = len(self.shard_sizes) + int(ends[number]) - len(rows)
            rows = rows[_sorting(_draws(self.seed, epoch, before, len(rows)))]
        self._kept[epoch, number] = rows  # the newest last
        while len(self._kept) > self._most_kept:
            del self._kept[next(iter(self._kept))]
        return rows

    @cached_property
    def _most_kept(self) -> int:
        return 2 + self.shards_at_once(1) // self.window

    def _windows(self, epoch: int) -> tuple[Rows, Rows]:
        """Return (the epoch's shards in order, position of each window's end). Two epochs are kept."""
        kept: dict[int, tuple[Rows, Rows]] = self.__dict__.get("_shards", {})
        if epoch not in kept:
            shards = _sorting(_draws(self.seed, epoch, 0, len(self.shard_sizes)))
            ends = np.cumsum(np.add.reduceat(self.shard_sizes[shards], np.arange(0, len(shards), self.window)))
            kept = {old: windows for old, windows in kept.items() if old >= epoch - 1} | {epoch: (shards, ends)}
            self.__dict__["_shards"] = kept
        return kept[epoch]


def _places(ends: Rows, start: int, stop: int) -> tuple[int, int]:
    """Find the first and the last window of these positions."""
    low, high = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
    return low, high
