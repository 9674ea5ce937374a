"""The built-in images of the first run: ten classes, each a silhouette that carries its own surface pattern.

Most classes share a cue with another (two are stars, two discs; two each are dotted, striped, checked, or banded in
circles), so that neither silhouette nor pattern decides alone. Everything else (pose, tones, light, noise, compression)
is drawn alike for all classes. All tones of an image are of one near-gray hue: a strong colour would tell the two views
of an image from all other views without anything being learnt about what the image shows.
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
    """What is random in a surface pattern: its frequency (1 = usual) and where it starts (in periods)."""

    frequency: float
    phase_x: float
    phase_y: float


def _radius(x: Plane, y: Plane) -> Plane:
    radius: Plane = np.hypot(x, y)
    return radius


def _smaller(a: Plane, b: Plane) -> Plane:
    smaller: Plane = np.minimum(a, b)
    return smaller


def _larger(a: Plane, b: Plane) -> Plane:
    larger: Plane = np.maximum(a, b)
    return larger


# Silhouettes: positive inside, about 1 unit from the centre to the tip; y points down.


def _star(x: Plane, y: Plane) -> Plane:
    tip: Plane = 0.6 + 0.34 * np.cos(5 * np.arctan2(y, x))
    return tip - _radius(x, y)


def _disc(x: Plane, y: Plane) -> Plane:
    return 0.74 - _radius(x / 1.28, y / 0.82)


def _plus(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return _larger(_smaller(0.88 - x, 0.33 - y), _smaller(0.33 - x, 0.88 - y))


def _ring(x: Plane, y: Plane) -> Plane:
    from_circle: Plane = np.abs(_radius(x, y) - 0.6)
    return 0.24 - from_circle


def _crescent(x: Plane, y: Plane) -> Plane:
    return _smaller(0.95 - _radius(x + 0.1, y), _radius(x - 0.36, y) - 0.74)


def _fish(x: Plane, y: Plane) -> Plane:
    body = 0.46 - _radius((x + 0.3) / 1.4, y)
    tail = _smaller(0.96 - x, 0.05 + 0.85 * (x - 0.1) - np.abs(y))
    return _larger(body, tail)


def _box(x: Plane, y: Plane) -> Plane:
    return 0.96 - np.abs(x) - np.abs(y)


def _heart(x: Plane, y: Plane) -> Plane:
    # Two discs, and a wedge whose sides are tangents from the tip (0, 0.82) to them, up to where they touch.
    x = np.abs(x)
    lobes = 0.45 - _radius(x - 0.38, y + 0.28)
    wedge = _smaller((0.82 - y) * 0.667 - 0.745 * x, y + 0.28 - 0.895 * _larger(x - 0.38, np.zeros_like(x)))
    return _larger(lobes, wedge)


# Patterns: positive on one tone, negative on the other, in the silhouette's own coordinates.


def _stripes(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    stripes: Plane = np.cos(TAU * (1.9 * draw.frequency * x + draw.phase_x))
    return stripes


def _dots(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    rate = TAU * 1.75 * draw.frequency
    dots: Plane = np.cos(rate * x + TAU * draw.phase_x) + np.cos(rate * y + TAU * draw.phase_y) - 0.85
    return dots


def _rings(x: Plane, y: Plane, draw: _Pattern, centre: float = 0.0, rate: float = 1.9) -> Plane:
    rings: Plane = np.cos(TAU * (rate * draw.frequency * _radius(x - centre, y) + 0.3 * draw.phase_x))
    return rings


def _scales(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    return _rings(x, y, draw, centre=-0.3, rate=2.1)


def _checks(x: Plane, y: Plane, draw: _Pattern) -> Plane:
    rate = TAU * 1.5 * draw.frequency
    checks: Plane = np.sin(rate * x + TAU * draw.phase_x) * np.sin(rate * y + TAU * draw.phase_y)
    return checks


def _triangle_wave(t: Plane) -> Plane:
    """Between -1 and 1, period 1."""
    wave: Plane = 4 * np.abs(t - np.floor(t + 0.5)) - 1
    return wave


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


_Silhouette = Callable[[Plane, Plane], Plane]
_Surface = Callable[[Plane, Plane, _Pattern], Plane]

_DESIGNS: dict[str, tuple[_Silhouette, _Surface]] = {
    "star-stripes": (_star, _stripes),
    "star-dots": (_star, _dots),
    "disc-dots": (_disc, _dots),
    "disc-rings": (_disc, _rings),
    "plus-checks": (_plus, _checks),
    "ring-stripes": (_ring, _stripes),
    "crescent-zigzag": (_crescent, _zigzag),
    "fish-scales": (_fish, _scales),
    "box-bricks": (_box, _bricks),
    "heart-checks": (_heart, _checks),
}

CLASSES: tuple[str, ...] = tuple(_DESIGNS)
"""The ten class names, in the order of `class_index`: silhouette-pattern."""


def _coverage(f: Plane) -> Plane:
    """Share of each pixel that lies where f > 0, from f and its slope there: supersampling costs four times this."""
    across, down = np.empty_like(f), np.empty_like(f)
    across[:, 1:-1] = (f[:, 2:] - f[:, :-2]) / 2
    across[:, 0], across[:, -1] = across[:, 1], across[:, -2]
    down[1:-1] = (f[2:] - f[:-2]) / 2
    down[0], down[-1] = down[1], down[-2]
    share: Plane = np.clip(0.5 + f / (np.hypot(across, down) + 1e-6), 0, 1)
    return share


def _object_coordinates(rng: np.random.Generator, size: int) -> tuple[Plane, Plane]:
    """Where each pixel lies on an object at a random place, size, aspect, rotation, reflection and smooth warp."""
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
    warped_x: Plane = x + strength[0] * np.sin(waves[0] * y + starts[0])
    warped_y: Plane = y + strength[1] * np.sin(waves[1] * x + starts[1])
    return warped_x, warped_y


def _tint(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Red, green and blue factors of a near-gray hue: the largest is 1, the smallest at least 1 - MAX_SATURATION."""
    distance = np.abs((rng.uniform(0, 6) - np.array((0.0, 2.0, 4.0)) + 3) % 6 - 3)
    strength = np.clip(2 - distance, 0, 1)
    factors: npt.NDArray[np.float32] = (1 - rng.uniform(0, MAX_SATURATION) * (1 - strength)).astype(np.float32)
    return factors


def render(class_index: int, rng: np.random.Generator, size: int = 64) -> npt.NDArray[np.uint8]:
    """Draw one image of class `CLASSES[class_index]`: uint8 [size, size, 3].

    The draws taken from `rng` do not depend on the class, so that the same generator state gives each class the same
    pose, tones, light and noise. Saturation (HSV) is at most 0.12, but for the rounding to whole numbers.
    """
    assert 0 <= class_index < len(CLASSES), class_index
    silhouette, surface = _DESIGNS[CLASSES[class_index]]

    x, y = _object_coordinates(rng, size)
    pattern = _Pattern(rng.uniform(0.78, 1.2), rng.uniform(), rng.uniform())
    background = rng.uniform(0.36, 0.68)
    middle = background + rng.uniform(-0.06, 0.06)
    contrast = rng.uniform(0.16, 0.46) * (1 - 2 * int(rng.integers(2)))
    light, towards = rng.uniform(0, 0.22), rng.uniform(0, TAU)
    grain = rng.uniform(0.004, 0.022)
    tint = _tint(rng)
    noise = rng.standard_normal((size, size), dtype=np.float32)

    inside = _coverage(silhouette(x, y))
    painted = middle + contrast * (2 * _coverage(surface(x, y, pattern)) - 1)
    gray = background + inside * (painted - background)

    line = np.linspace(-1, 1, size, dtype=np.float32)
    gray = gray * (1 + light * (math.cos(towards) * line[None, :] + math.sin(towards) * line[:, None])) + grain * noise
    image: npt.NDArray[np.uint8] = (np.clip(gray, 0.03, 1)[:, :, None] * tint * 255 + 0.5).astype(np.uint8)
    return image


def _write_split(folder: Path, count: int, seed: int, split: int) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for k in range(count):
        # One generator an image: what image k shows does not depend on how many are made, nor on their order.
        rng = np.random.default_rng((seed, split, k))
        pixels = render(k % len(CLASSES), rng)
        quality = int(rng.integers(60, 96))
        name = f"{k // len(CLASSES):04d}.jpg"
        Image.fromarray(pixels).save(folder / CLASSES[k % len(CLASSES)] / name, quality=quality)


def write_demo_images(folder: Path, *, train: int = 5000, test: int = 1000, seed: int = 0) -> None:
    """Write `train` + `test` JPEG images of 64x64 pixels as `folder/train/<class>/NNNN.jpg` and `folder/test/...`.

    Classes take turns, so that their counts differ by one at most. Each image has its own generator, keyed by (seed,
    split, number). The folder appears under its name only when it is complete. Raises DataError if it already holds
    something, or if a count is negative.
    """
    if train < 0 or test < 0:
        raise DataError(f"demo images: cannot make {train} + {test}; both counts must be 0 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already exists; remove it or choose another folder for the demo images")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        complete = Path(unfinished) / "images"
        for split, (name, count) in enumerate((("train", train), ("test", test))):
            _write_split(complete / name, count, seed, split)
        complete.rename(folder)
