"""Colour views on CUDA by Triton kernels, in four launches.

The values are those of `colour.colour_views`. A tile of a view goes through all operations in registers. A launch before
takes the view's mean, for contrast, and two after it blur.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_dist.data.views.colour import to_device, view_terms
from simclr_dist.data.views.draws import ViewDraws, ViewSettings

_PIXELS = tl.constexpr(1024)  # of a tile
# Columns of a view's row of numbers. Behind the blur's taps are the mean and the scale of each channel.
_HUE_AT, _CONTRAST_AT, _GRAY, _BRIGHT, _REACH, _BLURRED = map(tl.constexpr, range(6))
_KEPT, _TO_GRAY, _TO_MEAN, _SHIFT, _TAPS = map(tl.constexpr, (6, 10, 14, 18, 19))


@triton.jit
def _gray(red, green, blue, RGB: tl.constexpr):
    if RGB:
        red = 0.2989 * red + 0.587 * green + 0.114 * blue
    return red  # without 3 channels there is no colour, and each is its own gray


@triton.jit
def _of_hue(value, spread, place):
    return value - spread * tl.clamp(2 - 6 * tl.abs(place - tl.floor(place) - 0.5), 0.0, 1.0)


@triton.jit
def _adjust(red, green, blue, terms, mean, end, RGB: tl.constexpr):
    """Apply the jitter's operations before place `end`. colour.py explains them (`_blend`, `_shift_hue`)."""
    hue_at = tl.load(terms + _HUE_AT)
    for place in range(end):
        if hue_at == place:
            value, least = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
            spread, sixths = value - least, value - red + green + blue - 2 * least
            turn = tl.where(green < blue, -sixths, sixths) / (6 * tl.maximum(spread, 1e-30)) + tl.load(terms + _SHIFT)
            red, green = _of_hue(value, spread, turn + 2), _of_hue(value, spread, turn + 5 / 3)
            blue = _of_hue(value, spread, turn + 4 / 3)
        else:
            kept, to_gray = tl.load(terms + _KEPT + place), tl.load(terms + _TO_GRAY + place)
            added = to_gray * _gray(red, green, blue, RGB) + tl.load(terms + _TO_MEAN + place) * mean
            red, green = tl.clamp(kept * red + added, 0.0, 1.0), tl.clamp(kept * green + added, 0.0, 1.0)
            blue = tl.clamp(kept * blue + added, 0.0, 1.0)
    return red, green, blue


@triton.jit
def _finish(x, terms, channel, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    x = tl.where(x >= tl.load(terms + _BRIGHT), 1 - x, x)
    mean = terms + WIDTH - 2 * CHANNELS + channel
    return (x - tl.load(mean)) * tl.load(mean + CHANNELS)


# Where a tensor begins in memory must not change the order of a sum: a view has the same bits in any company.
@triton.jit(do_not_specialize_on_alignment=["crops"])
def _colour(
    crops, views, sums, table, of_view, of_channel, of_pixel,
    MEANS: tl.constexpr, MOST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Colour a tile of a view, or of one of its channels. With `MEANS` only up to contrast, and sum its gray pixels."""
    RGB: tl.constexpr = CHANNELS == 3
    TILES: tl.constexpr = (SIZE * SIZE + _PIXELS - 1) // _PIXELS
    place, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    plane = place.to(tl.int64) * (3 if RGB else 1)
    view, channel = plane // CHANNELS, plane % CHANNELS
    pixel = tile * _PIXELS + tl.arange(0, _PIXELS)
    terms, there = table + view * WIDTH, pixel < SIZE * SIZE
    contrast_at = tl.load(terms + _CONTRAST_AT).to(tl.int32)  # below 0 without jitter
    at = crops + view * of_view + channel * of_channel + pixel * of_pixel
    red = tl.load(at, mask=there, other=0).to(tl.float32) / MOST
    green = tl.load(at + of_channel, mask=there, other=0).to(tl.float32) / MOST if RGB else red
    blue = tl.load(at + 2 * of_channel, mask=there, other=0).to(tl.float32) / MOST if RGB else red
    if MEANS:
        red, green, blue = _adjust(red, green, blue, terms, 0.0, contrast_at, RGB)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(there, _gray(red, green, blue, RGB), 0.0)))
    else:
        part = tl.arange(0, triton.next_power_of_2(TILES))
        mean = tl.sum(tl.load(sums + place * TILES + part, mask=part < TILES, other=0.0)) / (SIZE * SIZE)
        red, green, blue = _adjust(red, green, blue, terms, mean, tl.where(contrast_at < 0, 0, 4), RGB)
        gray, blurred = tl.load(terms + _GRAY) > 0, tl.load(terms + _REACH) > 0
        for more in tl.static_range(3 if RGB else 1):
            x = tl.where(gray, _gray(red, green, blue, RGB), red if more == 0 else green if more == 1 else blue)
            x = tl.where(blurred, x, _finish(x, terms, channel + more, WIDTH, CHANNELS))  # else the blur finishes it
            tl.store(views + (plane + more) * (SIZE * SIZE) + pixel, x, mask=there)


# Threads that know where a tensor begins take pixels four by four, and a warp's loads of shifted ones lie apart.
@triton.jit(do_not_specialize_on_alignment=["views", "scratch"])
def _blur(views, scratch, table, DOWN: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Blur a channel's tile down into `scratch`, or from there across. Borders are reflected."""
    TILES: tl.constexpr = (SIZE * SIZE + _PIXELS - 1) // _PIXELS
    plane, pixel = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * _PIXELS + tl.arange(0, _PIXELS)
    view, channel = tl.load(table + plane // CHANNELS * WIDTH + _BLURRED).to(tl.int64), plane % CHANNELS
    terms, there = table + view * WIDTH, pixel < SIZE * SIZE
    whole, down = views + (view * CHANNELS + channel) * (SIZE * SIZE), scratch + plane * (SIZE * SIZE)
    STEP: tl.constexpr = SIZE if DOWN else 1
    place = pixel // SIZE if DOWN else pixel % SIZE
    first = (whole if DOWN else down) + pixel - place * STEP  # of its column or row
    x = tl.load(terms + _TAPS) * tl.load(first + place * STEP, mask=there, other=0.0)
    for away in range(1, tl.load(terms + _REACH).to(tl.int32) + 1):
        before, after = tl.abs(place - away), SIZE - 1 - tl.abs(SIZE - 1 - place - away)
        both = tl.load(first + before * STEP, mask=there, other=0.0) + tl.load(first + after * STEP, mask=there, other=0.0)
        x += tl.load(terms + _TAPS + away) * both
    if not DOWN:
        x = _finish(x, terms, channel, WIDTH, CHANNELS)
    tl.store((down if DOWN else whole) + pixel, x, mask=there)


def colour_views(crops: Tensor, draws: ViewDraws, settings: ViewSettings, out: Tensor | None = None) -> Tensor:
    """Finish views on one CUDA device, as `colour.colour_views` does."""
    count, channels, size, _ = crops.shape
    assert (len(draws.jitter), len(settings.mean)) == (count, channels), "a draw for each crop, a mean for each channel"
    views = torch.empty(crops.shape, dtype=torch.float32, device=crops.device) if out is None else out
    assert views.is_contiguous(), "without gaps"
    crops = crops if crops.is_contiguous(memory_format=torch.channels_last) else crops.contiguous()
    terms = view_terms(draws, size)
    contrast_at = np.where(draws.jitter, (draws.order == 1).argmax(axis=1), -1)
    blurred = np.flatnonzero(terms.reach)
    which, bright = np.pad(blurred, (0, count - len(blurred))), np.where(terms.solarize, 0.5, np.inf)
    columns = np.stack([terms.hue_at, contrast_at, terms.gray, bright, terms.reach, which], axis=1)
    statistics = np.tile([*settings.mean, *(1 / np.array(settings.std))], (count, 1))
    numbers = np.concatenate([columns, terms.numbers, statistics], axis=1).astype(np.float32)
    table = to_device(numbers, crops.device)

    tiles, planes = triton.cdiv(size * size, _PIXELS.value), count * (1 if channels == 3 else channels)
    sums, scratch = views.new_empty(planes * tiles), views.new_empty(len(blurred) * channels, size, size)
    shape = {"SIZE": size, "WIDTH": numbers.shape[1], "CHANNELS": channels}
    given = crops, views, sums, table, crops.stride(0), crops.stride(1), crops.stride(3)
    for means in (True, False):
        _launch(_colour, planes * tiles, *given, MEANS=means, MOST=torch.iinfo(crops.dtype).max, **shape)
    for down in (True, False):
        _launch(_blur, len(scratch) * tiles, views, scratch, table, DOWN=down, **shape)
    return views


def _launch(kernel: triton.JITFunction[..., None], programs: int, of: Tensor, *arguments: Tensor | int, **sizes: int) -> None:
    if programs:
        with torch.cuda.device_of(of):  # Triton launches on the current device, whatever the tensors' is
            kernel[(programs,)](of, *arguments, **sizes)
