"""Prepare images for shards. Each is decoded once as a proof, and re-encoded only where it must be."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from simclr_dist.data.pixels import tiff
from simclr_dist.system.errors import DataError, printable

MAX_PIXELS = 100_000_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by its type of colour; palettes are another

MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I;16B": 1}  # their channels
KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# A closed list: Pillow's other readers include formats that start programs (EPS) or name other files.
# (MPO, several JPEGs in one file, opens as JPEG; AVIF and WebP may be missing from a build of Pillow.)
Image.init()
FORMATS = tuple({"JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF"} & Image.OPEN.keys())
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_LONGEST_JPEG = 65500  # libjpeg's limit
_PACKED_AT_ONCE = 1 << 12  # zlib makes at most 1032 times as much of it
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, and steps
_GARBAGE = (ArithmeticError, EOFError, KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error)  # in a header
_PPM_HEADER, _COMMENT = 1 << 12, re.compile(rb"#[^\r\n]*")
_NEARLY_BLACK = 16  # of 255: where 16 bits a channel hold at most 12
# In a JPEG's scan, 0xFF 0x00 is data and D0 to D7 are restarts. (Without a + after the 0xFF, which would make it quadratic.)
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


class PreparedImage(NamedTuple):
    """An image as shards store it, upright. `extension` is jpg, png or webp; or tif, where it has more than 4 channels.

    `changes` says why it is not stored as it was, a kind each. It is empty when it is.
    """

    content: bytes
    extension: str
    width: int
    height: int
    changes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        return ", ".join(self.changes)


def check_pixels(width: int, height: int) -> None:
    """Refuse an image of more than 100 megapixels, before it is decoded. Raises DataError."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} megapixels")


def prepare_image(content: bytes, *, short_side: int | None = None, quality: int = 95) -> PreparedImage:
    """Decode an image fully. Return its own bytes where they can stay, else RGB re-encoded.

    8-bit RGB and gray JPEG, PNG and WebP without EXIF rotation stay unchanged. Others (16 bits, palette, alpha, CMYK, other
    formats, first frame of animations) become RGB, alpha dropped: JPEG at `quality` from JPEG, else PNG. An image whose shorter
    side exceeds `short_side` is shrunk to it and stored as JPEG, or as PNG if a side is too long for that. Raises DataError for
    what cannot be decoded or would come out nearly black, and for more than 100 megapixels (before decoding).
    """
    with unreadable(content):
        return _prepare(content, short_side, quality)


@contextmanager
def unreadable(content: bytes) -> Iterator[None]:
    """Turn what readers of `content` raise into a DataError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (DataError, MemoryError):
        raise
    # Pillow's readers fail on damaged bytes with nearly every exception there is; each means "not an image".
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = tiff.UNKNOWN if content.startswith(tiff.SIGNATURES) else "not an image"
        raise DataError(printable(reason)) from None


def _prepare(content: bytes, short_side: int | None, quality: int) -> PreparedImage:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        check_pixels(width, height)
        orientation = orientation_of(image) if image.format == "TIFF" else 1  # Pillow turns a TIFF when it loads it
        wrong = tiff.why_wrong(image) if image.format == "TIFF" else ""
        if not wrong:
            image.load()
        extension = KEPT_FORMATS.get(image.format or "")
        turn = orientation_of(image)
        changes = tuple(changes_of(image, content, turn if turn in _UPRIGHT else orientation))
        shrink = short_side is not None and min(width, height) > short_side
        if not changes and not shrink:
            return PreparedImage(content, str(extension), width, height)
        rgb = tiff.read_rgb(content, wrong) if wrong else _as_rgb(image)
        if bits_of(image, content) == 16:
            check_bright(np.asarray(rgb))
    rgb = _turned(rgb, turn)
    if short_side is not None and shrink:
        scale = short_side / min(width, height)
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
        changes += (f"its shorter side exceeds {short_side} pixels",)
    rgb.info = {}  # else the encoder would copy a colour profile that no longer fits
    target = io.BytesIO()
    as_jpeg = (shrink or extension == "jpg") and max(rgb.size) <= _LONGEST_JPEG
    rgb.save(target, **{"format": "JPEG", "quality": quality} if as_jpeg else {"format": "PNG"})
    return PreparedImage(target.getvalue(), "jpg" if as_jpeg else "png", rgb.width, rgb.height, changes)


def check_bright(pixels: NDArray[np.uint8]) -> None:
    """Refuse 16 bits a channel that are nearly black as 8. Raises DataError."""
    if 0 < pixels.max() <= _NEARLY_BLACK:
        raise DataError("16 bits a channel that hold 12 at most: it would come out nearly black; multiply its values by 16")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, turned as its EXIF says. Raises DataError for pixels without a fixed range."""
    rgb = _as_rgb(image)  # first: Pillow turns a TIFF itself when it is decoded
    return _turned(rgb, orientation_of(image))


def _turned(rgb: Image.Image, orientation: int) -> Image.Image:
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def changes_of(image: Image.Image, content: bytes, turn: int, *, deep: bool = False) -> Iterator[str]:
    """List why an image is not stored as it is. Nothing for JPEG, PNG and WebP of a kept mode, upright.

    Those are 8-bit RGB and gray; `deep`: what sets of other kinds keep, alpha and 16 bits among it.
    """
    name, bits, mode, see_through = image.format, bits_of(image, content), image.mode, "transparency" in image.info
    depths, kept = ((8, 16), MODES) if deep else ((8,), ("RGB", "L"))
    if name not in KEPT_FORMATS:
        yield f"a {name} file"
    if bits not in depths:
        yield f"{bits} bits a channel"
    elif mode not in (*kept, "RGBA", "LA"):
        yield f"pixels of mode {mode}"
    if (see_through and mode != "P") if deep else (see_through or mode in ("RGBA", "LA", "PA")):
        yield "transparency dropped"
    if name == "TIFF" and not deep and tiff.has_more_channels(image):
        yield "channels beyond RGB or gray dropped"
    if turn in _UPRIGHT:
        yield "rotated by its EXIF block"
    if name != "MPO" and has_more_frames(image):
        yield "pages beyond the first dropped" if name == "TIFF" else "frames beyond the first dropped"
    if name in ("JPEG", "MPO") and not is_sound_jpeg(content):
        yield "an incomplete or unusual JPEG"
    if name == "PNG" and bits in depths and mode in kept:
        image.load()
        if not is_sound_png(content):
            yield "an incomplete or unusual PNG"


def bits_of(image: Image.Image, content: bytes) -> int:
    """Read the bits of a channel. Pillow shows files of 16, 4 and 2 bits in 8-bit modes."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return tiff.bits(image)
    if image.format == "JPEG2000" and (box := content.find(b"ihdr")) > 0:
        return (content[box + 14] & 127) + 1
    if image.format == "AVIF" and (box := content.find(b"av1C")) > 0:
        return (8, 8, 10, 12)[content[box + 6] >> 5 & 3]
    if image.format == "PPM" and image.mode not in ("1", "F"):
        return int(_COMMENT.sub(b" ", content[:_PPM_HEADER]).split(None, 4)[3]).bit_length()
    return 16 if image.mode.startswith("I;16") else 8


def has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _GARBAGE:
        return False


def is_sound_jpeg(content: bytes) -> bool:
    """Tell whether a JPEG's segments lead to its end mark. Pillow shows one without it; torchvision's reader does not."""
    at = 2
    while (marker := _NEXT_MARKER.search(content, at)) is not None:
        kind, at = content[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return True
        if kind not in (0xD8, 0x01):  # those two have no length
            at += int.from_bytes(content[at : at + 2], "big")
    return False


def orientation_of(image: Image.Image) -> int:
    """Read the orientation, 1 to 8, that the EXIF block says. 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _GARBAGE:
        return 1  # garbage in the EXIF block says nothing about the picture


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts every value above 255 to white
        return Image.fromarray(tiff.to_8_bits(np.asarray(image), tiff.bits(image) if image.format == "TIFF" else 16)).convert(
            "RGB"
        )
    if image.mode in ("I", "F"):
        raise DataError(f"pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
    return image.convert("RGB")


def is_sound_png(content: bytes) -> bool:
    """Tell whether a PNG holds exactly the data of its pixels. They have 8 or 16 bits, no palette, and Pillow has decoded it.

    Pillow shows some that libpng refuses. One of those has ended the process in torchvision's reader (0.29, segmentation
    fault). Raises DataError where a chunk does not fit its checksum, for its pixels are wrong.
    """
    whole, at, unpacker, left = memoryview(content), len(PNG_SIGNATURE), zlib.decompressobj(), _pixel_data_size(content)
    while True:
        try:
            length, kind = struct.unpack_from(">I4s", content, at)
            (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
        except struct.error:
            return False
        body = whole[at + 8 : at + 8 + length]
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise DataError(f"damaged: its {printable(kind.decode('latin-1'))} chunk does not fit its checksum")
        if kind == b"IDAT":
            for start in range(0, length, _PACKED_AT_ONCE):
                if unpacker.eof or left < 0:
                    return False
                try:
                    left -= len(unpacker.decompress(body[start : start + _PACKED_AT_ONCE]))
                except zlib.error:
                    return False
        elif kind == b"IEND":
            return unpacker.eof and not unpacker.unused_data and left == 0
        elif critical and kind not in (b"IHDR", b"PLTE"):
            return False
        at += 12 + length


def _pixel_data_size(content: bytes) -> int:
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // step_x), -(-(height - y) // step_y)) for x, y, step_x, step_y in passes)
    pixel = PNG_CHANNELS.get(colour, 0) * bits // 8
    return sum(rows * (1 + columns * pixel) for columns, rows in sizes if columns > 0 and rows > 0)
