"""Two augmented views of test images: how far an encoder holds still under the changes that it was trained to ignore."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.reader import Sample
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.draws import ViewSettings, draw_views, preset_views
from simclr_dist.evaluate.features.crops import RandomCrops
from simclr_dist.evaluate.features.extraction import Images

IMAGES = 4096  # at most: a mean over so many is good to some hundredths of a standard deviation
SEED = 0  # of images and views, the same for all encoders, so that checkpoints can be compared


class TrainingViews(NamedTuple):
    """How views are drawn, and `source`, who says so."""

    settings: ViewSettings
    source: str

    def told(self) -> dict[str, Any]:
        """All of it for a result, as JSON takes it."""
        values = dataclasses.asdict(self.settings).items()
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
        return {"from": self.source, "seed": SEED, **plain}


def training_views(card: Mapping[str, Any]) -> TrainingViews:
    """Those that the encoder was trained with; of a card that does not say it, the paper's, for images of its size."""
    size = {"image_size": card["image_size"], "mean": card["mean"], "std": card["std"]}
    if views := (card.get("config") or {}).get("views"):
        own = {name: value for name, value in views.items() if name != "preset"}
        return TrainingViews(preset_views(views["preset"], own | size), "the encoder's card")
    preset = "imagenet" if card["image_size"] >= 96 else "small"
    return TrainingViews(preset_views(preset, size), f"preset {preset}, as the encoder's card has none")


def choose_rows(images: int) -> NDArray[np.int64]:
    """The rows of at most `IMAGES` of so many images, ascending, drawn by `SEED`."""
    drawn = np.random.Generator(np.random.PCG64(SEED)).permutation(images)[:IMAGES]
    return np.sort(drawn).astype(np.int64)


class ViewImages:
    """The crops of one `view` (0 or 1) of these `rows`, as images 0..n-1."""

    def __init__(self, images: Images, rows: NDArray[np.int64], settings: ViewSettings, view: int) -> None:
        self._crops = RandomCrops(images, settings, seed=SEED, epoch=0, view=view)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        return self._crops[int(self._rows[row])]._replace(row=row)


def view_colour(rows: NDArray[np.int64], settings: ViewSettings, view: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The rest of the views of `ViewImages`, as `extraction.extract` takes it."""

    def colour(crops: Tensor, places: Tensor) -> Tensor:
        own = rows[places.numpy()]
        sides = np.full(len(own), settings.image_size)  # of the boxes, which are drawn apart and are not read here
        drawn = draw_views(settings, seed=SEED, epoch=0, rows=own, view=view, heights=sides, widths=sides)
        return colour_views(crops, drawn, settings)

    return colour
