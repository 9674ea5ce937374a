"""Load what another program wrote, or start a training from it."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn

from simclr_dist.config.networks import unknown_encoder
from simclr_dist.config.settings import ENCODERS
from simclr_dist.encoder.card import LoadedEncoder, shape_card
from simclr_dist.encoder.file import fill, with_card
from simclr_dist.encoder.names import Foreign, encoder_of
from simclr_dist.encoder.preprocess import preprocess_card
from simclr_dist.encoder.weights import File, fit, read_weights
from simclr_dist.method.encoders import build_encoder
from simclr_dist.system.errors import ConfigError, DataError, both_ends, printable, shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_foreign(
    arch: str,
    weights: str | Path,
    *,
    width: int = 1,
    stem: str = "imagenet",
    channels: int = 3,
    prefix: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int = 224,
    device: str | torch.device = "cpu",
) -> LoadedEncoder:
    """Load the encoder that another program wrote, in eval mode. Its `.card` and `.digests` are as of `load_encoder`.

    `weights` is a file of torch.save or safetensors: a state dict with torchvision's or timm's names, alone or in
    dictionaries ("state_dict", "model", ...), as `weights.fit` finds it. Other tensors (classifier, projector, optimizer) are
    left out and counted in card["weights"]["left_out"]. Forward is that of `load_encoder`, with h alone. A checkpoint does not
    say `mean`, `std` and `image_size`: they are what the evaluation will use.

    Raises ConfigError for a setting out of range. Raises DataError, which names the first key that does not fit, for a file
    without such an encoder. Nothing in the file is ever executed.
    """
    Foreign(arch, str(weights), image_size, width, stem, channels, prefix)  # type: ignore[arg-type]  # its checks
    mean, std = (given or _for_channels(usual, channels) for given, usual in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD)))
    if len(mean) != channels or not all(map(math.isfinite, mean)):
        raise ConfigError(f"mean: {list(mean)}: must be {channels} finite numbers")
    if len(std) != channels or not all(0 < value < math.inf for value in std):
        raise ConfigError(f"std: {list(std)}: must be {channels} numbers above 0, and finite")
    file = read_weights(Path(weights))
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(arch, width=width, stem=stem, channels=channels, image_size=image_size)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.encoder", "arch", 1).replace("views.image_size", "image_size")) from None
    name = f"{arch} (width {width}, stem {stem})" if arch in ENCODERS else f"{arch} for images of {image_size}"
    fitted = fit(file, encoder, name, prefix=prefix)
    fill(encoder, fitted.state)
    named = {"encoder": arch, "width": width, "stem": stem, "channels": channels}
    card = {
        **named, **shape_card(encoder, named), "layer": "h", "feature_size": encoder.feature_size,
        "image_size": image_size, "mean": list(mean), "std": list(std), "step": 0,
        "init": f"published weights {file.path.name} (how they were trained is not known)", "data_digest": None,
        "weights": {
            "file": str(weights), "prefix": fitted.prefix, "left_out": fitted.left_out, "adapted": fitted.adapted,
        },
    }  # fmt: skip
    return with_card(encoder, {**card, "preprocess": preprocess_card(card)}, device, file.sha256)


def rival(word: str) -> str | Foreign:
    """Find the encoder that a word names. It is a file or run of ours, ARCH=FILE, or a network of torchvision or timm.

    The last one's published weights come from the cache of torch.hub or Hugging Face, else they are downloaded; image size,
    mean and deviation are those that they were published with. Raises ConfigError, which says what to fetch, without them.
    """
    if Path(path := encoder_of(word)).is_file():  # it may have a = in it, as a sweep's runs have
        return path
    arch, equals, file = word.partition("=")
    if equals or word.endswith(".safetensors"):
        return Foreign(arch, file) if equals else word
    if reason := unknown_encoder(word):
        raise ConfigError(f"rival: {shown(word)} {reason}; or name an encoder's file, or ARCH=FILE")
    (library, _, network), source, name = word.rpartition("/"), "", "model.safetensors"
    try:
        if library == "timm":
            import huggingface_hub as hub  # it comes with timm, which is slow to import, and may not be there
            import timm

            if (about := timm.get_pretrained_cfg(network)) and (place := about.hf_hub_id):
                source = f"https://huggingface.co/{place}/resolve/main/{name}"
                cached = hub.try_to_load_from_cache(place, name)  # without a look at the network
                path = cached if isinstance(cached, str) else hub.hf_hub_download(place, name)
                return Foreign(word, path, about.input_size[-1], mean=about.mean, std=about.std)
        elif network in torchvision.models.list_models():
            weights = torchvision.models.get_model_weights(network).DEFAULT
            source, how = weights.url, weights.transforms()
            path = f"{torch.hub.get_dir()}/checkpoints/{Path(source).name}"
            if not Path(path).is_file():
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            return Foreign(word, path, how.crop_size[0], mean=tuple(how.mean), std=tuple(how.std))
    except OSError as error:
        why = f"its weights are in no cache here and cannot be downloaded ({type(error).__name__})"
        raise ConfigError(f"rival: {word}: {why}; fetch {source}, and name it by --rival {word}=FILE") from None
    raise ConfigError(f"rival: {word}: publishes no weights; name a file of them by --rival {word}=FILE")


def _for_channels(usual: Sequence[float], channels: int) -> Sequence[float]:
    """Return ImageNet's numbers for images of other channels: their average for each."""
    return usual if channels == len(usual) else [round(sum(usual) / len(usual), 3)] * channels


def start_weights(encoder: nn.Module, name: str, init: str, path: str = "", *, prefix: str = "", leave: str = "") -> str:
    """Load an encoder's start weights by `model.init`. Returns what was really loaded, for the card; in short up to ": ".

    `imagenet` are torchvision's supervised weights, downloaded (or from torch.hub's cache). Where they cannot be had,
    `imagenet_or_random` leaves random ones, and `imagenet` raises ConfigError. With `file`, `path` is one of ours or of another
    program; `leave` lists parts that stay random, with commas between. Raises DataError for a file that does not fit.
    """
    if init == "random":
        return "random"
    if init == "file":
        return _from_file(encoder, Path(path), name, prefix or None, leave)
    weights = torchvision.models.get_model_weights(name.removeprefix("torchvision/")).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        if init == "imagenet_or_random":
            return "random (ImageNet weights could not be downloaded)"
        cure = "set imagenet_or_random, or random"
        raise ConfigError(f"model.init: 'imagenet': cannot download {weights.url} ({error}); {cure}") from None
    fitted = fit(File(Path(weights.url), state, ""), encoder, f"{name} of these settings")
    fill(encoder, fitted.state)
    return f"imagenet, supervised (torchvision {weights}): {fitted.describe()}"


def _from_file(encoder: nn.Module, path: Path, name: str, prefix: str | None, leave: str) -> str:
    """Load a file's weights. Returns which, and what became of them."""
    try:
        file = read_weights(path)
        fitted = fit(file, encoder, f"{name} of these settings", prefix=prefix, leave=leave.split(",") if leave else ())
    except ConfigError as error:
        raise ConfigError(f"model.init_except: {error}") from None
    except DataError as error:
        raise DataError(f"model.init_file: {error}") from None
    fill(encoder, fitted.state)
    origin = "how they were trained is not known"
    if file.card:  # an encoder of ours: what it was started from is part of this one's history
        origin = f"ours, step {file.card.get('step')}, started from {file.card.get('init')}"
    return f"file {file.path.name}: sha256 {file.sha256}; {fitted.describe()}; {both_ends(printable(origin), 500)}"
