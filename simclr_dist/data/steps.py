"""Make the two views of a step's images. Worker processes crop ahead; colour comes when the views are wanted."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import Dataset

from simclr_dist.data.memory import DecodedImages
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels.kinds import kind_of
from simclr_dist.data.portions import Cut
from simclr_dist.data.reader import Images, Sample
from simclr_dist.data.views.colour import Colour, colour_views
from simclr_dist.data.views.crops import crop_view, turn_views
from simclr_dist.data.views.draws import ViewDraws, ViewSettings, draw_views
from simclr_dist.data.workers import SILENT_MINUTES, Loader
from simclr_dist.system import signals
from simclr_dist.system.errors import DataError, RankError, UnreachableError, WorkerError

# Coloured views of a step up to this size are kept for the gradient cache's second pass, instead of coloured again.
_KEPT_BYTES = 2**28


class Portion(NamedTuple):
    """Some images of one micro-batch, before colour.

    `crops`: uint8 or uint16 [n, c, s, s] of view a and of view b; `draws`: what `colour_views` has still to apply to each;
    `rows`: manifest rows, int64 [n], after replacements. `bad`: (manifest row, reason) of unreadable images met.
    """

    step: int
    crops: tuple[Tensor, Tensor]
    draws: tuple[ViewDraws, ViewDraws]
    rows: Tensor
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Views:
    """One rank's part of a step, before colour. It holds micro-batches, each in portions."""

    step: int
    micro_batches: list[list[Portion]]

    @property
    def portions(self) -> list[Portion]:
        return [portion for micro_batch in self.micro_batches for portion in micro_batch]

    @property
    def rows(self) -> Tensor:
        return torch.cat([portion.rows for portion in self.portions])

    @property
    def rows_of_each(self) -> list[Tensor]:
        return [torch.cat([portion.rows for portion in micro_batch]) for micro_batch in self.micro_batches]

    @property
    def bad(self) -> list[tuple[int, str]]:
        return [entry for portion in self.portions for entry in portion.bad]


class StepDataset(Dataset[Views]):
    """A map from global step to this rank's views. So a resumed run only starts at another index."""

    def __init__(self, images: Images, plan: Plan, settings: ViewSettings, *, replace_bad: bool = False) -> None:
        self.images, self.plan, self.settings, self.replace_bad = images, plan, settings, replace_bad
        micro_batch = plan.global_batch_size // plan.micro_batches // plan.world_size
        self.cut = Cut(plan.micro_batches, micro_batch, settings.image_size, kind_of(images).pixel_bytes)
        self._places = self.cut.places

    @property
    def portions(self) -> int:
        return len(self._places)

    def __getitem__(self, step: int) -> Views:
        return self.together([self.portion(step * self.portions + place) for place in range(self.portions)])

    def together(self, portions: Sequence[Portion]) -> Views:
        """Put a step together from all its portions."""
        each = self.portions // self.plan.micro_batches
        return Views(portions[0].step, [list(portions[start : start + each]) for start in range(0, len(portions), each)])

    def portion(self, number: int) -> Portion:
        """Make the portion of this number, counted through all steps. Raises RankError for a place without a readable image."""
        step, number = divmod(number, self.portions)
        epoch, rows = self.plan[step]
        self.images.expect(*self.plan.shards_around(step))
        place = self._places[number]
        bad: list[tuple[int, str]] = []
        samples = [
            self._first_readable(step, int(slot), int(row), bad)
            for row, slot in zip(rows[place], self.plan.slots()[place], strict=True)
        ]
        images = [sample.image for sample in samples]
        used = np.array([sample.row for sample in samples], dtype=np.int64)
        height, width = np.array([image.shape[1:] for image in images]).T
        size, how = self.settings.image_size, self.settings.interpolation
        crops, draws = [], []
        for view in range(2):
            drawn = draw_views(
                self.settings, seed=self.plan.seed, epoch=epoch, rows=used, view=view, heights=height, widths=width
            )
            if isinstance(self.images, DecodedImages) and self.images.of_one_size:
                crops.append(self.images.crops(used, drawn.box, drawn.flip, size, how))
            else:
                boxes = zip(images, drawn.box, drawn.flip, strict=True)
                crops.append(torch.stack([crop_view(image, box, flip, size, how) for image, box, flip in boxes]))
            turn_views(crops[view], drawn)
            draws.append(drawn)
        return Portion(step, (crops[0], crops[1]), (draws[0], draws[1]), torch.from_numpy(used), bad)

    def _first_readable(self, step: int, slot: int, row: int, bad: list[tuple[int, str]]) -> Sample:
        """Read the slot's own image. If it fails, read (with replace_bad) the first of its spares that can be read."""
        for each in itertools.chain([row], self.plan.spares(step, slot) if self.replace_bad else ()):
            try:
                return self.images[each]
            except UnreachableError as error:
                raise RankError(str(error)) from None
            except DataError as error:
                bad.append((each, str(error)))
        raise RankError(bad[-1][1])


def load_steps(
    dataset: StepDataset,
    steps: range,
    *,
    workers: int,
    pin_memory: bool = False,
    minutes: tuple[float, float] = (SILENT_MINUTES,) * 2,
) -> Iterator[Views]:
    """Load the views of each step of `steps`. `workers` processes make them ahead.

    Raises RankError when a step cannot be made, WorkerError when a worker has died or sends nothing for `minutes` (of the first
    step, of a later one). Beside the step in hand and the one being gathered, at most one more step's portions, or two for
    each worker, are made and wait. After a stop signal this process makes what a worker owes.
    """
    each = dataset.portions
    numbers = range(steps.start * each, steps.stop * each)
    loader: Loader[Portion] = Loader(
        dataset.portion,
        numbers,
        workers=workers,
        stop_between=False,  # a training only notes a stop, and a second Ctrl-C must not wait for a server
        minutes=minutes[0],
        prefetch_factor=dataset.cut.prefetch(workers) if workers else None,
        pin_memory=pin_memory,
    )
    portions = _portions(dataset, loader, numbers)
    for _ in steps:
        yield dataset.together([next(portions) for _ in range(each)])
        loader.minutes = minutes[1]


def _portions(dataset: StepDataset, loader: Loader[Portion], numbers: range) -> Iterator[Portion]:
    """Yield the loader's portions. When a worker fails at a stop, this process makes the rest."""
    done = 0
    try:
        for portion in loader:
            done += 1
            yield portion
    except WorkerError:
        if not signals.requested():
            raise
    yield from map(dataset.portion, numbers[done:])


class _MicroBatches(Sequence[tuple[Tensor, Tensor]]):
    """Micro-batches that are coloured each time they are indexed."""

    def __init__(
        self, views: Views, settings: ViewSettings, device: torch.device, colour: Colour, timed: AbstractContextManager[None]
    ) -> None:
        self._views, self._settings, self._device, self._colour, self._timed = views, settings, device, colour, timed

    def __len__(self) -> int:
        return len(self._views.micro_batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # nobody takes a slice
        with self._timed:
            a, b = (self._coloured(self._views.micro_batches[index], view) for view in range(2))
        return a, b

    def _coloured(self, micro_batch: list[Portion], view: int) -> Tensor:
        count, size = sum(len(portion.rows) for portion in micro_batch), self._settings.image_size
        whole = torch.empty(count, self._settings.channels, size, size, device=self._device)
        start = 0
        for portion in micro_batch:
            with record_function("host to device"):
                crops = portion.crops[view].to(self._device, non_blocking=True)
            with record_function("views"):
                self._colour(crops, portion.draws[view], self._settings, whole[start : start + len(crops)])
            start += len(crops)
        return whole


def coloured(
    views: Views,
    settings: ViewSettings,
    device: torch.device,
    *,
    colour: Colour = colour_views,
    timed: AbstractContextManager[None] | None = None,
) -> Sequence[tuple[Tensor, Tensor]]:
    """Colour, blur and normalise a step's micro-batches on `device`. Each is (view a, view b), float32 [n, c, s, s].

    Large views are not kept: each micro-batch is made whenever it is indexed, with the same bits every time.
    `colour` does it, all of it within `timed`.
    """
    micro_batches = _MicroBatches(views, settings, device, colour, timed or nullcontext())
    floats = 4 * sum(portion.crops[0].numel() + portion.crops[1].numel() for portion in views.portions)
    return list(micro_batches) if floats <= _KEPT_BYTES else micro_batches


def two_views(views: Views, settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colour a whole step at once. Returns two float32 [n, c, s, s]."""
    a, b = (torch.cat(view) for view in zip(*coloured(views, settings, device), strict=True))
    return a, b
