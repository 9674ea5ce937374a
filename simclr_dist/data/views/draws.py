"""Draw a view's random numbers before any pixel is read. Pure functions of (seed, epoch, row, view), in numpy alone.

The draws are kept apart from the pixels. So a view does not depend on world size, workers or its neighbours in a
batch, and the colour part can run batched on any device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

# Each decision has a fixed slot of uniforms. So a setting changes only what it names and never shifts the others.
_ATTEMPTS = 10
_AREA, _RATIO = slice(0, _ATTEMPTS), slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(20, 25)
_FACTORS = slice(25, 29)
_GRAY, _BLUR, _SIGMA = range(29, 32)
_VERTICAL_FLIP, _ROTATE, _TURNS, _SOLARIZE = range(32, 36)
_SLOTS = 36

_PERMUTATIONS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)


@dataclass(frozen=True)
class ViewSettings:
    """SimCLR's augmentation (paper, appendix A); defaults are its ImageNet strengths."""

    image_size: int = 224
    """Side of a view in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop, before it is resized to a square."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How a crop is resized (always antialiased)."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip."""
    rotate: float = 0.0
    """Probability of one to three quarter turns, each as likely."""
    jitter: float = 0.8
    """Probability of the colour jitter as a whole."""
    brightness: float = 0.8
    """Jitter strength s: a factor uniform in [max(0, 1 - s), 1 + s]."""
    contrast: float = 0.8
    """Jitter strength, as brightness."""
    saturation: float = 0.8
    """Jitter strength, as brightness."""
    hue: float = 0.2
    """Jitter strength h: a shift uniform in [-h, h] of the colour circle, at most 0.5."""
    gray: float = 0.2
    """Probability that a view loses its colour."""
    blur: float = 0.5
    """Probability of a Gaussian blur; its kernel spans a tenth of the view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels; each view draws its own."""
    solarize: float = 0.0
    """Probability that all above the middle of the scale is inverted, as in BYOL."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel on the scale 0-1, taken away at the end."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel on the scale 0-1, divided by at the end."""

    def __post_init__(self) -> None:
        assert self.image_size > 0
        assert 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        assert 0 < self.crop_ratio[0] <= self.crop_ratio[1]
        assert self.interpolation in ("bicubic", "bilinear")
        chances = (self.flip, self.vertical_flip, self.rotate, self.jitter, self.gray, self.blur, self.solarize)
        assert all(0 <= p <= 1 for p in chances)
        assert min(self.brightness, self.contrast, self.saturation) >= 0
        assert 0 <= self.hue <= 0.5
        assert 0 < self.blur_sigma[0] <= self.blur_sigma[1]
        assert min(self.std) > 0
        assert len(self.mean) == len(self.std)
        assert self.channels == 3 or not (self.saturation or self.hue or self.gray)

    @property
    def channels(self) -> int:
        return len(self.mean)


_MILD = ViewSettings(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)
PRESETS: dict[str, ViewSettings] = {
    "imagenet": ViewSettings(),
    "small": replace(_MILD, image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "blog": _MILD,
}
"""`imagenet`: the paper's strength 1. `small`: the paper's CIFAR-10 (strength 0.5, no blur; CIFAR-10's mean and std).
`blog`: a milder jitter without blur, at 224 pixels."""


def preset_views(preset: str, changes: Mapping[str, Any]) -> ViewSettings:
    """Change a preset's values. `changes` has the names of `ViewSettings`; None keeps a value.

    Where the mean is not of 3 channels there is no colour: no saturation, hue and gray.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    colourless = {} if len(values.get("mean", "rgb")) == 3 else dict.fromkeys(("saturation", "hue", "gray"), 0.0)
    return replace(PRESETS[preset], **values | colourless)


def view_side(preset: str, image_size: int | None) -> int:
    """Return the side of a view in pixels. It is the preset's where `image_size` is None."""
    return image_size or PRESETS[preset].image_size


class ViewDraws(NamedTuple):
    """The parameters of n views."""

    box: NDArray[np.int64]
    """[n, 4]: top, left, height, width of the crop in the source image, in pixels."""
    flip: NDArray[np.bool_]
    """[n]"""
    jitter: NDArray[np.bool_]
    """[n]: whether `order` and `factors` are applied."""
    order: NDArray[np.int64]
    """[n, 4]: 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order of application."""
    factors: NDArray[np.float32]
    """[n, 4]: brightness, contrast, saturation (1 = unchanged), hue (0 = unchanged)."""
    gray: NDArray[np.bool_]
    """[n]"""
    blur_sigma: NDArray[np.float32]
    """[n], pixels; 0 = no blur."""
    vertical_flip: NDArray[np.bool_]
    """[n]"""
    turns: NDArray[np.int64]
    """[n]: quarter turns against the clock, 0 to 3."""
    solarize: NDArray[np.bool_]
    """[n]"""


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Compute Philox4x32-10: 4 random 32-bit words for each 4-word counter.

    `counter` is [..., 4] and the result has its shape; both hold values below 2**32. Source: Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = (counter[..., word] for word in range(4))
    key0, key1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _WORD) ^ c1 ^ np.uint64(key0),
            product1 & _MASK,
            (product0 >> _WORD) ^ c3 ^ np.uint64(key1),
            product0 & _MASK,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (key1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(seed: int, epoch: int, rows: ArrayLike, view: int, count: int) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each row. Returns [n, count], of 32 random bits each.

    A pure function of (seed, epoch, row, view). The first numbers do not depend on `count`. `seed` is below 2**64;
    epoch, rows and view are below 2**32.
    """
    row = np.asarray(rows)
    assert row.ndim == 1
    assert bool(((row >= 0) & (row < 2**32)).all()), "a row does not fit into 32 bits"
    assert 0 <= seed < 2**64
    assert max(epoch, view) < 2**32
    assert min(epoch, view) >= 0
    blocks = -(-count // 4)
    counter = np.empty((len(row), blocks, 4), dtype=np.uint64)
    counter[..., 0], counter[..., 2] = epoch, view
    counter[..., 1] = row.astype(np.uint64)[:, None]
    counter[..., 3] = np.arange(blocks, dtype=np.uint64)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.reshape(len(row), blocks * 4)[:, :count].astype(np.float64) * np.float64(2.0**-32)


def draw_views(
    settings: ViewSettings, *, seed: int, epoch: int, rows: ArrayLike, view: int, heights: ArrayLike, widths: ArrayLike
) -> ViewDraws:
    """Draw one view of each row. A pure function of the arguments, row by row.

    `rows` are manifest rows, [n]. `heights` and `widths`, [n], are their images' sizes in pixels. `view` is 0 or 1. Crops
    are distributed as in torchvision's RandomResizedCrop, jitter as in its ColorJitter. One call takes about 0.2 ms however few
    rows it has, so draw a whole batch at once.
    """
    u = uniforms(seed, epoch, rows, view, _SLOTS)
    height = np.broadcast_to(np.asarray(heights, dtype=np.int64), len(u))
    width = np.broadcast_to(np.asarray(widths, dtype=np.int64), len(u))
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation, settings.hue])
    low = np.append(np.maximum(0.0, 1.0 - strengths[:3]), -strengths[3])
    high = np.append(1.0 + strengths[:3], strengths[3])
    sigma = _between(u[:, _SIGMA], *settings.blur_sigma)
    return ViewDraws(
        box=_crop_boxes(settings, u, height, width),
        flip=u[:, _FLIP] < settings.flip,
        jitter=u[:, _JITTER] < settings.jitter,
        order=_PERMUTATIONS[(u[:, _ORDER] * len(_PERMUTATIONS)).astype(np.int64)],
        factors=_between(u[:, _FACTORS], low, high).astype(np.float32),
        gray=u[:, _GRAY] < settings.gray,
        blur_sigma=np.where(u[:, _BLUR] < settings.blur, sigma, 0.0).astype(np.float32),
        vertical_flip=u[:, _VERTICAL_FLIP] < settings.vertical_flip,
        turns=np.where(u[:, _ROTATE] < settings.rotate, 1 + (3 * u[:, _TURNS]).astype(np.int64), 0),
        solarize=u[:, _SOLARIZE] < settings.solarize,
    )


def _crop_boxes(
    settings: ViewSettings, u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return top, left, height, width. The first of ten attempts that fits, else the largest central crop of a fair ratio."""
    smallest, largest = settings.crop_ratio
    area = _between(u[:, _AREA], *settings.crop_scale) * (height * width)[:, None]
    ratio = np.exp(_between(u[:, _RATIO], math.log(smallest), math.log(largest)))
    tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_width > 0) & (tried_width <= width[:, None]) & (tried_height > 0) & (tried_height <= height[:, None])
    first = (np.arange(len(u)), fits.argmax(axis=1))
    fitted = fits[first]

    aspect = width / height
    spare_height = np.where(aspect < smallest, np.rint(width / smallest).astype(np.int64), height)
    spare_width = np.where(aspect > largest, np.rint(height * largest).astype(np.int64), width)
    crop_height = np.maximum(1, np.where(fitted, tried_height[first], spare_height))
    crop_width = np.maximum(1, np.where(fitted, tried_width[first], spare_width))
    free_height, free_width = height - crop_height, width - crop_width
    top = np.where(fitted, (u[:, _TOP] * (free_height + 1)).astype(np.int64), free_height // 2)
    left = np.where(fitted, (u[:, _LEFT] * (free_width + 1)).astype(np.int64), free_width // 2)
    return np.stack([top, left, crop_height, crop_width], axis=1)


def _between(u: NDArray[np.float64], low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    smallest, largest = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    return np.add(smallest, (largest - smallest) * u, dtype=np.float64)
