"""Write and read an encoder with its card.

NAME.safetensors is the encoder alone, with its card in the metadata. NAME.json is the card again, for people. NAME.projector
(safetensors too) is the projector that it was trained with, for those who want a later layer than h.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import load, save
from torch import nn

from simclr_dist.config.networks import titled
from simclr_dist.config.ranges import check_ranges
from simclr_dist.config.settings import ENCODERS
from simclr_dist.config.strict_yaml import merge
from simclr_dist.encoder.card import Card, EncoderCard, LoadedEncoder, ProjectorCard, check_card, shape_card
from simclr_dist.encoder.features import features
from simclr_dist.encoder.names import check_is_file
from simclr_dist.encoder.preprocess import preprocess, preprocess_card
from simclr_dist.method.encoders import build_encoder
from simclr_dist.method.model import Encoder, build_projector
from simclr_dist.system.errors import ConfigError, DamagedError, DataError, SaveError, reason_of
from simclr_dist.system.files import fitting, write_atomically

_MOST_BYTES = 2**35  # of a file that is read whole: a resnet152 of width 4 has 2**32


def export_encoder(
    path: Path, encoder: Encoder, card: Card, projector: nn.Module | None = None, *, elsewhere: Sequence[str | Path] = ()
) -> None:
    """Write `path` (.safetensors), its card, and the projector, if any, to `projector_path(path)`.

    The card must have what `EncoderCard` has; `shape_card` and `preprocess` are added. The projector names its encoder by the
    digest of the encoder's file. The encoder is written last: where it is, the others are. Raises SaveError when the disk does
    not take one of them. Then they lie in a new folder in the first of `elsewhere` that takes them, as the error says.
    """
    about = {"format": "simclr_dist encoder 1", **card, **shape_card(encoder, card), "preprocess": preprocess_card(card)}
    text = json.dumps(about, indent=2, sort_keys=True)
    content = save(_weights(encoder), metadata={"card": text})
    files = {path.with_suffix(".json"): text.encode() + b"\n"}
    if projector is not None:
        shape = {"format": "simclr_dist projector 1", **_projector_shape(projector, encoder.feature_size)}
        shape["encoder_sha256"] = hashlib.sha256(content).hexdigest()
        files[projector_path(path)] = save(_weights(projector), metadata={"card": json.dumps(shape, sort_keys=True)})
    files[path] = content
    file = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            write_atomically(file, data)
    except OSError as error:
        raise SaveError(file, error, _written_to(elsewhere, files)) from None


def _written_to(places: Sequence[str | Path], files: Mapping[Path, bytes]) -> str:
    """Write the files to the first place that takes them. Returns the end of an error's line, with the path of the last."""
    for place in places:
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="encoder-", dir=place))
            for file, data in files.items():
                write_atomically(folder / file.name, data)
            return f"; the encoder is {folder / file.name}"
        except OSError:
            shutil.rmtree(folder or "", ignore_errors=True)
    return f"; nor is there room for the encoder in {' or '.join(map(str, places))}" if places else ""


def projector_path(encoder: str | Path) -> Path:
    """Return the path of an encoder's projector. No search for encoders (*.safetensors) finds it."""
    return Path(encoder).with_suffix(".projector")


def load_encoder(path: str | Path, device: str | torch.device = "cpu", layer: str = "h") -> LoadedEncoder:
    """Load an exported encoder in eval mode. Its card (dict) is `.card`; `.digests` has its file's "sha256", in hex.

    `.embed(image)` gives the features of a path, bytes, a PIL image, or a list of these: float32 [d], or [n, d].
    `.preprocess(image)` turns a PIL image, or uint8 or uint16 [c, h, w], into its input, float [c, s, s]; card["preprocess"]
    says how, and c is card["channels"]. Forward: float [n, c, s, s] to [n, card["feature_size"]]. `layer` is what
    comes out: "h", the representation; "projector.N", the projector after its Nth linear layer with BatchNorm and ReLU
    (h is the 0th, as SimCLR v2, section 2, counts); "z", the projector's last layer. card["layer"] is h or projector.N. Behind
    h, `.digests` has "projector_sha256" too, else None. Each file is read once: what its name stands for may change.

    Raises ConfigError for a layer of another name; DataError for a file that is not an encoder of ours or is damaged, and for
    a projector that is missing, belongs to another encoder, or has fewer layers.
    """
    if not re.fullmatch(r"h|z|projector\.[1-9][0-9]*", layer):
        raise ConfigError(f"layer: {layer!r} is not h, z, or projector.N with N from 1")
    path = Path(path)
    check_is_file(path)
    with _reading(path, "an encoder"):
        card, weights, digest = _read(path, EncoderCard())
        card["preprocess"] = preprocess_card(card)  # which older cards lack
        if card["encoder"] not in ENCODERS and not re.fullmatch(r"(timm|torchvision)/[\w.]+", card["encoder"]):
            raise ValueError(f"encoder: {card['encoder'][:60]!r}")
    try:
        encoder = _build(card)
    except ConfigError as error:
        raise DataError(f"{path}: {str(error).removeprefix('model.encoder: ')}") from None
    with _reading(path, "an encoder"):
        check_card(card, encoder)
    _check(encoder, weights, f"{path}: its weights do not fit its card ({titled(card['encoder'], card['width'])})")
    fill(encoder, weights)
    if layer == "h":
        return with_card(encoder, {**card, "layer": "h"}, device, digest)
    projector, shape, of_projector = _load_projector(path, encoder.feature_size, layer, digest)
    last = shape["depth"] if layer == "z" else int(layer.removeprefix("projector."))
    if last > shape["depth"]:
        raise DataError(f"{path}: layer {layer}: its projector has {shape['depth']} layers; ask for one of them, h or z")
    cut = _cut(encoder, projector, {**card, "projector": shape}, last)
    return with_card(*cut, device, digest, of_projector if last else None)


def untrained_encoder(card: Card, seed: int = 0, device: str | torch.device = "cpu") -> LoadedEncoder:
    """Build an encoder of the card's shape and layer with fresh weights. That is what training has to beat."""
    layer, card = card.get("layer", "h"), {**card, "init": "random", "step": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _build(card)
        if layer == "h":
            return with_card(encoder, card, device)
        projector = build_projector(encoder.feature_size, **card["projector"])
    return with_card(*_cut(encoder, projector, card, int(layer.removeprefix("projector."))), device)


def _build(card: Card) -> Encoder:
    size = {"channels": card.get("channels", 3), "image_size": card["image_size"]}
    return build_encoder(card["encoder"], width=card["width"], stem=card["stem"], **size)


def file_digest(path: str | Path) -> str:
    """Return a file's sha256 in hex. A result names its encoder by it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_once(path: Path) -> tuple[bytes, str]:
    """Return a file's content, and its sha256 in hex. Raises ValueError where it is larger than any encoder."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 30} GiB")
        content = file.read()
    return content, hashlib.sha256(content).hexdigest()


def with_card(
    encoder: nn.Module, card: Card, device: str | torch.device, sha256: str | None = None, projector_sha256: str | None = None
) -> LoadedEncoder:
    """Put the encoder on the device, in eval mode, without gradients. Its card is `.card`.

    `.preprocess` makes its input, and `.embed` features of images (`features.features`).
    """
    loaded = cast(LoadedEncoder, encoder)
    loaded.card, loaded.digests = card, {"sha256": sha256, "projector_sha256": projector_sha256}
    loaded.preprocess, loaded.embed = partial(preprocess, card), partial(features, loaded)
    return loaded.to(device).eval().requires_grad_(False)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn what the block raises into a DamagedError. The block reads the file at `path`."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path}: cannot read the {what.split()[1]}: {reason_of(error)}") from None
    except (safetensors.SafetensorError, ConfigError, ValueError, OverflowError, RecursionError) as error:
        why = f"not {what} that this program exported, or damaged ({reason_of(error)})"
        raise DamagedError(f"{path}: {why}; take a whole copy of it") from None


def _read(path: Path, expected: EncoderCard | ProjectorCard) -> tuple[Card, dict[str, torch.Tensor], str]:
    """Read a file's card, its tensors, and its digest. The card has the keys of `expected`, in their ranges."""
    content, digest = read_once(path)
    weights = load(content)  # it checks the header, which is JSON behind its length
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = (header.get("__metadata__") or {}).get("card", "null")
    names = [field.name for field in dataclasses.fields(expected)]
    card: Card = json.loads(text)
    if isinstance(card, dict) and isinstance(expected, EncoderCard):
        card.setdefault("channels", 3)  # older cards do not name them
    fitting(card, dict.fromkeys(names, object))
    check_ranges(merge(expected, {name: card[name] for name in names}, "its card"))
    return card, weights, digest


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a module. They have the names and shapes of its state dict.

    torchvision's MNASNet asks its load_state_dict for a version, which a file of tensors has not.
    """
    for name, tensor in module.state_dict().items():
        tensor.copy_(weights[name])


def _check(module: nn.Module, weights: Mapping[str, torch.Tensor], misfit: str) -> None:
    """Raise DamagedError for the first tensor that does not fit. It begins with `misfit`."""
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        expected, tensor = wanted.get(name), weights.get(name)
        if expected is None or tensor is None:
            why = "is not part of such a network" if expected is None else "is missing"
        elif (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
            kinds = (f"{one.dtype} {list(one.shape)}" for one in (tensor, expected))
            why = " where there should be ".join(kinds)
        elif not tensor.isfinite().all():
            why = "has numbers that are not finite"
        else:
            continue
        raise DamagedError(f"{misfit}: {name}: {why}")


def _load_projector(encoder: Path, feature_size: int, layer: str, sha256: str) -> tuple[nn.Module, Card, str]:
    """Load the projector beside an encoder, with its shape and digest. The shape is the arguments of `build_projector`."""
    path = projector_path(encoder)
    if not path.exists():
        missing = f"its projector, {path.name}, is not beside it (old exports have none)"
        raise DataError(f"{encoder}: layer {layer}: {missing}; ask for layer h")
    with _reading(path, "a projector"):
        card, weights, digest = _read(path, ProjectorCard())
        owner = card["encoder_sha256"]
        shape: dict[str, Any] = {key: card[key] for key in ("depth", "hidden", "dim", "batch_norm")}
        with torch.device("meta"):  # sizes out of a damaged file must not take memory
            projector = build_projector(feature_size, **shape)
    if owner != sha256:
        raise DataError(f"{path}: belongs to another encoder than {encoder}; take both from one export")
    _check(projector, weights, f"{path}: its weights do not fit its own description ({shape['depth']} layers)")
    fill(projector.to_empty(device="cpu"), weights)
    return projector, shape, digest


def _projector_shape(projector: nn.Module, feature_size: int) -> Card:
    sizes = [module.out_features for module in projector.modules() if isinstance(module, nn.Linear)]
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in projector.modules())
    hidden, dim = (sizes[0], sizes[-1]) if sizes else (feature_size, feature_size)
    return {"depth": len(sizes), "hidden": hidden, "dim": dim, "batch_norm": batch_norm}


def _cut(encoder: Encoder, projector: nn.Module, card: Card, layers: int) -> tuple[nn.Module, Card]:
    """Join the encoder and the projector's first linear layers. Each of these keeps what follows it. Returns the card, too."""
    modules: list[nn.Module] = []
    for module in projector.children():
        if isinstance(module, nn.Linear):
            if layers == 0:
                break
            layers -= 1
        modules.append(module)
    sizes = [module.out_features for module in modules if isinstance(module, nn.Linear)]
    shape = {"layer": f"projector.{len(sizes)}", "feature_size": sizes[-1]} if sizes else {"layer": "h"}
    return nn.Sequential(encoder, *modules), {**card, **shape}


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module that are written. They are its state dict, floating-point tensors as float32."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    taken = Counter(tensor.data_ptr() for tensor in state.values())  # safetensors takes no tensor under two names
    return {name: tensor.clone() if taken[tensor.data_ptr()] > 1 else tensor for name, tensor in state.items()}
