"""The two views of a step's images, made ahead by worker processes, and coloured when they are wanted."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset

from simclr_dist.data.memory import DecodedImages
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import Images, Sample
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.crops import crop_view
from simclr_dist.data.views.draws import ViewDraws, ViewSettings, draw_views
from simclr_dist.system import signals
from simclr_dist.system.errors import DataError, RankError, UnreachableError

# What a worker makes at a time, crops of both views: its memory, and what waits for the step, come in such portions.
_PORTION_BYTES = 2**24
# Coloured views of a step up to this size are kept for the gradient cache's second pass, instead of coloured again.
_KEPT_BYTES = 2**28


class Portion(NamedTuple):
    """Some images of one micro-batch, before colour.

    `crops`: uint8 [n, 3, s, s] of view a and of view b; `draws`: what `colour_views` has still to apply to each; `rows`:
    int64 [n], after replacements. `bad`: (manifest row, reason) of unreadable images met; `failed` is the reason for which
    it cannot be made (a worker reports it, since an exception out of a worker would reach the user as a traceback).
    """

    step: int
    crops: tuple[Tensor, Tensor]
    draws: tuple[ViewDraws, ViewDraws]
    rows: Tensor
    bad: list[tuple[int, str]]
    failed: str | None = None


@dataclass(frozen=True)
class Views:
    """One rank's part of a step, before colour: micro-batches, each in portions."""

    step: int
    pieces: list[list[Portion]]

    @property
    def portions(self) -> list[Portion]:
        """All of them, in the order of the batch."""
        return [portion for piece in self.pieces for portion in piece]

    @property
    def rows(self) -> Tensor:
        """Manifest rows, int64 [n]."""
        return torch.cat([portion.rows for portion in self.portions])

    @property
    def bad(self) -> list[tuple[int, str]]:
        """(manifest row, reason) of unreadable images met."""
        return [entry for portion in self.portions for entry in portion.bad]


class StepDataset(Dataset[Views]):
    """A map from global step to this rank's views: a pure function, so a resumed run only starts at another index.

    `images` are read from shards, or decoded in memory; the views are the same.
    """

    def __init__(self, images: Images, plan: Plan, settings: ViewSettings, *, replace_bad: bool = False) -> None:
        self.images = images
        self.plan = plan
        self.settings = settings
        self.replace_bad = replace_bad
        piece = plan.global_batch_size // plan.micro_batches // plan.world_size
        most = max(1, _PORTION_BYTES // (2 * 3 * settings.image_size**2))
        # No larger than it must be, so that a piece's portions are alike.
        size = -(-piece // -(-piece // most))
        self.piece_portions = -(-piece // size)
        """How many portions a micro-batch has."""
        self._places = [
            slice(number * piece + start, number * piece + min(start + size, piece))
            for number in range(plan.micro_batches)
            for start in range(0, piece, size)
        ]

    @property
    def portions(self) -> int:
        """How many portions a step has."""
        return len(self._places)

    def __getitem__(self, step: int) -> Views:
        return self.together([self.portion(step, number) for number in range(self.portions)])

    def together(self, portions: Sequence[Portion]) -> Views:
        """A step from all its portions; raises RankError when one could not be made."""
        for portion in portions:
            if portion.failed is not None:
                raise RankError(portion.failed)
        each = self.piece_portions
        pieces = [list(portions[start : start + each]) for start in range(0, len(portions), each)]
        return Views(portions[0].step, pieces)

    def portion(self, step: int, number: int) -> Portion:
        """What a worker makes at a time."""
        epoch, rows = self.plan[step]
        self.images.expect(*self.plan.shards_around(step))
        place = self._places[number]
        bad: list[tuple[int, str]] = []
        samples = []
        for row, slot in zip(rows[place], self.plan.slots()[place], strict=True):
            sample = self._first_readable(step, int(slot), int(row), bad)
            if sample is None:
                return Portion(step, (torch.empty(0),) * 2, (), torch.empty(0), bad, failed=bad[-1][1])  # type: ignore[arg-type]
            samples.append(sample)
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
            draws.append(drawn)
        return Portion(step, (crops[0], crops[1]), (draws[0], draws[1]), torch.from_numpy(used), bad)

    def _first_readable(self, step: int, slot: int, row: int, bad: list[tuple[int, str]]) -> Sample | None:
        """The slot's own image, else (with replace_bad) the first of its spares that can be read."""
        try:
            return self.images[row]
        except DataError as error:
            bad.append((row, str(error)))
            if isinstance(error, UnreachableError):
                return None
        for spare in self.plan.spares(step, slot) if self.replace_bad else ():
            try:
                return self.images[int(spare)]
            except DataError as error:
                bad.append((int(spare), str(error)))
        return None


class _Portions(Dataset[Portion]):
    """Step x portions + number -> portion: what the workers are asked for."""

    def __init__(self, steps: StepDataset) -> None:
        self.steps = steps

    def __getitem__(self, index: int) -> Portion:
        return self.steps.portion(*divmod(index, self.steps.portions))


def load_steps(dataset: StepDataset, steps: range, *, workers: int, pin_memory: bool = False) -> Iterator[Views]:
    """The views of each step of `steps`, made ahead by `workers` processes; raises RankError when a step cannot be made.

    Beside the step in hand and the one being gathered, at most another step's portions, or two a worker, are made and wait.
    """
    each = dataset.portions
    loader: DataLoader[Portion] = DataLoader(
        _Portions(dataset),
        batch_size=None,
        collate_fn=_as_it_is,  # the default would turn the draws' arrays into tensors
        sampler=range(steps.start * each, steps.stop * each),
        num_workers=workers,
        prefetch_factor=max(2, -(-each // workers)) if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=mind_parent_only,
    )
    with signals.blocked():  # workers start here, and keep it so
        made = iter(loader)
    for _ in steps:
        portions: list[Portion] = []
        while len(portions) < each and not (portions and portions[-1].failed):
            try:
                portions.append(next(made))
            except (EOFError, ConnectionError) as error:  # before torch has noticed
                raise RuntimeError("DataLoader worker died: killed, or out of memory") from error
        yield dataset.together(portions)


class _Pieces(Sequence[tuple[Tensor, Tensor]]):
    """Micro-batches that are coloured each time they are asked for."""

    def __init__(self, views: Views, settings: ViewSettings, device: torch.device, timed: AbstractContextManager[None]) -> None:
        self._views, self._settings, self._device, self._timed = views, settings, device, timed

    def __len__(self) -> int:
        return len(self._views.pieces)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tensor, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        with self._timed:
            a, b = (self._coloured(self._views.pieces[index], view) for view in range(2))
        return a, b

    def _coloured(self, piece: list[Portion], view: int) -> Tensor:
        count, size = sum(len(portion.rows) for portion in piece), self._settings.image_size
        whole = torch.empty(count, 3, size, size, device=self._device)
        start = 0
        for portion in piece:
            with record_function("host to device"):
                crops = portion.crops[view].to(self._device, non_blocking=True)
            with record_function("views"):
                whole[start : start + len(crops)] = colour_views(crops, portion.draws[view], self._settings)
            start += len(crops)
        return whole


def coloured(
    views: Views,
    settings: ViewSettings,
    device: torch.device,
    *,
    timed: AbstractContextManager[None] | None = None,
) -> Sequence[tuple[Tensor, Tensor]]:
    """A step's micro-batches on `device`, coloured, blurred and normalised: (view a, view b), float32 [n, 3, s, s] each.

    Of a step whose views are large, each is made when it is asked for, with the same bits every time, and kept by nobody.
    The making is done within `timed`, as often as it happens.
    """
    pieces = _Pieces(views, settings, device, timed or nullcontext())
    floats = 4 * sum(portion.crops[0].numel() + portion.crops[1].numel() for portion in views.portions)
    return list(pieces) if floats <= _KEPT_BYTES else pieces


def two_views(views: Views, settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """All of a step at once: two float32 [n, 3, s, s]."""
    a, b = (torch.cat(view) for view in zip(*coloured(views, settings, device), strict=True))
    return a, b


def mind_parent_only(_: int) -> None:
    """The `worker_init_fn` of a DataLoader whose iterator is made while stop signals are blocked."""
    signals.mind_parent_only()


def _as_it_is(portion: Any) -> Any:
    return portion
