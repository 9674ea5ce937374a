"""Crop views as `draws` decided. This runs on the CPU, one image at a time.

`colour` does the rest. Crops follow torchvision's resize of uint8 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.views.draws import ViewDraws

Interpolation = Literal["bicubic", "bilinear"]

_LONG = 16  # times as long as wide: from there on the whole, resized, would have far more pixels than image and view


def crop_view(image: Tensor, box: NDArray[np.int64], flip: bool, size: int, interpolation: Interpolation) -> Tensor:
    """Crop, resize with antialiasing and flip, on the CPU. [c, h, w] -> [c, size, size], uint8 or uint16 as the image.

    `box` is top, left, height, width in pixels. Fastest when `image` lies channels-last in memory, as decoders leave
    it; the result lies so too.
    """
    top, left, height, width = box.tolist()
    crop = image[:, top : top + height, left : left + width]
    view = _resize(crop, (size, size), interpolation)
    return view.flip(-1) if flip else view


def turn_views(crops: Tensor, draws: ViewDraws) -> Tensor:
    """Flip views upside down and turn them by quarters, as drawn. [n, c, s, s], in place where there is anything to do."""
    for index in np.flatnonzero(draws.vertical_flip | (draws.turns > 0)).tolist():
        view = crops[index].flip(-2) if draws.vertical_flip[index] else crops[index].clone()
        crops[index] = view.rot90(int(draws.turns[index]), (-2, -1))
    return crops


def eval_view(image: Tensor, size: int) -> Tensor:
    """Make an evaluation's view on the CPU, bicubic and antialiased. [c, h, w] -> [c, size, size], uint8 or uint16.

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


def visible(x: Tensor) -> Tensor:
    """Make pictures of images of any channels, for people. Float [..., c, h, w] in [0, 1] -> [..., 3, h, w].

    Shown are the first three channels, or the first one as gray. What is not RGB is as bright as its brightest pixel allows.
    """
    if x.shape[-3] == 3:
        return x
    shown = x[..., :3, :, :] if x.shape[-3] > 3 else x[..., :1, :, :].expand(*x.shape[:-3], 3, *x.shape[-2:])
    return shown / shown.amax().clamp_min(1e-6)


def picture(image: Tensor) -> Tensor:
    """Make a picture of one image, for people. uint8 or uint16 [c, h, w] -> uint8 [3, h, w]."""
    if image.dtype == torch.uint8 and len(image) == 3:
        return image
    shown = visible(unit_pixels(image))
    return (shown / shown.amax().clamp_min(1e-6)).mul(255).round().to(torch.uint8)


def unit_pixels(crops: Tensor) -> Tensor:
    """Turn whole numbers into float32 from 0 to 1. uint8 is divided by 255, uint16 by 65535; contiguous, of any device."""
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(torch.iinfo(crops.dtype).max)


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 or uint16 [n, c, s, s] to float32. Each channel becomes (pixel - mean) / std."""
    return normalise_pixels(x := unit_pixels(crops), mean, std, out=x)


def normalise_pixels(x: Tensor, mean: Sequence[float], std: Sequence[float], *, out: Tensor) -> Tensor:
    """Normalise float pixels, [n, c, s, s] in [0, 1], into `out`. `out` may be x."""
    for channel in range(len(mean)):
        torch.sub(x[:, channel], mean[channel], out=out[:, channel]).mul_(1 / std[channel])
    return out


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Resize with antialiasing. uint8 by torch's own whole numbers; uint16 in float32, rounded to even, cut at both ends."""
    if image.dtype == torch.uint16 and image.shape[-2:] != size:
        wide = _resize(image.to(torch.float32, memory_format=torch.contiguous_format), size, interpolation)
        return wide.round_().clamp_(0, 65535).to(torch.uint16)
    # torch's uint8 kernel works on interleaved channels. For others it interleaves by itself, more slowly.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    if image.shape[-2:] == size:
        return batch[0].clone()
    if image.shape[-2] > _LONG * max(size[0], image.shape[-1]):
        # Fewer rows first: torch alone would widen each of them before it leaves most of them out.
        batch = F.interpolate(batch, (size[0], image.shape[-1]), mode=interpolation, align_corners=False, antialias=True)
    return F.interpolate(batch, size, mode=interpolation, align_corners=False, antialias=True)[0]
