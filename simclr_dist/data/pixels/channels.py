"""Prepare and read images with all their channels and bits. `images` knows 8-bit RGB alone."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from simclr_dist.data.pixels import tiff
from simclr_dist.data.pixels.images import (
    FORMATS,
    KEPT_FORMATS,
    MODES,
    PNG_CHANNELS,
    PNG_SIGNATURE,
    PreparedImage,
    bits_of,
    changes_of,
    check_bright,
    check_pixels,
    orientation_of,
    prepare_image,
    unreadable,
)
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.system.errors import DataError

Pixels = NDArray[Any]  # uint8 or uint16 [h, w, c]

_COLOURS = {channels: colour for colour, channels in PNG_CHANNELS.items()}
# Pillow shows the upper bytes of 16-bit colours alone. Asked for the other byte order, it shows the lower ones; gray and alpha
# of 16 bits are as long as four channels of 8. (13.0)
_RAW = {2: ("RGBA", ("RGBA",)), 3: ("RGB", ("RGB;16B", "RGB;16L")), 4: ("RGBA", ("RGBA;16B", "RGBA;16L"))}


def prepare(content: bytes, kind: Kind = RGB8, *, short_side: int | None = None, quality: int = 95) -> PreparedImage:
    """Decode an image fully. Return its own bytes where they can stay in a set of this kind, else re-encoded, without loss.

    For 8-bit RGB this is `prepare_image`. For other kinds what changes is: EXIF rotation, palettes and CMYK (to RGB), pages and
    frames beyond the first, alpha that is not among the channels, more bits than the kind has, three equal channels where one
    is asked for. Fewer bits, and gray in a set of three channels, stay: they fit when they are read. A TIFF becomes a PNG, or
    with more than 4 channels a plain TIFF; where it has as many pages as channels are asked for, each is one. Raises DataError
    for another number of channels, too.
    """
    if kind == RGB8:
        return prepare_image(content, short_side=short_side, quality=quality)
    with unreadable(content):
        read = _read(content, kind.channels)
        pixels, more = _converted(read, kind)
        changes, (height, width) = (*read.changes, *more), pixels.shape[:2]
    shrink = short_side is not None and min(width, height) > short_side
    if not changes and not shrink:
        return PreparedImage(content, str(read.extension), width, height)
    pixels = upright(pixels, read.turn)
    if short_side is not None and shrink:
        pixels = _shrunk(pixels, short_side)
        changes += (f"its shorter side exceeds {short_side} pixels",)
    written = write_png(pixels) if pixels.shape[2] in _COLOURS else tiff.write(pixels)
    extension = "png" if pixels.shape[2] in _COLOURS else "tif"
    return PreparedImage(written, extension, pixels.shape[1], pixels.shape[0], changes)


def convert(content: bytes, kind: Kind) -> Pixels:
    """Decode any image as `prepare` and `read` would, one after the other. Raises DataError for what does not fit."""
    with unreadable(content):
        read = _read(content, kind.channels)
        return fitted(upright(_converted(read, kind)[0], read.turn), kind)


def read(content: bytes, kind: Kind) -> Pixels:
    """Decode what `prepare` has stored. uint8 or uint16 [h, w, c], by the kind. Raises DataError for what does not fit."""
    if content.startswith(tiff.SIGNATURES):
        pixels = tiff.read(content).pixels
    else:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            check_pixels(image.width, image.height)
            pixels = _pixels(image, content)
    return fitted(pixels, kind)


def fitted(pixels: Pixels, kind: Kind) -> Pixels:
    """Widen 8 bits to 16 and gray to RGB, exactly. Raises DataError where pixels [h, w, c] are of another kind."""
    if not kind.takes(channels := pixels.shape[2]):
        raise DataError(f"has {Kind(channels, 8 * pixels.itemsize)}; asked for: {kind}; give another image, or shard again")
    if 8 * pixels.itemsize > kind.bit_depth:
        raise DataError(f"has 16 bits a channel; asked for: {kind.bit_depth}; give another image, or shard again")
    if 8 * pixels.itemsize < kind.bit_depth:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    return pixels if channels == kind.channels else np.repeat(pixels, kind.channels, axis=2)


def pillow_pixels(image: Image.Image, kind: Kind) -> Pixels:
    """Turn a PIL image upright and into pixels of this kind. Raises DataError for what does not fit."""
    mode = "RGB" if kind.channels == 3 and not image.mode.startswith("I;16") else image.mode
    if mode not in MODES or image.mode in ("I", "F"):
        raise DataError(f"pixels of mode {image.mode}, and the encoder takes {kind}")
    pixels = np.atleast_3d(np.asarray(image if image.mode == mode else image.convert(mode)))
    pixels = pixels.astype(np.uint16 if mode.startswith("I;16") else np.uint8)
    pixels = _to_16_bits(pixels, tiff.bits(image)) if image.format == "TIFF" else pixels
    pixels = upright(pixels, orientation_of(image))  # now, for of a TIFF Pillow has turned it itself, and says so no more
    return fitted(pixels, Kind(kind.channels, max(kind.bit_depth, 8 * pixels.itemsize)))


def _read(content: bytes, channels: int) -> tiff.Read:
    """Decode a file with all that it has. `channels` says whether pages are channels."""
    is_tiff = content.startswith(tiff.SIGNATURES)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_pixels(image.width, image.height)
            if not (is_tiff and tiff.needs_more(image, channels)):
                return _by_pillow(image, content)
    except UnidentifiedImageError:
        if not is_tiff:
            raise
    read = tiff.read(content, channels)
    check_pixels(*read.pixels.shape[1::-1])
    return read


def _by_pillow(image: Image.Image, content: bytes) -> tiff.Read:
    turn = orientation_of(image)  # before it is loaded: of a TIFF, Pillow then turns it, and forgets
    turned_by_pillow = image.format == "TIFF"
    changes = tuple(changes_of(image, content, turn, deep=True))
    pixels, extension = _pixels(image, content, convert=True), KEPT_FORMATS.get(image.format or "")
    return tiff.Read(pixels, pixels.shape[2] in (2, 4), 1 if turned_by_pillow else turn, extension, changes)


def _pixels(image: Image.Image, content: bytes, *, convert: bool = False) -> Pixels:
    """Decode all channels and bits of an open image. `convert` takes palettes, CMYK and the like as RGB."""
    bits = bits_of(image, content)
    if image.format == "PNG" and bits == 16 and PNG_CHANNELS.get(content[25], 1) > 1:
        return _png_of_16_bits(content)
    if image.mode in ("I", "F") or (bits > 8 and not image.mode.startswith("I;16")):
        cure = "save it as PNG or TIFF of 8 or 16 bits without sign"
        raise DataError(f"a {image.format} with pixels of mode {image.mode} and {bits} bits a channel; {cure}")
    if image.mode not in MODES:
        if not convert:
            raise DataError(f"pixels of mode {image.mode}; `simclr-dist shard` converts them")
        has_alpha = image.mode == "PA" or (image.mode == "P" and "transparency" in image.info)
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
    pixels = np.atleast_3d(np.array(image)).astype(np.uint16 if bits > 8 else np.uint8, copy=False)
    if 8 < bits < 16 and image.format == "JPEG2000":
        pixels = np.right_shift(pixels, 16 - bits)  # Pillow has moved them up
    return _to_16_bits(pixels, bits)


def _to_16_bits(pixels: Pixels, bits: int) -> Pixels:
    """Scale pixels of 9 to 15 bits, rounded. Others stay."""
    most = 2**bits - 1
    return ((pixels.astype(np.uint32) * 65535 + most // 2) // most).astype(np.uint16) if 8 < bits < 16 else pixels


def _png_of_16_bits(content: bytes) -> Pixels:
    """Decode a PNG of 2 to 4 channels of 16 bits."""
    channels = PNG_CHANNELS[content[25]]
    mode, layouts = _RAW[channels]
    parts = []
    for layout in layouts:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.tile = [tile._replace(args=layout) for tile in image.tile]
            image._mode = mode
            parts.append(np.asarray(image))
    if channels == 2:
        return np.ascontiguousarray(parts[0]).view(">u2").astype(np.uint16)
    return np.asarray(parts[0].astype(np.uint16) << 8 | parts[1])


def _converted(read: tiff.Read, kind: Kind) -> tuple[Pixels, list[str]]:
    """Bring pixels to the kind's channels and bits. Returns what was changed, too. Raises DataError where that cannot be."""
    pixels, changes = read.pixels, []
    if read.last_is_alpha and pixels.shape[2] != kind.channels:
        pixels = pixels[..., :-1]
        changes.append("transparency dropped")
    if kind.channels == 1 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
        changes.append("gray in three equal channels")
    if not kind.takes(pixels.shape[2]):
        has = read.pixels.shape[2]
        raise DataError(f"has {has} channel{'s' * (has != 1)}, and {kind.channels} are asked for")
    if 8 * pixels.itemsize > kind.bit_depth:
        check_bright(pixels := tiff.to_8_bits(pixels, 16))
        changes.append("16 bits a channel")
    return pixels, changes


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn pixels [h, w, c] as an EXIF block says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    sides = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return np.flip(pixels, sides)


def _shrunk(pixels: Pixels, short_side: int) -> Pixels:
    scale = short_side / min(pixels.shape[:2])
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    planes = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(pixels.shape[2])]
    small = np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes], axis=-1)
    shrunk: Pixels = np.rint(small).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    return shrunk


def write_png(pixels: Pixels) -> bytes:
    """Write a PNG of 1 to 4 channels. Pixels are [h, w] or [h, w, c]. Pillow writes none of 16-bit colours."""
    height, width, channels = (pixels := np.atleast_3d(pixels)).shape
    big = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">")))
    rows = big.view(np.uint8).reshape(height, -1)
    rows[1:] -= rows[:-1].copy()  # each line less the one above: filter 2, which for the first line changes nothing
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _COLOURS[channels], 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(lines.tobytes(), 6), b"IEND"]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return PNG_SIGNATURE + b"".join(framed)
