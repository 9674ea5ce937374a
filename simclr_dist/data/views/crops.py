"""Crop views as `draws` decided. This runs on the CPU, one image at a time.

`colour` does the rest. Crops follow torchvision's resize of uint8 images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]

_LONG = 16  # times as long as wide: from there on the whole, resized, would have far more pixels than image and view


def crop_view(image: Tensor, box: NDArray[np.int64], flip: bool, size: int, interpolation: Interpolation) -> Tensor:
    """Crop, resize with antialiasing and flip, on the CPU. uint8 [3, h, w] -> uint8 [3, size, size].

    `box` is top, left, height, width in pixels. Fastest when `image` lies channels-last in memory, as decoders leave
    it; the result lies so too.
    """
    top, left, height, width = box.tolist()
    crop = image[:, top : top + height, left : left + width]
    view = _resize(crop, (size, size), interpolation)
    return view.flip(-1) if flip else view


def eval_view(image: Tensor, size: int) -> Tensor:
    """Make an evaluation's view on the CPU, bicubic and antialiased. uint8 [3, h, w] -> uint8 [3, size, size].

    The short side is resized to `short_side`. Then the centre is cut out.
    """
    height, width = image.shape[-2:]
    # Both ends of a very long image, as much of each, never reach the view.
    over_height, over_width = max(height - _LONG * width, 0) // 2, max(width - _LONG * height, 0) // 2
    image = image[:, over_height : height - over_height, over_width : width - over_width]
    height, width = image.shape[-2:]
    short = short_side(size)
    new_height, new_width = max(short, int(short * height / width)), max(short, int(short * width / height))
    resized = _resize(image, (new_height, new_width), "bicubic")
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[:, top : top + size, left : left + size]


def short_side(size: int) -> int:
    """Return what an evaluation resizes an image's short side to. From size 96 on that is size x 256/224, below it is size."""
    return round(size * 256 / 224) if size >= 96 else size


def normalise(crops: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Normalise uint8 [n, 3, s, s] of any device to float32. Each channel becomes (crop / 255 - mean) / std."""
    x = crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return normalise_pixels(x, mean, std, out=x)


def normalise_pixels(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], *, out: Tensor) -> Tensor:
    """Normalise float pixels, [n, 3, s, s] in [0, 1], into `out`. `out` may be x."""
    for channel in range(3):
        torch.sub(x[:, channel], mean[channel], out=out[:, channel]).mul_(1 / std[channel])
    return out


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    # torch's uint8 kernel works on interleaved channels. For others it interleaves by itself, more slowly.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    if image.shape[-2:] == size:
        return batch[0].clone()
    if image.shape[-2] > _LONG * max(size[0], image.shape[-1]):
        # Fewer rows first: torch alone would widen each of them before it leaves most of them out.
        batch = F.interpolate(batch, (size[0], image.shape[-1]), mode=interpolation, align_corners=False, antialias=True)
    return F.interpolate(batch, size, mode=interpolation, align_corners=False, antialias=True)[0]
