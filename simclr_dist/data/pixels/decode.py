"""Decode bytes to pixels."""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode  # registers torch.ops.image

from simclr_dist.data.pixels.images import PNG_SIGNATURE, check_pixels
from simclr_dist.system.errors import DataError, reason_of


def decode(content: bytes) -> Tensor:
    """Decode a JPEG, WebP, GIF or PNG to uint8 [3, h, w]. Channels are last in memory. Raises DataError.

    PNGs go through Pillow: torchvision's reader has been seen to end the process on a damaged one (0.29). Both give the same
    pixels.
    """
    if content.startswith(PNG_SIGNATURE):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=("PNG",)) as png:
                check_pixels(png.width, png.height)
                return torch.from_numpy(np.array(png.convert("RGB"))).permute(2, 0, 1)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers fail on damaged bytes with nearly every exception there is
            # Without Pillow's text: some of it holds a memory address, a new one each time.
            raise DataError(f"cannot be decoded: {type(error).__name__} in a PNG") from None
    try:
        # The op itself: torchvision.io.decode_image only adds a DeprecationWarning (0.29; TorchCodec is to replace it).
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image: Tensor = torch.ops.image.decode_image(pixels, ImageReadMode.RGB.value, False)
    except RuntimeError as error:
        raise DataError(f"cannot be decoded: {reason_of(error)}") from None
    return image
