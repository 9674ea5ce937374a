"""Random crops of images for protocols that train: views as in pre-training, drawn by (seed, epoch, row, view)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_dist.data.reader import Sample
from simclr_dist.data.views.crops import crop_view
from simclr_dist.data.views.draws import ViewSettings, draw_views
from simclr_dist.evaluate.features.extraction import Images

TRAINING_VIEW = 2  # pre-training draws views 0 and 1


def crop_and_flip(image_size: int) -> ViewSettings:
    """The views that labels are learned with: those of pre-training without their colours (paper, appendix B.5)."""
    return ViewSettings(image_size=image_size, jitter=0.0, gray=0.0, blur=0.0)


def crop(samples: Sequence[Sample], settings: ViewSettings, *, seed: int, epoch: int, view: int = TRAINING_VIEW) -> Tensor:
    """The samples' crops before any colour, uint8 [n, 3, s, s]; each depends on its own row alone."""
    height, width = np.array([sample.image.shape[1:] for sample in samples]).T
    rows = np.array([sample.row for sample in samples])
    drawn = draw_views(settings, seed=seed, epoch=epoch, rows=rows, view=view, heights=height, widths=width)
    size, how = settings.image_size, settings.interpolation
    crops = [
        crop_view(sample.image, box, bool(flip), size, how)
        for sample, box, flip in zip(samples, drawn.box, drawn.flip, strict=True)
    ]
    return torch.stack(crops)


class RandomCrops:
    """Images as one crop of each, uint8 [3, s, s]; `drawn` is what else `crop` takes."""

    def __init__(self, images: Images, settings: ViewSettings, **drawn: Any) -> None:
        self._images, self._settings, self._drawn = images, settings, drawn

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        sample = self._images[row]
        return sample._replace(image=crop([sample], self._settings, **self._drawn)[0])


def as_it_is(image: Tensor, size: int) -> Tensor:
    """The view of an image that is one already, uint8 [3, size, size]."""
    assert image.shape[-2:] == torch.Size((size, size))
    return image
