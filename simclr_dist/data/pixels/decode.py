"""Encoded bytes to pixels."""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode  # registers torch.ops.image

from simclr_dist.data.pixels.images import MAX_PIXELS
from simclr_dist.data.pixels.png import PNG_SIGNATURE
from simclr_dist.system.errors import DataError


def decode(content: bytes) -> Tensor:
    """A JPEG, WebP, GIF or PNG as uint8 [3, h, w], channels last in memory; raises DataError with the reason.

    PNGs go through Pillow: torchvision's reader has been seen to end the process on a damaged one (0.29). Both give the same
    pixels.
    """
    if content.startswith(PNG_SIGNATURE):
        return _decode_png(content)
    try:
        # The op itself: torchvision.io.decode_image only adds a DeprecationWarning (0.29; TorchCodec is to replace it).
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image: Tensor = torch.ops.image.decode_image(pixels, ImageReadMode.RGB.value, False)
    except RuntimeError as error:
        raise DataError(f"cannot be decoded: {(str(error).splitlines() or [''])[0]}") from None
    return image


def _decode_png(content: bytes) -> Tensor:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} is more than {MAX_PIXELS // 1_000_000} megapixels")
            pixels = np.array(image.convert("RGB"))
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers fail on damaged bytes with nearly every exception there is
        # No text of Pillow's: some of it holds an address, another one each time.
        raise DataError(f"cannot be decoded: {type(error).__name__} in a PNG") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
