"""Say what an encoder's card has."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from simclr_dist.config.ranges import Channels, Count, Natural, Positive, Range
from simclr_dist.config.settings import ENCODERS, Stem
from simclr_dist.method.model import Encoder, ResNet
from simclr_dist.system.files import fitting

Card = dict[str, Any]


class LoadedEncoder(nn.Module):
    """What every loaded encoder has. `file.with_card` gives it to a network, whatever its class."""

    card: Card
    digests: dict[str, Any]  # in hex, None for what came from no file
    preprocess: Callable[[Image.Image | Tensor], Tensor]
    embed: Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class EncoderCard:
    """What every encoder's card has."""

    encoder: str = ENCODERS[0]
    width: Literal[1, 2, 4] = 1
    stem: Stem = "imagenet"
    channels: Channels = 3
    feature_size: Count = 512
    image_size: Annotated[int, Range(least=8, most=16_384)] = 224
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[Positive, ...] = (1.0, 1.0, 1.0)
    step: Natural = 0
    init: str = ""
    data_digest: str | None = None


@dataclasses.dataclass(frozen=True)
class ProjectorCard:
    """What every projector's card has."""

    depth: Annotated[int, Range(least=0, most=1000)] = 2
    hidden: Annotated[int, Range(least=1, most=1_000_000)] = 2048
    dim: Annotated[int, Range(least=1, most=1_000_000)] = 128
    batch_norm: bool = True
    encoder_sha256: str = ""


def shape_card(encoder: Encoder, card: Card) -> Card:
    """Describe how the network is built, for those without this program.

    Returns {"built": a sentence, "shape": {"torchvision": the function that builds it, or None; ...}}. The shape of a ResNet
    of ours has torchvision's "block", "blocks" a stage, "channels" of each stage before "expansion", "stem": {"kernel",
    "stride", "padding", "max_pool"}. Another's has "timm": its name or None, and "arguments", of the function.
    """
    if not isinstance(encoder, ResNet):
        library, _, network = card["encoder"].partition("/")
        shape = {"torchvision": None, "timm": None, library: network, "arguments": dict(encoder.arguments)}
        call = ", ".join([repr(network), *(f"{key}={value!r}" for key, value in encoder.arguments.items())])
        maker = "timm.create_model" if library == "timm" else "torchvision.models.get_model"
        head = "" if library == "timm" else ", its last linear layer and that layer's dropout replaced by nn.Identity()"
        return {"built": f"{maker}({call}){head}; h is what it returns", "shape": shape}
    name, width, conv = card["encoder"], card["width"], encoder.conv1
    stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
    block, max_pool = type(stages[0][0]), isinstance(encoder.maxpool, nn.MaxPool2d)
    shape = {
        "torchvision": None, "block": block.__name__, "blocks": [len(stage) for stage in stages],
        "channels": [conv.out_channels * 2**i for i in range(4)], "expansion": 1 if block is BasicBlock else 4,
        "stem": {"kernel": conv.kernel_size[0], "stride": conv.stride[0], "padding": conv.padding[0], "max_pool": max_pool},
    }  # fmt: skip
    changes = [f"{width} times as many channels in every layer ({conv.out_channels} after the stem)"] if width > 1 else []
    if conv.in_channels != 3:
        changes.append(f"a first layer for images of {conv.in_channels} channel{'s' * (conv.in_channels != 1)}")
    if not max_pool:
        size = f"{conv.kernel_size[0]}x{conv.kernel_size[0]}"
        changes += [f"a stem for small images: conv1 {size} of stride {conv.stride[0]}", "no max pooling"]
    if hasattr(torchvision.models, name):
        kind = f"torchvision's {name}"
        shape["torchvision"] = None if changes else name
    else:
        base = conv.out_channels // width
        kind = f"a ResNet of torchvision's {block.__name__}, {shape['blocks']} in its stages, {base} channels after the stem"
    built = f"{kind}, without fc{'; with ' if changes else ''}{', '.join(changes)}; h is the mean of layer4 over its pixels"
    return {"built": built, "shape": shape}


def check_card(card: Card, encoder: Encoder) -> None:
    """Raise ValueError where a card contradicts its encoder. Checks its optional parts, too."""
    fitting(card, {"config?": dict | None, "weights?": dict | None, "images?": int, "images_seen?": int})
    fitting(card.get("config") or {}, {"global_batch_size?": int, "views?": dict, "data?": dict})
    fitting(card.get("weights") or {"prefix": ""}, {"prefix": str})
    network = f"a {card['encoder']} of width {card['width']} and stem {card['stem']}"
    if not len(card["mean"]) == len(card["std"]) == card["channels"]:
        raise ValueError(f"mean: {card['mean']} or std: {card['std']} is not of {card['channels']} channels")
    if card["feature_size"] != encoder.feature_size:
        raise ValueError(f"feature_size: {card['feature_size']}, and {network} has {encoder.feature_size}")
    if card.get("shape") not in (None, shape_card(encoder, card)["shape"]):  # the weights fit two stems alike
        raise ValueError(f"shape: is not that of {network}")
