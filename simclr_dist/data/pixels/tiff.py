"""Tell which TIFFs Pillow reads wrongly or in part. The library tifffile reads those, where it is installed."""

import importlib.metadata
import io
import itertools
import logging
import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.data.pixels.kinds import MOST_CHANNELS
from simclr_dist.system.errors import DataError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNKNOWN = (
    "a TIFF that is damaged or of a kind that is not read (channels, bits, packing, floats, signs); save it"
    " as whole numbers of 8 or 16 bits without sign"
)

_MOST_OF_PNG, _MOST_BYTES = 4, 400_000_000
_DEFLATE, _BOUNDED = (8, 32946), (5, 32773)  # LZW and PackBits make at most some hundred times as much of a file
_ORIENTATION = 274
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES = 258, 259, 262, 277, 284
_WHITE_IS_ZERO, _COLOURS = 0, {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by photometric interpretation


def bits(image: Image.Image) -> int:
    return int(max(_tags(image).get(_BITS, (1,))))


def has_more_channels(image: Image.Image) -> bool:
    """Tell whether a TIFF has channels beside its colours and alpha. Pillow drops them."""
    tags = _tags(image)
    shown = _COLOURS.get(tags.get(_PHOTOMETRIC), 1) + (image.mode in ("RGBA", "LA", "PA"))
    return bool(tags.get(_SAMPLES, 1) > shown)


def why_wrong(image: Image.Image) -> str:
    """Say why Pillow reads a TIFF wrongly (13.0). Returns "" where it does not."""
    tags = _tags(image)
    if bits(image) <= 8:
        return ""
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        return f"{bits(image)} bits a channel, white is zero"  # shown as a negative
    if tags.get(_PLANES) == 2 and tags.get(_SAMPLES, 1) > 1 and tags.get(_COMPRESSION, 1) == 1:
        return f"{bits(image)} bits a channel, in planes, not compressed"  # shown as noise
    return ""


def reader() -> dict[str, str]:
    """Return the name and version of what `read` needs. Empty where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return {"tifffile": importlib.metadata.version("tifffile")}
    return {}


def read_rgb(content: bytes, why: str) -> Image.Image:
    """Read a TIFF's first page as 8-bit RGB, not turned. `why` is for the line without tifffile. Raises DataError."""
    with _opened(content, f"that Pillow reads wrongly ({why})") as file:
        page: Any = file.pages[0]
        colours = {0: 1, 1: 1, 2: 3}.get(page.photometric, 0)
        if page.dtype != np.uint16 or page.imagedepth != 1 or not 0 < colours <= page.samplesperpixel <= 8:
            raise DataError(UNKNOWN)
        pixels = _page(page)
    rgb = np.stack([to_8_bits(pixels[..., colour], page.bitspersample) for colour in range(colours)], axis=-1)
    return Image.fromarray(rgb if colours == 3 else rgb[..., 0]).convert("RGB")


class Read(NamedTuple):
    """An image as its file has it, [h, w, c]. `turn` is its orientation; `extension` None for what shards do not hold."""

    pixels: NDArray[Any]
    last_is_alpha: bool
    turn: int
    extension: str | None
    changes: tuple[str, ...]


def read(content: bytes, channels: int = 0) -> Read:
    """Read all channels of a TIFF. Where it has `channels` pages of one channel each, these are the channels.

    uint8 or uint16 [h, w, c]. Nothing is changed of a TIFF that is as `write` makes them. Raises DataError for other numbers
    than whole ones of 8 or 16 bits, for colours that are not gray or RGB, and for packing that might fill the memory.
    """
    with _opened(content, "of many channels or 16-bit colours") as file:
        page, pages = file.pages[0], [*itertools.islice(file.pages, max(1, channels) + 1)]  # of a million, say, no more
        several = len(pages) > 1
        if len(pages) != channels or page.samplesperpixel != 1:
            pages = pages[:1]
        for one in pages:
            _check_page(one, len(pages), content)
        if any(one.shape != page.shape or one.dtype != page.dtype for one in pages):
            raise DataError("a TIFF whose pages, one a channel, differ in size or bits")
        pixels, turn = np.concatenate([_page(one) for one in pages], axis=2), page.tags.get(_ORIENTATION)
        is_alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)  # of both kinds
        plain = pixels.shape[2] > _MOST_OF_PNG and not several and page.compression == 1 and page.photometric == 1
        orientation = int(turn.value) if turn else 1
        changes = [] if plain else ["a TIFF file"]
        if page.photometric == _WHITE_IS_ZERO:
            changes.append("white is zero")
        if several and len(pages) == 1:
            changes.append("pages beyond the first dropped")
    if 1 < orientation <= 8:
        changes.append("rotated by its EXIF block")
    return Read(pixels, is_alpha, orientation, "tif" if plain else None, tuple(changes))


def write(pixels: NDArray[Any]) -> bytes:
    """Write pixels [h, w, c] as a plain TIFF, not packed. It has one page of min-is-black channels. Raises DataError."""
    target = io.BytesIO()
    plain: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig", "metadata": None, "software": False}
    _tifffile("of many channels").imwrite(target, np.ascontiguousarray(pixels), byteorder="<", **plain)
    return target.getvalue()


def needs_more(image: Image.Image, channels: int) -> bool:
    """Tell whether Pillow shows a TIFF in part or wrongly. `channels` are asked for."""
    is_deep = bits(image) > 8 and not image.mode.startswith("I;16")
    return is_deep or bool(why_wrong(image)) or has_more_channels(image) or (channels > 1 and _has_pages(image, channels))


def _has_pages(image: Image.Image, count: int) -> bool:
    """Tell whether a TIFF has just so many pages. Leaves it at the first."""
    there = []
    for page in (count - 1, count):
        with suppress(EOFError):
            image.seek(page)
            there.append(page)
    image.seek(0)
    return there == [count - 1]


def _tifffile(what: str) -> Any:
    try:
        import tifffile
    except ImportError:
        cure = "`pip install 'simclr_dist[tiff]'` brings a reader that can; then shard into a new folder"
        raise DataError(f"a TIFF {what}; {cure}") from None
    logging.getLogger("tifffile").disabled = True  # what is wrong comes as an exception, too
    return tifffile


def _opened(content: bytes, what: str) -> Any:
    return _tifffile(what).TiffFile(io.BytesIO(content))


def _check_page(page: Any, pages: int, content: bytes) -> None:
    """Refuse a page of unknown kind. Refuse one that takes more memory than it says. Raises DataError."""
    whole = page.dtype in (np.uint8, np.uint16) and page.bitspersample == 8 * page.dtype.itemsize
    if not whole or page.imagedepth != 1 or page.photometric not in (0, 1, 2) or not 0 < page.samplesperpixel <= MOST_CHANNELS:
        raise DataError(UNKNOWN)
    pixel = page.samplesperpixel * page.dtype.itemsize
    size = page.imagewidth * page.imagelength * pixel
    part = max(size, page.tilewidth * page.tilelength * pixel)  # a tile may be larger than the image
    if (most := max(size * pages, part)) > _MOST_BYTES:
        raise DataError(f"{page.imagewidth} x {page.imagelength} pixels with all channels take {most >> 20} MiB")
    if page.compression not in (1, *_DEFLATE, *_BOUNDED):
        raise DataError(f"a TIFF packed as {page.compression.name}; save it with deflate, or not packed")
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True) if page.compression in _DEFLATE else ():
        unpacker = zlib.decompressobj()
        unpacker.decompress(content[start : start + length], part + 1)
        if unpacker.unconsumed_tail:
            raise DataError(UNKNOWN)


def _page(page: Any) -> NDArray[Any]:
    """Read one page, [h, w, c]. Black is zero."""
    pixels = page.asarray(maxworkers=1)  # readers are processes already
    pixels = np.moveaxis(pixels, 0, -1) if page.axes[0] == "S" else np.atleast_3d(pixels)
    return 2**page.bitspersample - 1 - pixels if page.photometric == _WHITE_IS_ZERO else pixels


def to_8_bits(pixels: NDArray[np.uint16], depth: int) -> NDArray[np.uint8]:
    """Scale pixels of 9 to 16 bits, rounded."""
    most = 2**depth - 1
    table: NDArray[np.uint8] = ((np.arange(65536) * 255 + most // 2) // most).clip(0, 255).astype(np.uint8)
    return table[pixels]


def _tags(image: Image.Image) -> Any:
    return image.tag_v2  # type: ignore[attr-defined]  # of TIFFs alone
