"""From an image to the views that `draws` decided: crops on the CPU, one image at a time; colour and blur in a batch.

Pixels follow torchvision's functional transforms on float images in [0, 1]. The batched part uses element-wise
operations and per-sample sums of fixed shape only, so on one machine a view has the same bits whichever samples share
its batch, and neither TF32 nor autocast touches it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.draws import ViewDraws, ViewSettings

Interpolation = Literal["bicubic", "bilinear"]

_CACHE_FLOATS = 2**20
_HUE = 3


def crop_view(image: Tensor, box: NDArray[np.int64], flip: bool, size: int, interpolation: Interpolation) -> Tensor:
    """One crop, resized with antialiasing and flipped: uint8 [3, h, w] -> uint8 [3, size, size], on the CPU.

    `box` is top, left, height, width in pixels. Fastest when `image` lies channels-last in memory, as decoders leave
    it; so does the result.
    """
    top, left, height, width = box.tolist()
    crop = image[:, top : top + height, left : left + width]
    view = _resize(crop, (size, size), interpolation)
    return view.flip(-1) if flip else view


def eval_view(image: Tensor, size: int) -> Tensor:
    """The one view of an evaluation: uint8 [3, h, w] -> uint8 [3, size, size], bicubic and antialiased, on the CPU.

    The short side is resized to size x 256/224, from 96 pixels on, or to size below that; then the centre is cut out.
    """
    height, width = image.shape[-2:]
    short = round(size * 256 / 224) if size >= 96 else size
    new_height, new_width = max(short, int(short * height / width)), max(short, int(short * width / height))
    resized = _resize(image, (new_height, new_width), "bicubic")
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[:, top : top + size, left : left + size]


def normalise(crops: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 [n, 3, s, s] of any device -> float32: (crop / 255 - mean) / std for each channel."""
    x = crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return _normalise_in_place(x, mean, std)


def colour_views(crops: Tensor, draws: ViewDraws, settings: ViewSettings) -> Tensor:
    """The rest of a view: uint8 [n, 3, s, s] of any device -> float32 [n, 3, s, s], contiguous, normalised.

    Jitter with each sample's own factors and order, gray, Gaussian blur with its own sigma. `draws` holds the n samples
    in the order of `crops`; its boxes and flips are not read.
    """
    count, _, size, _ = crops.shape
    assert len(draws.jitter) == count, "one draw for each crop"
    views = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    # Dozens of passes over the pixels: on a CPU they are up to twice as fast over pieces of a few MB.
    step = count if crops.is_cuda else max(1, _CACHE_FLOATS * torch.get_num_threads() // (3 * size * size))
    for start in range(0, count, max(step, 1)):
        piece = slice(start, start + step)
        _colour(crops[piece], _part(draws, piece), settings, views[piece])
    return views


def _part(draws: ViewDraws, part: slice) -> ViewDraws:
    box, flip, jitter, order, factors, gray, blur_sigma = draws
    return ViewDraws(box[part], flip[part], jitter[part], order[part], factors[part], gray[part], blur_sigma[part])


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    # torch's uint8 kernel works on interleaved channels and otherwise interleaves by itself, more slowly.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    if image.shape[-2:] == size:
        return batch[0].clone()
    return F.interpolate(batch, size, mode=interpolation, align_corners=False, antialias=True)[0]


def _colour(crops: Tensor, draws: ViewDraws, settings: ViewSettings, views: Tensor) -> None:
    """Writes the views.

    Samples are sorted by the place of hue in their order: then, at each of the four places, hue and the other three
    operations (blends of one form) are slices of the batch, and nothing is gathered or masked.
    """
    device, (count, _, size, _) = crops.device, crops.shape
    hue_at = np.where(draws.factors[:, _HUE] != 0, (draws.order == _HUE).argmax(axis=1), 4)
    hue_at = np.where(draws.jitter, hue_at, 5)
    by_hue = np.argsort(hue_at, kind="stable")
    bounds = np.searchsorted(hue_at[by_hue], np.arange(6)).tolist()
    jittered = bounds[5]

    order, factors, sigma = draws.order[by_hue], draws.factors[by_hue], draws.blur_sigma[by_hue]
    factor = np.take_along_axis(factors, order, axis=1)
    kept = np.where(order == _HUE, np.float32(1), factor)
    to_mean, to_gray = (np.where(order == operation, 1 - factor, np.float32(0)) for operation in (1, 2))
    blurred, grayed = np.flatnonzero(sigma), np.flatnonzero(draws.gray[by_hue])
    radius = size // 10 // 2

    # Two transfers in all, and neither waits for the device.
    numbers = _to_device(np.concatenate([kept, to_gray, to_mean, factors[:, _HUE:]], axis=1), device)[..., None, None]
    indices = _to_device(np.concatenate([by_hue, np.argsort(by_hue), grayed, blurred]), device)
    sort, unsort, grayed_at, blurred_at = torch.split(indices, [count, count, len(grayed), len(blurred)])

    x = crops.index_select(0, sort).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for place in range(4):
        start, end = bounds[place], bounds[place + 1]
        _shift_hue(x[start:end], numbers[start:end, 12])
        for rest in (slice(0, start), slice(end, jittered)):
            _blend(x[rest], *(numbers[rest, term : term + 1] for term in (place, 4 + place, 8 + place)))
    if len(grayed):
        x.index_copy_(0, grayed_at, _gray(x.index_select(0, grayed_at)).expand(-1, 3, -1, -1))
    if len(blurred) and radius:
        taps = _to_device(_half_kernels(sigma[blurred], radius), device)
        x.index_copy_(0, blurred_at, _blur(x.index_select(0, blurred_at), taps))
    torch.index_select(_normalise_in_place(x, settings.mean, settings.std), 0, unsort, out=views)


def _to_device(values: NDArray[np.float32] | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _normalise_in_place(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    for channel in range(3):
        x[:, channel].sub_(mean[channel]).mul_(1 / std[channel])
    return x


def _gray(x: Tensor) -> Tensor:
    """Luma of ITU-R 601 with torchvision's digits: [n, 3, s, s] -> [n, 1, s, s]."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2] * 0.587).add_(x[:, 2:3] * 0.114)


def _blend(x: Tensor, kept: Tensor, to_gray: Tensor, to_mean: Tensor) -> None:
    """In place: brightness, contrast or saturation, by shares of the image, its gray image and that one's mean."""
    if not len(x):
        return
    gray = _gray(x)
    # A mean of means, for rows are too short to be split among threads: the sum's order never depends on the batch.
    mean = gray.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
    x.mul_(kept).add_(gray.mul_(to_gray).add_(mean.mul_(to_mean))).clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """In place: turns the hue of HSV by `shift` ([n, 1, 1], 1 = the whole circle).

    Value and spread (value x saturation) stay, so a channel is value - spread x a trapezoid of its distance to the hue
    that lacks it: the round trip through HSV without its six cases.
    """
    if not len(x):
        return
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    sixths = torch.where(value == green, (blue - red).add_(spread * 2), (red - green).add_(spread * 4))
    sixths = torch.where(value == red, green - blue, sixths)
    turn = sixths.div_((spread * 6).clamp_min_(1e-30)).add_(shift)
    for channel, opposite in ((red, 1 / 2), (green, 1 / 6), (blue, -1 / 6)):
        distance = turn + opposite
        share = distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.sub(value, share.mul_(spread), out=channel)


def _half_kernels(sigma: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Gaussian weights from the centre outwards, [n, radius + 1]; the whole symmetric kernel sums to 1."""
    half = np.exp(-0.5 * (np.arange(radius + 1) / sigma[:, None].astype(np.float64)) ** 2)
    kernels: NDArray[np.float64] = half / (2 * half.sum(axis=1, keepdims=True) - 1)
    return kernels.astype(np.float32)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Rows, then columns, each sample with its own half kernel; borders are reflected. [n, 3, s, s] -> the same."""
    radius, size = taps.shape[1] - 1, x.shape[-1]
    weights = taps[:, :, None, None, None].unbind(1)
    for dim, padding in ((-2, (0, 0, radius, radius)), (-1, (radius, radius, 0, 0))):
        padded = F.pad(x, padding, mode="reflect")
        x = padded.narrow(dim, radius, size) * weights[0]
        for away in range(1, radius + 1):
            pair = padded.narrow(dim, radius - away, size) + padded.narrow(dim, radius + away, size)
            x.add_(pair.mul_(weights[away]))
    return x
