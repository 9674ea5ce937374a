"""Draw the built-in images. Ten classes, each a silhouette with a surface pattern.

Most classes share a cue with another (two are stars, two discs; two each are dotted, striped, checked, or banded in circles).
So neither silhouette nor pattern decides alone. Everything else (pose, tones, light, noise, compression) is drawn alike for
all classes. All tones of an image are of one near-gray hue. By a strong colour a model could tell the two views of an image
from all others, and would learn nothing about what the image shows.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from simclr_dist.system.errors import DataError

Plane = npt.NDArray[np.floating[Any]]
"""A function sampled at every pixel: float32 [size, size]."""

MAX_SATURATION = 0.12
MAX_ROTATION = 46.0
TAU = 2 * np.pi
WARP = ((0.0, 0.11), (2.0, 4.5), (0.0, TAU))  # amplitude, radians a unit, phase


class _Pattern(NamedTuple):
    """Random frequency (1 = usual) and start (in periods) of a pattern."""

    frequency: float
    phase_x: float
    phase_y: float


# NumPy's functions with the types that they have on planes.
_abs: Callable[[Plane], Plane] = np.abs
_cos: Callable[[Plane], Plane] = np.cos
_sin: Callable[[Plane], Plane] = np.sin
_radius: Callable[[Plane, Plane], Plane] = np.hypot
_smaller: Callable[[Plane, Plane], Plane] = np.minimum
_larger: Callable[[Plane, Plane], Plane] = np.maximum


_Silhouette = Callable[[Plane, Plane], Plane]
_Surface = Callable[[Plane, Plane, _Pattern], Plane]


def _plus(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return _larger(_smaller(0.88 - x, 0.33 - y), _smaller(0.33 - x, 0.88 - y))


def _fish(x: Plane, y: Plane) -> Plane:
    body = 0.46 - _radius((x + 0.3) / 1.4, y)
    tail = _smaller(0.96 - x, 0.05 + 0.85 * (x - 0.1) - np.abs(y))
    return _larger(body, tail)


def _heart(x: Plane, y: Plane) -> Plane:
    # Two discs, and a wedge whose sides are tangents from the tip (0, 0.82) to them, up to where they touch.
    x = np.abs(x)
    lobes = 0.45 - _radius(x - 0.38, y + 0.28)
    wedge = _smaller((0.82 - y) * 0.667 - 0.745 * x, y + 0.28 - 0.895 * _larger(x - 0.38, np.zeros_like(x)))
    return _larger(lobes, wedge)


# Positive inside, about 1 unit from the centre to the tip; y points down.
_SILHOUETTES: dict[str, _Silhouette] = {
    "star": lambda x, y: 0.6 + 0.34 * _cos(5 * np.arctan2(y, x)) - _radius(x, y),
    "disc": lambda x, y: 0.74 - _radius(x / 1.28, y / 0.82),
    "plus": _plus,
    "ring": lambda x, y: 0.24 - _abs(_radius(x, y) - 0.6),
    "crescent": lambda x, y: _smaller(0.95 - _radius(x + 0.1, y), _radius(x - 0.36, y) - 0.74),
    "fish": _fish,
    "box": lambda x, y: 0.96 - np.abs(x) - np.abs(y),
    "heart": _heart,
}


def _dots(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    rate = TAU * 1.75 * draw.frequency
    return _cos(rate * x + TAU * draw.phase_x) + _cos(rate * y + TAU * draw.phase_y) - 0.85


def _rings(x: Plane, y: Plane, draw: _Pattern, centre: float = 0.0, rate: float = 1.9) -> Plane:
    return _cos(TAU * (rate * draw.frequency * _radius(x - centre, y) + 0.3 * draw.phase_x))


def _checks(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    rate = TAU * 1.5 * draw.frequency
    return _sin(rate * x + TAU * draw.phase_x) * _sin(rate * y + TAU * draw.phase_y)


def _triangle_wave(t: Plane) -> Plane:
    """Return a triangle wave between -1 and 1, period 1."""
    return 4 * _abs(t - np.floor(t + 0.5)) - 1


def _zigzag(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    bend = 0.13 / draw.frequency * _triangle_wave(1.8 * draw.frequency * y + draw.phase_y)
    return 0.5 - np.abs(_triangle_wave(2.3 * draw.frequency * (x + bend) + draw.phase_x) + 1) / 2


def _bricks(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    course = 3.0 * draw.frequency * y + draw.phase_y
    row = np.floor(course)
    along = 1.7 * draw.frequency * x + draw.phase_x + 0.5 * (row % 2)
    to_bed = 0.5 - np.abs(course - row - 0.5)
    to_joint = (0.5 - np.abs(along - np.floor(along) - 0.5)) * (3.0 / 1.7)
    return _smaller(to_bed, to_joint) - 0.13


# Positive on one tone, negative on the other, in the silhouette's own coordinates.
_SURFACES: dict[str, _Surface] = {
    "stripes": lambda x, y, draw: _cos(TAU * (1.9 * draw.frequency * x + draw.phase_x)),
    "dots": _dots,
    "rings": _rings,
    "checks": _checks,
    "zigzag": _zigzag,
    "scales": lambda x, y, draw: _rings(x, y, draw, centre=-0.3, rate=2.1),
    "bricks": _bricks,
}

CLASSES = (
    "star-stripes", "star-dots", "disc-dots", "disc-rings", "plus-checks", "ring-stripes", "crescent-zigzag", "fish-scales",
    "box-bricks", "heart-checks",
)  # fmt: skip
"""The ten class names, in the order of `class_index`: silhouette-pattern."""


def _coverage(f: Plane) -> Plane:
    """Estimate by slope the share of each pixel with f > 0. Supersampling costs four times this."""
    across = np.pad((f[:, 2:] - f[:, :-2]) / 2, ((0, 0), (1, 1)), mode="edge")
    down = np.pad((f[2:] - f[:-2]) / 2, ((1, 1), (0, 0)), mode="edge")
    share: Plane = np.clip(0.5 + f / (np.hypot(across, down) + 1e-6), 0, 1)
    return share


def _object_coordinates(rng: np.random.Generator, size: int) -> tuple[Plane, Plane]:
    """Draw a pose with a smooth warp. Returns each pixel's place on the object."""
    shift_x, shift_y = rng.uniform(-0.24, 0.24, 2)
    scale = rng.uniform(0.62, 1.02)
    aspect = np.exp(rng.uniform(-0.2, 0.2))
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    mirror = 1 - 2 * int(rng.integers(2))
    strength, waves, starts = (rng.uniform(low, high, 2).astype(np.float32) for low, high in WARP)

    line = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    across, down = (line - np.float32(shift_x))[None, :], (line - np.float32(shift_y))[:, None]
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    x = (cos * across + sin * down) * np.float32(mirror / aspect)
    y = (cos * down - sin * across) * np.float32(aspect)
    return x + strength[0] * _sin(waves[0] * y + starts[0]), y + strength[1] * _sin(waves[1] * x + starts[1])


def render(class_index: int, rng: np.random.Generator, size: int = 64) -> npt.NDArray[np.uint8]:
    """Draw one image of class `CLASSES[class_index]`: uint8 [size, size, 3].

    The draws from `rng` do not depend on the class: one generator state gives each class the same pose, tones, light and
    noise. Saturation (HSV) is at most 0.12, but for the rounding to whole numbers.
    """
    silhouette, surface = CLASSES[class_index].split("-")
    x, y = _object_coordinates(rng, size)
    pattern = _Pattern(rng.uniform(0.78, 1.2), rng.uniform(), rng.uniform())
    background = rng.uniform(0.36, 0.68)
    middle = background + rng.uniform(-0.06, 0.06)
    contrast = rng.uniform(0.16, 0.46) * (1 - 2 * int(rng.integers(2)))
    light, towards = rng.uniform(0, 0.22), rng.uniform(0, TAU)
    grain = rng.uniform(0.004, 0.022)
    distance = np.abs((rng.uniform(0, 6) - np.array((0.0, 2.0, 4.0)) + 3) % 6 - 3)  # of a near-gray hue from red, green, blue
    tint = (1 - rng.uniform(0, MAX_SATURATION) * (1 - np.clip(2 - distance, 0, 1))).astype(np.float32)
    noise = rng.standard_normal((size, size), dtype=np.float32)

    inside = _coverage(_SILHOUETTES[silhouette](x, y))
    painted = middle + contrast * (2 * _coverage(_SURFACES[surface](x, y, pattern)) - 1)
    gray = background + inside * (painted - background)

    line = np.linspace(-1, 1, size, dtype=np.float32)
    gray = gray * (1 + light * (math.cos(towards) * line[None, :] + math.sin(towards) * line[:, None])) + grain * noise
    image: npt.NDArray[np.uint8] = (np.clip(gray, 0.03, 1)[:, :, None] * tint * 255 + 0.5).astype(np.uint8)
    return image


def write_demo_images(folder: Path, *, train: int = 5000, test: int = 1000, seed: int = 0) -> None:
    """Write JPEG images of 64x64 pixels as `folder/train/<class>/NNNN.jpg` and `folder/test/...`.

    Classes take turns, so that their counts differ by one at most. Each image has a generator, keyed by (seed, split,
    number). The folder appears under its name only when it is complete. Raises DataError if it already holds something,
    or if a count is negative.
    """
    if train < 0 or test < 0:
        raise DataError(f"demo images: cannot make {train} + {test}; both counts must be 0 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already exists; remove it or choose another folder for the demo images")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        complete = Path(unfinished) / "images"
        for split, (name, count) in enumerate((("train", train), ("test", test))):
            for label in CLASSES:
                (complete / name / label).mkdir(parents=True)
            for k in range(count):
                # One generator an image: image k does not depend on the number of images, nor on their order.
                rng = np.random.default_rng((seed, split, k))
                number, class_index = divmod(k, len(CLASSES))
                image = Image.fromarray(render(class_index, rng))
                image.save(complete / name / CLASSES[class_index] / f"{number:04d}.jpg", quality=int(rng.integers(60, 96)))
        complete.rename(folder)
