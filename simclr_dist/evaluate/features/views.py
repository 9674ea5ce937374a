"""Draw random views of images by (seed, epoch, row, view). They serve protocols that train, and signals of test images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.config.ranges import check_ranges
from simclr_dist.config.settings import ViewsConfig
from simclr_dist.config.strict_yaml import merge
from simclr_dist.data.pixels.kinds import kind_of
from simclr_dist.data.reader import Sample
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.crops import crop_view, turn_views
from simclr_dist.data.views.draws import ViewSettings, draw_views, preset_views
from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.system.errors import ConfigError, DamagedError

TRAINING_VIEW = 2  # pre-training draws views 0 and 1
IMAGES = 4096  # at most: a mean over so many is good to some hundredths of a standard deviation
SEED = 0  # of images and views, the same for all encoders, so that checkpoints can be compared


def crop_and_flip(image_size: int) -> ViewSettings:
    """Return the views for learning labels. They are those of pre-training without their colours (paper, appendix B.5)."""
    return ViewSettings(image_size=image_size, jitter=0.0, gray=0.0, blur=0.0)


def crop(samples: Sequence[Sample], settings: ViewSettings, *, seed: int, epoch: int, view: int = TRAINING_VIEW) -> Tensor:
    """Crop the samples to [n, c, s, s], before any colour. Each crop depends on its row alone."""
    height, width = np.array([sample.image.shape[1:] for sample in samples]).T
    rows = np.array([sample.row for sample in samples])
    drawn = draw_views(settings, seed=seed, epoch=epoch, rows=rows, view=view, heights=height, widths=width)
    size, how, images = settings.image_size, settings.interpolation, [sample.image for sample in samples]
    boxes = zip(images, drawn.box, drawn.flip, strict=True)
    return turn_views(torch.stack([crop_view(image, box, bool(flip), size, how) for image, box, flip in boxes]), drawn)


class RandomCrops:
    """One crop [c, s, s] of each image. With `rows`: of those, as images 0..n-1. `drawn` is what else `crop` takes."""

    def __init__(self, images: Images, settings: ViewSettings, rows: Sequence[int] | None = None, **drawn: Any) -> None:
        self._images, self._settings, self._drawn = images, settings, drawn
        self.kind = kind_of(images)
        self._rows = range(len(images)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        sample = self._images[self._rows[row]]
        return sample._replace(image=crop([sample], self._settings, **self._drawn)[0], row=row)


def as_it_is(image: Tensor, size: int) -> Tensor:
    """Return an image that is a view already, [c, size, size]."""
    assert image.shape[-2:] == torch.Size((size, size))
    return image


class TrainingViews(NamedTuple):
    """The settings of views, and the `source` that they come from."""

    settings: ViewSettings
    source: str

    def describe(self) -> dict[str, Any]:
        """Return all of it for a result, as JSON takes it."""
        values = vars(self.settings).items()
        return {"from": self.source, "seed": SEED, **{k: list(v) if isinstance(v, tuple) else v for k, v in values}}


def training_views(card: Mapping[str, Any], source: str = "the encoder's card") -> TrainingViews:
    """Return the views that the encoder was trained with. Where the card has none: the paper's, for images of its size.

    `source` begins the DamagedError about settings that cannot be.
    """
    size = {"image_size": card["image_size"], "mean": card["mean"], "std": card["std"]}
    if views := (card.get("config") or {}).get("views"):
        try:
            check_ranges(config := merge(ViewsConfig(), views, "config.views"))
        except ConfigError as error:
            raise DamagedError(f"{source}: {error}; take a whole copy of the encoder") from None
        trained = dataclasses.asdict(config)
        return TrainingViews(preset_views(trained.pop("preset"), trained | size), "the encoder's card")
    preset = "imagenet" if card["image_size"] >= 96 else "small"
    return TrainingViews(preset_views(preset, size), f"preset {preset}, as the encoder's card has none")


def choose_rows(images: int) -> NDArray[np.int64]:
    """Draw at most `IMAGES` rows of `images` images by `SEED`, ascending."""
    drawn = np.random.Generator(np.random.PCG64(SEED)).permutation(images)[:IMAGES]
    return np.sort(drawn).astype(np.int64)


def view_colour(rows: NDArray[np.int64], settings: ViewSettings, view: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that makes crops of `rows` whole views. `extraction.extract` takes it."""

    def colour(crops: Tensor, places: Tensor) -> Tensor:
        drawn_rows = rows[places.numpy()]
        sides = np.full(len(drawn_rows), settings.image_size)  # of the boxes, which are drawn apart and not read now
        drawn = draw_views(settings, seed=SEED, epoch=0, rows=drawn_rows, view=view, heights=sides, widths=sides)
        return colour_views(crops, drawn, settings)

    return colour
