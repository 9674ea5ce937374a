"""Turn an image into an encoder's input. The card says how, for those without this program."""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from simclr_dist.data.pixels.decode import DTYPES, from_pillow
from simclr_dist.data.pixels.images import upright_rgb
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.data.views.crops import eval_view, normalise, short_side
from simclr_dist.system.errors import DataError


def preprocess(card: Mapping[str, Any], image: Image.Image | Tensor) -> Tensor:
    """Turn an image into the input of the card's encoder. It is float32 [c, s, s], on the CPU.

    `image` is a PIL image, or uint8 or uint16 [c, h, w]. It is the one view of an evaluation, normalised. A PIL image is turned
    upright by its EXIF block first, and for an encoder of 8-bit RGB made that. Raises DataError for what is no such image.
    """
    kind, pixels = encoder_kind(card), image
    if isinstance(pixels, Image.Image):
        pixels = pil_to_tensor(upright_rgb(pixels)) if kind == RGB8 else from_pillow(pixels, kind)
    fits = isinstance(pixels, Tensor) and pixels.dtype in DTYPES.values() and pixels.dim() == 3
    if not fits or len(pixels) != kind.channels or pixels.numel() == 0:
        given = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(image).__name__
        wanted = f"give a PIL image, or one tensor uint8 or uint16 [{kind.channels}, h, w]"
        raise DataError(f"preprocess: {given} is no image: {wanted}")
    return normalise(eval_view(pixels.cpu(), card["image_size"])[None], card["mean"], card["std"])[0]


def encoder_kind(card: Mapping[str, Any]) -> Kind:
    """Return the kind of images that an encoder was trained on. Older cards do not name it: 8-bit RGB."""
    trained = (card.get("config") or {}).get("data") or {}
    return Kind(len(card["mean"]), 16 if trained.get("bit_depth") == 16 else 8)


def preprocess_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Describe `preprocess` in the names of timm's `pretrained_cfg`. Its short side is round(size / crop_pct)."""
    size = card["image_size"]
    return {
        "input_size": [len(card["mean"]), size, size],
        "crop_pct": math.floor(1e6 * size / short_side(size)) / 1e6,  # not above it: timm takes floor(size / crop_pct)
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": list(card["mean"]),
        "std": list(card["std"]),
    }
