"""Compute an encoder's features of a few images, from whatever holds them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from simclr_dist.convert.sources.folders import FileChunk
from simclr_dist.data.pixels.decode import decode_any
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.encoder.card import LoadedEncoder
from simclr_dist.encoder.preprocess import encoder_kind, preprocess
from simclr_dist.method.precision import computing
from simclr_dist.system.errors import DataError, reason_of

AnyImage = str | Path | bytes | Image.Image | Tensor
_AT_ONCE = 64


@torch.inference_mode()
def features(encoder: LoadedEncoder, images: AnyImage | Sequence[AnyImage]) -> Tensor:
    """Compute the features of an image, float32 [d]. Of a list of images: [n, d]; on the CPU.

    An image is a file's path, a file's content, a PIL image, or uint8 or uint16 [c, h, w]. Files get the checks and pixels of
    `simclr-dist embed`. Raises DataError, which names the image, for what is none.
    """
    if isinstance(images, AnyImage) or not isinstance(images, Sequence):
        return features(encoder, [images])[0]
    card = encoder.card
    kind, weights, parts = encoder_kind(card), next(encoder.parameters()), [torch.empty(0, card["feature_size"])]
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        for first in range(0, len(images), _AT_ONCE):
            some = enumerate(images[first : first + _AT_ONCE], first)
            x = [preprocess(card, _opened(image, number, kind)) for number, image in some]
            with computing("fp32", weights.device):
                parts.append(encoder(torch.stack(x).to(weights)).float().cpu())
    finally:
        for module, was_training in modes:
            module.training = was_training
    return torch.cat(parts)


def _opened(image: object, number: int, kind: Kind) -> Image.Image | Tensor:
    if isinstance(image, Image.Image | Tensor):
        return image
    name, content, problem = f"image {number}", image, None
    if isinstance(image, str | Path):
        (original,) = FileChunk.of("", number, [(str(image), -1)]).read()
        name, content, problem = original.name, original.content, original.problem
    if problem or not isinstance(content, bytes):
        other = f"{type(image).__name__} is no image; give a path, bytes, a PIL image, or a tensor"
        raise DataError(f"{name}: {problem or other}")
    try:
        return decode_any(content, kind)
    except DataError as error:
        raise DataError(f"{name}: {reason_of(error)}") from None
