"""Tell which TIFFs Pillow reads wrongly, and read those. The library tifffile does it, where it is installed."""

import importlib.metadata
import io
import logging
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simclr_dist.system.errors import DataError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNKNOWN = (
    "a TIFF that is damaged or of a kind that is not read (channels, bits, packing); save it as gray or RGB of 8 or 16 bits"
)

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


def read(content: bytes, why: str) -> Image.Image:
    """Read a TIFF's first page as RGB, not turned. `why` is for the line without tifffile. Raises DataError."""
    try:
        import tifffile
    except ImportError:
        cure = "`pip install 'simclr_dist[tiff]'` brings a reader that can; then shard into a new folder"
        raise DataError(f"a TIFF that Pillow reads wrongly ({why}); {cure}") from None
    logging.getLogger("tifffile").disabled = True  # what is wrong comes as an exception, too
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page: Any = file.pages[0]
        colours = {0: 1, 1: 1, 2: 3}.get(page.photometric, 0)
        if page.dtype != np.uint16 or page.imagedepth != 1 or not 0 < colours <= page.samplesperpixel <= 8:
            raise DataError(UNKNOWN)
        pixels = page.asarray()
    channels = pixels if page.axes[0] == "S" else pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if page.photometric == _WHITE_IS_ZERO:
        channels = 2**page.bitspersample - 1 - channels
    rgb = np.stack([to_8_bits(channel, page.bitspersample) for channel in channels[:colours]], axis=-1)
    return Image.fromarray(rgb if colours == 3 else rgb[..., 0]).convert("RGB")


def to_8_bits(pixels: NDArray[np.uint16], depth: int) -> NDArray[np.uint8]:
    """Scale pixels of 9 to 16 bits, rounded."""
    most = 2**depth - 1
    table: NDArray[np.uint8] = ((np.arange(65536) * 255 + most // 2) // most).clip(0, 255).astype(np.uint8)
    return table[pixels]


def _tags(image: Image.Image) -> Any:
    return image.tag_v2  # type: ignore[attr-defined]  # of TIFFs alone
