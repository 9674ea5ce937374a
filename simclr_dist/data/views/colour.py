"""Jitter, gray, blur and normalise a batch of views, as `draws` decided. Any device will do.

Pixels follow torchvision's functional transforms on float images in [0, 1], within 1e-5. Without 3 channels there is no colour:
brightness, contrast (about each channel's own mean), blur and solarize change every channel alike. A view has the same bits
whichever samples share its batch on one machine, and neither TF32 nor autocast touches it. So only these operations are used:
element-wise ones, sums over one sample, and on the CPU matrix products of one sample.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.views.crops import normalise_pixels, unit_pixels
from simclr_dist.data.views.draws import ViewDraws, ViewSettings

# Dozens of passes over the pixels: some views and their scratch should stay in a core's own cache.
_CACHE_FLOATS = 2**18
_HUE = 3
# A Gaussian's taps below this are left out and their weight is shared among the others. Together they are below 2e-6.
_LEAST_TAP = 5e-7
_BLOCK = 16


class Colour(Protocol):
    """What `colour_views` is, and what `compiled.compile_colour` returns."""

    def __call__(self, crops: Tensor, draws: ViewDraws, settings: ViewSettings, out: Tensor | None = None) -> Tensor: ...


class _Terms(NamedTuple):
    """Factors for the pixels of n views. They are computed for the whole batch at once."""

    hue_at: NDArray[np.int64]
    """[n]: the place of hue among the four operations; 4 without hue, 5 without any."""
    gray: NDArray[np.bool_]
    """[n]"""
    reach: NDArray[np.int64]
    """[n]: how many taps of the blur beside the middle one are not 0."""
    solarize: NDArray[np.bool_]
    """[n]"""
    numbers: NDArray[np.float32]
    """[n, 13 + taps]: at each of four places the shares of image, gray image and mean; the shift of hue; the taps."""

    def part(self, views: slice | NDArray[np.int64]) -> _Terms:
        return _Terms(*(field[views] for field in self))  # type: ignore[arg-type]  # each field can be indexed so


def colour_views(crops: Tensor, draws: ViewDraws, settings: ViewSettings, out: Tensor | None = None) -> Tensor:
    """Finish views on any device. uint8 or uint16 [n, c, s, s] -> float32, contiguous, normalised, in `out` if given.

    Jitter uses each sample's own factors and order; gray, Gaussian blur (own sigma) and solarize follow. `draws` holds
    the n samples in the order of `crops`; its boxes, flips and turns are not read.
    """
    count, channels, size, _ = crops.shape
    assert len(draws.jitter) == count, "one draw for each crop"
    views = torch.empty(crops.shape, dtype=torch.float32, device=crops.device) if out is None else out
    terms = view_terms(draws, size)
    threads = torch.get_num_threads()
    # A core is left to the reading process. In passes that are so short a second thread costs more than it brings.
    torch.set_num_threads(max(1, threads - 1))
    try:
        step = count if crops.is_cuda else _CACHE_FLOATS * torch.get_num_threads() // (channels * size * size)
        step = max(step, 1)
        for start in range(0, count, step):
            part = slice(start, start + step)
            _colour(crops[part], terms.part(part), settings, views[part])
    finally:
        torch.set_num_threads(threads)
    return views


def view_terms(draws: ViewDraws, size: int) -> _Terms:
    hue_at = np.where(draws.factors[:, _HUE] != 0, (draws.order == _HUE).argmax(axis=1), 4)
    factor = np.take_along_axis(draws.factors, draws.order, axis=1)
    kept = np.where(draws.order == _HUE, np.float32(1), factor)
    to_gray, to_mean = (np.where(draws.order == operation, 1 - factor, np.float32(0)) for operation in (2, 1))
    taps = half_kernels(draws.blur_sigma, size // 10 // 2)
    return _Terms(
        np.where(draws.jitter, hue_at, 5),
        draws.gray,
        np.count_nonzero(taps[:, 1:], axis=1),
        draws.solarize,
        np.concatenate([kept, to_gray, to_mean, draws.factors[:, _HUE:], taps], axis=1),
    )


def _colour(crops: Tensor, terms: _Terms, settings: ViewSettings, views: Tensor) -> None:
    """Write the views.

    Samples are sorted by the place of hue in their order. Then, at each of the four places, hue and the other three
    operations (blends of one form) are slices of the batch, and nothing is masked or scattered. Later they are sorted by
    gray and by width of blur, for the same reason.
    """
    by_hue = np.argsort(terms.hue_at, kind="stable")
    by_blur = np.lexsort((-terms.reach, ~terms.gray))
    jitter, blur = terms.part(by_hue), terms.part(by_blur)
    bounds = np.searchsorted(jitter.hue_at, np.arange(6)).tolist()
    jittered, grayed = bounds[5], np.count_nonzero(terms.gray)
    # Few transfers, and none waits for the device.
    numbers = to_device(jitter.numbers[:, :13], crops.device)[..., None, None]
    taps = to_device(blur.numbers[:, 13:], crops.device)[..., None, None]

    if crops.dtype != torch.uint8:
        crops = unit_pixels(crops)  # first: torch promises little more of uint16 than to copy it
    x = _in_order(crops, by_hue)
    x = x if x.is_floating_point() else unit_pixels(x)
    for place in range(4):
        start, end = bounds[place], bounds[place + 1]
        _shift_hue(x[start:end], numbers[start:end, 12])
        for rest in (slice(0, start), slice(end, jittered)):
            shares = [numbers[rest, term : term + 1] for term in (place, 4 + place, 8 + place)]
            has_gray, has_mean = (jitter.numbers[rest, term + place].any() for term in (4, 8))
            _blend(x[rest], shares[0], shares[1] if has_gray else None, shares[2] if has_mean else None)
    x = _in_order(x, np.argsort(by_hue)[by_blur])
    if grayed:
        x[:grayed] = _gray(x[:grayed])
    for part in (slice(0, grayed), slice(grayed, len(x))):
        if blurred := np.count_nonzero(blur.reach[part]):
            views_to_blur = slice(part.start, int(part.start + blurred))
            _blur(x[views_to_blur], taps[views_to_blur], blur.reach[views_to_blur])
    x = _in_order(x, np.argsort(by_blur))
    if terms.solarize.any():
        which = to_device(np.flatnonzero(terms.solarize), crops.device)
        bright = x.index_select(0, which)
        x.index_copy_(0, which, torch.where(bright < 0.5, bright, 1 - bright))
    normalise_pixels(x, settings.mean, settings.std, out=views)


def _in_order(x: Tensor, order: NDArray[np.int64]) -> Tensor:
    """Return the samples of x [n, c, s, s] in another order."""
    if (order[:-1] < order[1:]).all():
        return x
    memory = x.permute(0, 2, 3, 1) if x.is_contiguous(memory_format=torch.channels_last) else x
    ordered = memory.index_select(0, to_device(order, x.device))  # far faster in the memory's own layout
    return ordered if memory is x else ordered.permute(0, 3, 1, 2)


def to_device(values: NDArray[np.float32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy an array to a device. The host waits for nothing: CUDA would wait with pageable memory above 64 KiB."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _gray(x: Tensor) -> Tensor:
    """Compute luma (ITU-R 601) with torchvision's digits. [n, 3, s, s] -> [n, 1, s, s]."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def _blend(x: Tensor, kept: Tensor, to_gray: Tensor | None, to_mean: Tensor | None) -> None:
    """Blend in place an image, its gray image and that one's mean. This gives brightness, contrast or saturation.

    The shares are [n, 1, 1, 1]. None stands for shares that are all 0, and gives the same bits.
    """
    if not len(x):
        return
    gray = None if to_gray is None and to_mean is None else _gray(x) if x.shape[1] == 3 else x
    # A mean of means: rows are too short to be split among threads, so the sum's order never depends on the batch.
    mean = None if gray is None or to_mean is None else gray.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
    x.mul_(kept)
    if mean is not None and to_mean is not None:
        x.add_(mean.mul_(to_mean))
    if gray is not None and to_gray is not None:
        x.add_(gray.mul_(to_gray))
    x.clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of HSV in place by `shift`. It is [n, 1, 1]; 1 is the whole circle.

    Value and spread (value x saturation) stay. So a channel is value - spread x a trapezoid of its distance to the hue
    that lacks it. The hue itself, in sixths of the circle from red, is +-(value + green + blue - red - 2 least) / spread,
    with the sign of green - blue. This needs no comparison, which would be torch's slowest operation here.
    """
    if not len(x):
        return
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    least = torch.minimum(red, green)
    torch.minimum(least, blue, out=least)
    sixths = (value - red).add_(green).add_(blue).sub_(least, alpha=2)
    torch.copysign(sixths, green - blue, out=sixths)
    spread = torch.sub(value, least, out=least).clamp_min_(1e-30)
    turn = torch.addcdiv(shift, sixths, spread, value=1 / 6)
    # Distances count from the lacking hue plus a half (plus 1 to be positive), so that 1/2 after the point means no distance.
    for channel, opposite in ((red, 1 / 2), (green, 1 / 6), (blue, -1 / 6)):
        torch.add(turn, opposite + 1.5, out=channel)
    distance = x.frac_().sub_(0.5).abs_()
    share = torch.add(x.new_full((), 2), distance, alpha=-6, out=x).clamp_(0, 1)
    torch.addcmul(value[:, None], share, spread[:, None], value=-1, out=x)


def half_kernels(sigma: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Compute Gaussian weights from the centre outwards, [n, radius + 1]. The whole kernel sums to 1. Sigma 0: 1, 0, 0..."""
    wide = np.maximum(sigma[:, None].astype(np.float64), 1e-3)
    half = np.exp(-0.5 * (np.arange(radius + 1) / wide) ** 2)
    kernels: NDArray[np.float64] = half / (2 * half.sum(axis=1, keepdims=True) - 1)
    kernels[kernels < _LEAST_TAP] = 0
    kernels /= 2 * kernels.sum(axis=1, keepdims=True) - kernels[:, :1]
    return kernels.astype(np.float32)


def _blur(x: Tensor, taps: Tensor, reach: NDArray[np.int64]) -> None:
    """Blur in place, rows, then columns, each sample with its half kernel. Borders are reflected.

    x [n, c, s, s]; taps [n, radius + 1, 1, 1]; `reach` [n], falling: the last tap of each that is not 0.
    """
    if x.device.type == "cpu":
        # Sample by sample, in memory of its own: products of the same shape and alignment give the same bits in any batch.
        with torch.autocast("cpu", enabled=False):
            for image, half, radius in zip(x, taps[..., 0, 0], reach.tolist(), strict=True):
                image.copy_(_blur_by_products(image, half[: radius + 1]))
    else:
        x.copy_(_blur_by_taps(x, taps, reach))


def _blur_by_taps(x: Tensor, taps: Tensor, reach: NDArray[np.int64]) -> Tensor:
    size, radius = x.shape[-1], int(reach[0])
    wide = [int(np.count_nonzero(reach >= away)) for away in range(radius + 1)]
    for dim, padding in ((-2, (0, 0, radius, radius)), (-1, (radius, radius, 0, 0))):
        padded = F.pad(x, padding, mode="reflect")
        x = padded.narrow(dim, radius, size) * taps[:, 0:1]
        for away in range(1, radius + 1):
            part = slice(wide[away])
            before, after = (padded[part].narrow(dim, radius + side * away, size) for side in (-1, 1))
            x[part].addcmul_(before + after, taps[part, away : away + 1])
    return x


def _blur_by_products(image: Tensor, half: Tensor) -> Tensor:
    """Blur [c, s, s] by a half kernel [radius + 1]. A band matrix multiplies blocks of _BLOCK rows and their borders."""
    channels, size, radius = len(image), image.shape[-1], len(half) - 1
    blocks, width = -(-size // _BLOCK), _BLOCK + 2 * radius
    filled = blocks * _BLOCK - size
    # Each row is one longer than the matrix's. So the kernel moves on by one from row to row.
    skewed = half.new_zeros(_BLOCK, width + 1)
    skewed[:, : 2 * radius + 1] = torch.cat([half.flip(0), half[1:]])
    band = skewed.view(-1)[: _BLOCK * width].view(1, _BLOCK, width).expand(blocks, -1, -1)

    padded = F.pad(F.pad(image, (0, 0, radius, radius), mode="reflect"), (0, 0, 0, filled))
    down = image.new_empty(channels, blocks, _BLOCK, size)
    for channel in range(channels):
        torch.bmm(band, padded[channel].unfold(0, width, _BLOCK).transpose(1, 2), out=down[channel])
    down = down.view(channels, -1, size)[:, :size]
    padded = F.pad(F.pad(down, (radius, radius, 0, 0), mode="reflect"), (0, filled)).flatten(0, 1)
    across = torch.bmm(padded.unfold(1, width, _BLOCK).transpose(0, 1), band.transpose(1, 2))
    return across.transpose(0, 1).reshape(channels, size, -1)[..., :size]
