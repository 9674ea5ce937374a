"""Decode bytes to pixels. This is the one door: no other module knows a decoder."""

import functools
import importlib
import importlib.metadata
import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 (registers torch.ops.image)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simclr_dist.data.pixels.channels import convert, pillow_pixels, read, upright
from simclr_dist.data.pixels.images import PNG_SIGNATURE, check_pixels, prepare_image
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.system.errors import DataError, reason_of

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_PLACE = re.compile(r"^.*\.cpp:\d+,? *")  # where in torchvision an error arose
_RGB = 3  # torchvision's ImageReadMode.RGB


def _by_torchvision(content: bytes) -> Tensor:
    # The op itself: torchvision.io.decode_image only adds a DeprecationWarning (0.29; TorchCodec is to replace it).
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image: Tensor = torch.ops.image.decode_image(pixels, _RGB, False)
    return image


def _by_torchcodec(content: bytes) -> Tensor:
    if b"Exif" in content or b"EXIF" in content:  # it would turn the image (0.17), and has no switch
        return _by_pillow(content)
    image: Tensor = importlib.import_module("torchcodec.decoders").decode_image(content, mode="RGB")
    return image


def _by_pillow(content: bytes) -> Tensor:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        check_pixels(image.width, image.height)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


DTYPES = {8: torch.uint8, 16: torch.uint16}
"""By the bits of a channel."""
DECODERS: dict[str, Callable[[bytes], Tensor]] = {
    "torchvision": _by_torchvision, "torchcodec": _by_torchcodec, "pillow": _by_pillow,
}  # fmt: skip
"""By package. All give the same bytes for what shards hold."""


@functools.cache
def decoder() -> str:
    """Name the package that decodes all but PNGs. It is the first of `DECODERS` that is there."""
    if hasattr(torch.ops.image, "decode_image"):
        return "torchvision"
    return "torchcodec" if importlib.util.find_spec("torchcodec") else "pillow"


def describe_decoders() -> str:
    """Name the packages that make pixels, with their versions."""
    version = importlib.metadata.version
    return f"{decoder()} {version(decoder())}, PNG by pillow {version('pillow')}"


def decode(content: bytes, kind: Kind = RGB8) -> Tensor:
    """Decode a JPEG, WebP, GIF or PNG to uint8 [3, h, w]. It is not turned; channels are last in memory. Raises DataError.

    For another `kind` it is uint8 or uint16 [c, h, w], of all that `channels.prepare` stores. PNGs go through Pillow:
    torchvision's reader has been seen to end the process on a damaged one (0.29). Both give the same pixels.
    """
    try:
        if kind != RGB8:
            return _tensor(read(content, kind))
        return (_by_pillow if content.startswith(PNG_SIGNATURE) else DECODERS[decoder()])(content)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers fail on damaged bytes with nearly every exception there is
        # Without Pillow's text: some of it holds a memory address, a new one each time.
        why = _PLACE.sub("", reason_of(error)) if isinstance(error, RuntimeError) else type(error).__name__
        raise DataError(f"cannot be decoded: {why}") from None


def decode_any(content: bytes, kind: Kind = RGB8) -> Tensor:
    """Decode an image that is not in shards yet. [c, h, w], upright, with their checks and changes. Raises DataError."""
    if kind == RGB8:
        return decode(prepare_image(content).content)
    return _tensor(convert(content, kind))


def from_pillow(image: Image.Image, kind: Kind) -> Tensor:
    """Turn a PIL image upright and into [c, h, w]. It is of this kind, or of 16 bits where it has them. Raises DataError."""
    return _tensor(pillow_pixels(image, kind))


def _tensor(pixels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def turn_upright(image: Tensor, orientation: int) -> Tensor:
    """Turn an image [3, h, w] as its EXIF block says. `orientation` is 1 to 8; another changes nothing."""
    return _tensor(upright(image.permute(1, 2, 0).numpy(), orientation))
