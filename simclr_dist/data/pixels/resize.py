"""Crop many images of one size at once. The bits are those of `crop_view`.

torch's antialiased resize of uint8 images works in integers: weights of 16 bits, and each of the two passes rounds to uint8
(aten/src/ATen/native/cpu/UpSampleKernel.cpp, after Pillow). Whole numbers below 2**24, or 2**53, are exact in floating point,
so the passes are two batched matrix products here, and the order of their sums does not matter.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.order import Rows
from simclr_dist.data.views.crops import Interpolation

_BITS = 15  # a weight is below 2**15 when it is rounded
_AT_ONCE = 64  # so that a batch and its matrices stay in the cache


def crop_views(
    images: Tensor, which: Rows, box: Rows, flip: NDArray[np.bool_], size: int, interpolation: Interpolation
) -> Tensor:
    """Crop some images, resize them with antialiasing and flip them. Returns uint8 [n, c, size, size], contiguous.

    `images` is uint8 [N, c, h, w], contiguous, and `which` [n] an index into it. `box` [n, 4] is top, left, height, width in
    pixels. For small images: each is multiplied as a whole.
    """
    count, (_, channels, height, width) = len(box), images.shape
    down, across = (_matrices(length, size, interpolation) for length in (height, width))
    exact = torch.promote_types(down.exact, across.exact)
    crops = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for part in (slice(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE)):
        top, left, crop_height, crop_width = box[part].T
        n = len(top)
        with torch.autocast("cpu", enabled=False):
            x = images.index_select(0, torch.from_numpy(which[part])).to(exact).view(n, channels * height, width)
            weights, scale = across.of(left, crop_width, flip[part], exact)
            x = _rounded(torch.bmm(x, weights.transpose(1, 2)), scale).view(channels * n, height, size)
            each = np.arange(n).repeat(channels)  # channel
            weights, scale = down.of(top[each], crop_height[each], np.zeros(len(each), dtype=np.bool_), exact)
            crops[part].copy_(_rounded(torch.bmm(weights, x), scale).view(n, channels, size, size))
    return crops


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return x.mul_(scale).add_(0.5).floor_().clamp_(0, 255)


class _Matrices:
    """Whole-number weights that resize any stretch of `length` pixels to `size`."""

    def __init__(self, length: int, size: int, interpolation: Interpolation) -> None:
        self._first = np.zeros(length + 1, dtype=np.int64)  # where a number of pixels begins in the table; then by its place
        self._first[2:] = np.cumsum(length + 1 - np.arange(1, length))
        self._places = int(self._first[-1]) + 1
        table = np.zeros((self._places, size, length))
        bits = np.zeros(length + 1)
        for pixels in range(1, length + 1):
            weights = _weights(pixels, size, interpolation)
            largest = weights.max()
            bits[pixels] = next((places for places in range(22) if 0.5 + largest * 2 ** (places + 1) >= 2**_BITS), 22)
            scaled = weights * 2.0 ** bits[pixels]
            whole = np.trunc(scaled + np.copysign(0.5, scaled))
            for place in range(length + 1 - pixels):
                table[self._first[pixels] + place, :, place : place + pixels] = whole
        self.exact = torch.float32 if 255 * np.abs(table).sum(axis=2).max() + 2.0 ** bits.max() < 2**24 else torch.float64
        self._table = torch.from_numpy(np.concatenate([table, table[:, ::-1]])).to(self.exact)
        self._scale = torch.from_numpy(2.0**-bits)

    def of(self, place: Rows, pixels: Rows, flip: NDArray[np.bool_], exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return weights and factors. Weights [n, size, length], flipped by `flip`; factors of a product, [n, 1, 1]."""
        at = self._first[pixels] + place + flip * self._places
        weights = self._table.index_select(0, torch.from_numpy(at)).to(exact)
        return weights, self._scale[torch.from_numpy(pixels)].to(exact)[:, None, None]


_matrices = functools.lru_cache(maxsize=8)(_Matrices)


def _weights(pixels: int, size: int, interpolation: Interpolation) -> NDArray[np.float64]:
    """Return weights [size, pixels]. Each row adds up to 1."""
    if pixels == size:
        return np.eye(size)
    scale = pixels / size
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    support = (2 if interpolation == "bicubic" else 1) * stretch
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), pixels)
    at = np.arange(pixels)
    distance = np.abs((at - centre[:, None] + 0.5) / stretch)
    values = _bicubic(distance) if interpolation == "bicubic" else np.maximum(1 - distance, 0)
    values = np.where((at >= first[:, None]) & (at < last[:, None]), values, 0)
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evaluate Keys's kernel with a = -0.5. Pillow's and torch's antialiased resize use the same."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
