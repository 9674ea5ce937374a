"""One image's bytes as shards store them: decoded once to prove that it is one, re-encoded only where it must be."""

import io
import struct
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from simclr_dist.data.pixels.jpeg import is_sound_jpeg
from simclr_dist.data.pixels.png import is_sound_png
from simclr_dist.system.errors import DataError, printable

MAX_PIXELS = 100_000_000

_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# A closed list: Pillow's other readers include formats that start programs (EPS) or name other files.
# (MPO, several JPEGs in one file, opens as JPEG; AVIF and WebP may be missing from a build of Pillow.)
Image.init()
_FORMATS = tuple({"JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF"} & Image.OPEN.keys())
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PreparedImage(NamedTuple):
    """An image as shards store it: 8-bit RGB or gray, upright; `extension` is jpg, png or webp.

    `reason` says why it is not stored as it was, "" when it is.
    """

    content: bytes
    extension: str
    width: int
    height: int
    reason: str = ""


def prepare_image(content: bytes, *, short_side: int | None = None, quality: int = 95) -> PreparedImage:
    """Decode an image fully; return its own bytes where they can stay, else RGB re-encoded.

    8-bit RGB and gray JPEG, PNG and WebP without EXIF rotation stay unchanged. Others (16 bits, palette, alpha, CMYK, other
    formats, first frame of animations) become RGB, alpha dropped: JPEG at `quality` from JPEG, else PNG. An image whose shorter
    side exceeds `short_side` is shrunk to it and stored as JPEG. Raises DataError for what cannot be decoded and for more than
    100 megapixels (before decoding).
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return _prepare(content, short_side, quality)
    except (DataError, MemoryError):
        raise
    # Pillow's readers fail on damaged bytes with nearly every exception there is; each means "not an image".
    except Exception as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise DataError(printable(reason)) from None


def _prepare(content: bytes, short_side: int | None, quality: int) -> PreparedImage:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} megapixels")
        image.load()
        extension = _KEPT_FORMATS.get(image.format or "")
        orientation = _orientation(image)
        shrink = short_side is not None and min(width, height) > short_side
        reason = _why_converted(image, content, orientation)
        if not reason and not shrink:
            return PreparedImage(content, str(extension), width, height)
        rgb = _as_rgb(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if short_side is not None and shrink:
        scale = short_side / min(width, height)
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
    rgb.info = {}  # else the encoder would copy a colour profile that no longer fits
    target = io.BytesIO()
    as_jpeg = shrink or extension == "jpg"
    if as_jpeg:
        rgb.save(target, "JPEG", quality=quality)
    else:
        rgb.save(target, "PNG")
    reason = reason or f"its shorter side exceeds {short_side} pixels"
    return PreparedImage(target.getvalue(), "jpg" if as_jpeg else "png", rgb.width, rgb.height, reason)


def _why_converted(image: Image.Image, content: bytes, orientation: int) -> str:
    """What keeps a decoded image from being stored as it is; "" for 8-bit RGB and gray JPEG, PNG and WebP, upright."""
    if image.format not in _KEPT_FORMATS:
        return f"a {image.format} file"
    # Pillow shows 16-bit and 2-bit PNGs in 8-bit modes; the bit depth stands in the header.
    if image.format == "PNG" and content[24] != 8:
        return f"{content[24]} bits a channel"
    if image.mode not in ("RGB", "L"):
        return f"pixels of mode {image.mode}"
    if "transparency" in image.info:
        return "a transparent colour"
    if orientation in _UPRIGHT:
        return "rotated by its EXIF block"
    if image.format == "PNG" and not is_sound_png(content):
        return "an incomplete or unusual PNG"
    if image.format in ("JPEG", "MPO") and not is_sound_jpeg(content):
        return "an incomplete or unusual JPEG"
    return "an animation" if image.format != "MPO" and getattr(image, "n_frames", 1) > 1 else ""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ArithmeticError, EOFError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # garbage in the EXIF block says nothing about the picture


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts every value above 255 to white
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGB")
