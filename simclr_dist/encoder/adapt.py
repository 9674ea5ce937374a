"""Adapt a published network's weights to other images, as timm does."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_TOKENS = 9  # beside the image's: of a class, a teacher, registers


def other_channels(tensor: Tensor, shape: torch.Size) -> tuple[Tensor, str] | None:
    """Change the first convolution of an RGB network for other images. One channel gets the sum; n get them in turn.

    So the sums that it computes keep their size: a gray image is one whose three channels are equal. Returns the tensor and
    what was done, or None for what is no such convolution.
    """
    if tensor.dim() != 4 or tensor.shape[1] != 3 or (*tensor.shape[:1], *tensor.shape[2:]) != (*shape[:1], *shape[2:]):
        return None
    channels = shape[1]
    if channels == 1:
        return tensor.float().sum(dim=1, keepdim=True), "from 3 channels to 1 (their sum)"
    repeated = tensor.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return repeated * (3 / channels), f"from 3 channels to {channels} (repeated in turn, times 3/{channels})"


def other_grid(name: str, tensor: Tensor, shape: torch.Size) -> tuple[Tensor, str] | None:
    """Resample position embeddings for images of another size. A class token's own is dropped where the network has none.

    Returns the tensor and what was done, or None for what is no such table.
    """
    if not name.endswith(("pos_embed", "pos_embedding")) or len(shape) != 3 or tensor.dim() != 3:
        return None
    (old, before), (new, after) = _grid(tensor.shape[1]), _grid(shape[1])
    if tensor.shape[0] != 1 or tensor.shape[2] != shape[2] or not after <= before < _MOST_TOKENS:
        return None
    tokens, places = tensor[:, before - after : before].float(), tensor[:, before:].float()
    changes = [f"without {before - after} of its {before} other tokens"] if before > after else []
    if old != new:
        changes.append(f"from {old} x {old} places to {new} x {new} (bicubic)")
        image = places.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        places = F.interpolate(image, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        places = places.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    return torch.cat([tokens, places], dim=1), ", ".join(changes)


def _grid(count: int) -> tuple[int, int]:
    """Return the side of the square of tokens. And how many stand before it."""
    side = math.isqrt(count)
    return side, count - side**2
