"""The two views of a step's images, made ahead by worker processes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset

from simclr_dist import stopping
from simclr_dist.data.draws import ViewDraws, ViewSettings, draw_views
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.views import colour_views, crop_view
from simclr_dist.errors import DataError, RankError


class Views(NamedTuple):
    """One rank's part of a step, before colour.

    `crops`: uint8 [n, 3, s, s] of view a and of view b; `draws`: what `colour_views` has still to apply to each; `rows`:
    int64 [n], after replacements. `bad`: (manifest row, reason) of unreadable images met; `failed` is the reason for which
    the step cannot be made (a worker reports it, since an exception out of a worker would reach the user as a traceback).
    """

    step: int
    crops: tuple[Tensor, Tensor]
    draws: tuple[ViewDraws, ViewDraws]
    rows: Tensor
    bad: list[tuple[int, str]]
    failed: str | None = None


class StepDataset(Dataset[Views]):
    """A map from global step to this rank's views: a pure function, so a resumed run only starts at another index."""

    def __init__(self, images: ShardDataset, plan: Plan, settings: ViewSettings, *, replace_bad: bool = False) -> None:
        self.images = images
        self.plan = plan
        self.settings = settings
        self.replace_bad = replace_bad

    def __getitem__(self, step: int) -> Views:
        epoch, rows = self.plan[step]
        bad: list[tuple[int, str]] = []
        samples = []
        for row, slot in zip(rows, self.plan.slots(), strict=True):
            sample = self._first_readable(step, int(slot), int(row), bad)
            if sample is None:
                return Views(step, (torch.empty(0),) * 2, (), torch.empty(0), bad, failed=bad[-1][1])  # type: ignore[arg-type]
            samples.append(sample)
        images = [sample.image for sample in samples]
        used = np.array([sample.row for sample in samples], dtype=np.int64)
        height, width = np.array([image.shape[1:] for image in images]).T
        crops, draws = [], []
        for view in range(2):
            drawn = draw_views(
                self.settings, seed=self.plan.seed, epoch=epoch, rows=used, view=view, heights=height, widths=width
            )
            size, how = self.settings.image_size, self.settings.interpolation
            boxes = zip(images, drawn.box, drawn.flip, strict=True)
            crops.append(torch.stack([crop_view(image, box, flip, size, how) for image, box, flip in boxes]))
            draws.append(drawn)
        return Views(step, (crops[0], crops[1]), (draws[0], draws[1]), torch.from_numpy(used), bad)

    def _first_readable(self, step: int, slot: int, row: int, bad: list[tuple[int, str]]) -> Sample | None:
        """The slot's own image, else (with replace_bad) the first of its spares that can be read."""
        try:
            return self.images[row]
        except DataError as error:
            bad.append((row, str(error)))
        for spare in self.plan.spares(step, slot) if self.replace_bad else ():
            try:
                return self.images[int(spare)]
            except DataError as error:
                bad.append((int(spare), str(error)))
        return None


def load_steps(dataset: StepDataset, steps: range, *, workers: int, pin_memory: bool = False) -> Iterator[Views]:
    """The views of each step of `steps`, made ahead by `workers` processes; raises RankError when a step cannot be made."""
    loader: DataLoader[Views] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,  # the default would turn the draws' arrays into tensors
        sampler=steps,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=mind_parent_only,
    )
    with stopping.blocked():  # workers start here, and keep it so
        made = iter(loader)
    while True:
        try:
            views = next(made, None)
        except (EOFError, ConnectionError) as error:  # before torch has noticed
            raise RuntimeError("DataLoader worker died: killed, or out of memory") from error
        if views is None:
            return
        if views.failed is not None:
            raise RankError(views.failed)
        yield views


def two_views(views: Views, settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colour, blur and normalise on `device`: two float32 [n, 3, s, s]."""
    with record_function("host to device"):
        crops = [crop.to(device, non_blocking=True) for crop in views.crops]
    with record_function("views"):
        a, b = (colour_views(crop, draws, settings) for crop, draws in zip(crops, views.draws, strict=True))
    return a, b


def mind_parent_only(_: int) -> None:
    """The `worker_init_fn` of a DataLoader whose iterator is made while stop signals are blocked."""
    stopping.mind_parent_only()


def _as_it_is(views: Any) -> Any:
    return views
