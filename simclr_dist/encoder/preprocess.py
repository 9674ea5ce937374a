"""Turn an image into an encoder's input. The card says how, for those without this program."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from simclr_dist.data.pixels.images import upright_rgb
from simclr_dist.data.views.crops import eval_view, normalise, short_side
from simclr_dist.system.errors import DataError


def preprocess(card: Mapping[str, Any], image: Image.Image | Tensor) -> Tensor:
    """Turn an image into the input of the card's encoder. PIL, or uint8 [3, h, w] -> float32 [3, s, s], on the CPU.

    It is the one view of an evaluation, normalised. A PIL image is turned upright by its EXIF block first, and made 8-bit RGB.
    Raises DataError for what is no image.
    """
    pixels = pil_to_tensor(upright_rgb(image)) if isinstance(image, Image.Image) else image
    fits = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.dim() == 3
    if not fits or len(pixels) != 3 or pixels.numel() == 0:
        given = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(image).__name__
        raise DataError(f"preprocess: {given} is no image: give a PIL image, or one tensor uint8 [3, h, w]")
    return normalise(eval_view(pixels.cpu(), card["image_size"])[None], card["mean"], card["std"])[0]


def preprocess_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Describe `preprocess` in the names of timm's `pretrained_cfg`. Its short side is round(size / crop_pct)."""
    size = card["image_size"]
    return {
        "input_size": [3, size, size],
        "crop_pct": math.floor(1e6 * size / short_side(size)) / 1e6,  # not above it: timm takes floor(size / crop_pct)
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": list(card["mean"]),
        "std": list(card["std"]),
    }
