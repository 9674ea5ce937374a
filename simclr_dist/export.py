"""The encoder and its card, out and in: safetensors with the card in its metadata, and beside it as JSON to read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import nn

from simclr_dist.atomic import write_atomically
from simclr_dist.errors import ConfigError, DataError, SaveError
from simclr_dist.model import ResNet

Card = dict[str, Any]


def export_encoder(path: Path, encoder: nn.Module, card: Card) -> None:
    """Write `path` (.safetensors) and its card; the card must say `encoder`, `width` and `stem`.

    Raises SaveError when the disk does not take it.
    """
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in _floats(encoder)}
    weights |= {name: tensor.cpu() for name, tensor in encoder.state_dict().items() if not tensor.is_floating_point()}
    text = json.dumps({"format": "simclr_dist encoder 1", **card}, indent=2, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".json"), text.encode() + b"\n")
        write_atomically(path, save(weights, metadata={"card": text}))
    except OSError as error:
        raise SaveError(f"{path}: cannot be written: {error.strerror}") from None


def load_encoder(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """An exported encoder in eval mode, with its card (dict) as `.card`.

    Forward: float [n, 3, s, s], normalised with card["mean"] and card["std"], to h [n, card["feature_size"]]. Raises
    DataError when the file is not an encoder of ours.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            card: Card = json.loads((file.metadata() or {})["card"])
        weights = load_file(path)
        encoder = ResNet(card["encoder"], width=card["width"], stem=card["stem"])
    except OSError as error:
        raise DataError(f"{path}: cannot read the encoder: {error.strerror or error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not an encoder that this program exported ({type(error).__name__})") from None
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{path}: its weights do not fit its card ({card['encoder']}, width {card['width']})") from None
    return _with_card(encoder, card, device)


def untrained_encoder(card: Card, seed: int = 0, device: str | torch.device = "cpu") -> nn.Module:
    """An encoder of the card's shape with fresh weights: the baseline that training has to beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ResNet(card["encoder"], width=card["width"], stem=card["stem"])
    return _with_card(encoder, {**card, "init": "random", "step": 0}, device)


def start_weights(encoder: ResNet, name: str, init: str, path: str = "") -> str:
    """Load an encoder's start weights as `model.init` says; returns what was really loaded, for the card.

    `imagenet` are torchvision's supervised weights, downloaded (or from torch.hub's cache); `imagenet_or_random` takes
    random ones where they cannot be had. Raises ConfigError where they cannot, DataError for a file that does not fit.
    """
    if init == "random":
        return "random"
    if init == "file":
        loaded = load_encoder(path)
        try:
            encoder.load_state_dict(loaded.state_dict())
        except RuntimeError:
            raise DataError(f"model.init_file: {path}: its weights do not fit a {name} of these settings") from None
        return f"file {file_digest(path)}"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        if init == "imagenet_or_random":
            return "random (ImageNet weights could not be downloaded)"
        raise ConfigError(
            f"model.init: 'imagenet': cannot download {weights.url} ({error}); set imagenet_or_random, or random"
        ) from None
    encoder.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return f"imagenet, supervised (torchvision {weights})"


def file_digest(path: str | Path) -> str:
    """sha256 of a file, hex: what a result names its encoder by."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_card(encoder: nn.Module, card: Card, device: str | torch.device) -> nn.Module:
    encoder.card = card  # type: ignore[assignment]
    return encoder.to(device).eval().requires_grad_(False)


def _floats(encoder: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in encoder.state_dict().items() if tensor.is_floating_point()]
