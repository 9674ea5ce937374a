"""Write a folder for a model hub. It has the encoder, and a card for people."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from simclr_dist import __version__
from simclr_dist.config.ranges import may_change
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves, write_yaml
from simclr_dist.data.pixels.kinds import RGB8
from simclr_dist.encoder.card import Card, shape_card
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.encoder.names import result_path
from simclr_dist.encoder.preprocess import encoder_kind
from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.result.file import TRAINED, UNTRAINED, Result, read_result, title
from simclr_dist.evaluate.result.report import cell, counts, leak, signal_rows
from simclr_dist.method.model import Encoder
from simclr_dist.system.errors import ConfigError, DataError, SaveError, printable, reason_of

_FILE = "model.safetensors"  # where the hub, and timm, look for weights
_TIMM = """
encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # from the hub: "hf-hub:OWNER/NAME"
"""
_PREPARE = "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))\n"
_TORCHVISION = f"""import torch
import torchvision
from safetensors.torch import load_file

encoder = torchvision.models.get_model("{{name}}"{{arguments}}).eval()
missing, _ = encoder.load_state_dict(load_file("{_FILE}"), strict=False)
encoder.set_submodule(missing[0].rpartition(".")[0], torch.nn.Identity())  # its classifier, which is not in the file
"""
_OURS = f"""from simclr_dist import load_encoder

encoder = load_encoder("{_FILE}")
"""


def publish(encoder_path: str | Path, folder: str | Path, license_id: str = "") -> Result:
    """Write a new folder as model hubs take it. Returns the result that is in it, or {}.

    README.md says how the encoder is loaded and was trained, its settings, start weights, licence and results: those of
    `names.result_path(encoder_path)`, where they are of this very file. config.json is timm's for networks that timm has, so
    its `local-dir:` and `hf-hub:` load them. No path of the machine that trained is in it. The folder is there as a whole, or
    not at all.

    Raises ConfigError for a folder that is there already, and a licence that is no identifier; DataError for what is no
    encoder of ours, and a folder that cannot be written.
    """
    path, folder = Path(encoder_path), Path(folder)
    if folder.exists():
        raise ConfigError(f"export: {str(folder)!r} is there already; name a new folder")
    if license_id and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id):
        raise ConfigError(f"license: {license_id!r} is no identifier of a licence; name one like apache-2.0, or other")
    loaded = load_encoder(path)
    card, encoder = loaded.card, cast(Encoder, loaded)  # of layer h it is one
    result = read_result(result_path(path))
    if result.get("encoder", {}).get("sha256") != loaded.digests["sha256"]:
        result = {}
    # Older cards have no shape.
    public = {**card, **shape_card(encoder, card), "config": _deciding(card.get("config") or {})}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        export_encoder(temporary / _FILE, encoder, public)
        (temporary / "config.json").write_text(
            json.dumps(_timm_config(public) or public, indent=2, sort_keys=True) + "\n", "utf-8"
        )
        (temporary / "README.md").write_text(model_card(folder.name, public, result, license_id), "utf-8")
        temporary.rename(folder)
    except (OSError, SaveError) as error:
        raise DataError(f"{folder}: cannot be written: {reason_of(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def model_card(name: str, card: Card, result: Result, license_id: str = "") -> str:
    """Return the Markdown of a model card. Its code runs in the folder of the weights."""
    timm = _timm_config(card)
    front = {"library_name": "timm" if timm else "pytorch", "pipeline_tag": "image-feature-extraction"}
    front |= {"license": license_id} if license_id else {}
    start = "" if card["init"] == "random" else ", from start weights that are named below"
    tags = ["simclr", "self-supervised-learning", *(["timm"] if timm else [])]
    parts = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in front.items()), "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# {_cell(name)}",
        f"An image becomes {card['feature_size']} numbers. Learnt from images without labels by SimCLR, with simclr_dist"
        f" {__version__}{start}. The network: {_cell(card['built'])}.",
        "## Use",
        *(f"```python\n{code}```" for code in usage(card)),
        f"Input: {_input(card)}",
        "## Training",
        _table(["", ""], list(_training(card))),
    ]
    if settings := _settings(card["config"]):
        parts += ["Settings that are not the defaults:", f"```yaml\n{settings}```"]
    parts += ["## Results", *_results(result)]
    parts += ["## Licence", f"Of this encoder: {license_id or 'not stated'}. {_licence_of_start(card['init'])}"]
    return "\n\n".join(parts) + "\n"


def usage(card: Card) -> Iterator[str]:
    """Yield code that loads the encoder from its folder. It is timm's or torchvision's, where they have it, and ours."""
    channels, side = card["preprocess"]["input_size"][:2]
    package, image, prepare = "from PIL import Image", 'image = Image.open("IMAGE.jpg").convert("RGB")\n', _PREPARE
    after = "h = encoder({})\n"
    if channels != 3:  # no file of such images is certain to be known to Pillow
        package, image, prepare = "import torch", "", ""
        after = f"h = encoder(torch.zeros(1, {channels}, {side}, {side}))  # in place of zeros: images, prepared as below\n"
    if _timm_config(card):
        yield f"import timm\n{package}\n{_TIMM}{prepare}{image}{after.format('prepare(image)[None]')}"
    if name := card["shape"]["torchvision"]:
        arguments = "".join(f", {key}={value!r}" for key, value in card["shape"].get("arguments", {}).items())
        yield _TORCHVISION.format(name=name, arguments=arguments)
    also = "" if channels == 3 else '# or, of a file: h = encoder.embed("IMAGE.tif")\n'
    yield f"{package}\n{_OURS}{image}{after.format('encoder.preprocess(image)[None]')}{also}"


def _timm_config(card: Card) -> dict[str, Any] | None:
    """Return the config.json by which timm builds the network. Returns None where timm has it not."""
    shape = card["shape"]
    name = shape.get("timm") or (shape["torchvision"] if "arguments" not in shape else None)  # timm has torchvision's ResNets
    if name is None:
        return None
    arguments = {key: value for key, value in shape.get("arguments", {}).items() if key not in ("num_classes", "in_chans")}
    return {
        "architecture": name, "num_classes": 0, "num_features": card["feature_size"], "model_args": arguments,
        "pretrained_cfg": {**card["preprocess"], "num_classes": 0},
    }  # fmt: skip


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a result. What a resumed run may change is left out, so no folder or URL is in it."""
    values = {key: value for key, value in leaves(config) if key not in may_change(Config)}
    if file := values.get("model.init_file"):
        values["model.init_file"] = Path(file).name
    return _nested(values)


def _settings(config: Mapping[str, Any]) -> str:
    """Write the settings that differ from their defaults, as YAML."""
    plain = json.loads(json.dumps(dict(leaves(Config().to_dict()))))  # a card has lists, and no tuples
    values = dict(leaves(config))
    changed = {key: values[key] for key in plain if key in values and values[key] != plain[key]}
    return write_yaml(_nested(changed)) if changed else ""


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    return nested


def _input(card: Card) -> str:
    how, side = card["preprocess"], card["image_size"]
    resized = f"the short side resized to {round(side / how['crop_pct'])} pixels (bicubic, antialiased)"
    crop = f"{resized}, the centre {side} x {side} cut out"
    scale = "" if encoder_kind(card) == RGB8 else " (8 bits divided by 255, 16 bits by 65535)"
    return f"{crop}; numbers from 0 to 1{scale}, less the mean {how['mean']}, divided by {how['std']}."


def _training(card: Card) -> Iterator[list[str]]:
    """Yield rows of what the encoder has learnt from, and how long."""
    images, seen, config = card.get("images"), card.get("images_seen"), card["config"]
    yield ["images", str(images or "not recorded") + (f" (digest {card['data_digest']})" if card["data_digest"] else "")]
    epochs = f", {seen / images:.1f} epochs" if images and seen else ""
    yield ["steps", f"{card['step']}{epochs}"]
    if batch := config.get("global_batch_size"):
        yield ["batch", f"{batch} images, {2 * (batch - 1)} negatives an anchor"]
    yield ["started from", str(card["init"])]


def _licence_of_start(init: str) -> str:
    first = re.split(r"; ours, step [^,]*, started from ", init)[-1]  # of a chain of encoders of ours
    if first.startswith("random"):
        return "It was trained from random weights: no weights of others are in it."
    said = (
        "torchvision's; see its documentation"
        if first.startswith("imagenet")
        else "not known to this program; ask who published them"
    )
    return f"It was started from weights of others ({_cell(first.partition(': ')[0])}), and their licence holds too: {said}."


def _results(result: Result) -> Iterator[str]:
    """Yield the tables of an evaluation. They have accuracy beside what it has to beat, or what needs no labels."""
    if not result:
        yield "Not measured."
        return
    names = {RAW_PIXELS: "raw pixels", UNTRAINED: "the network before training", TRAINED: "this encoder"}
    measured = {protocol: part["results"] for protocol, part in result["protocols"].items()}
    if measured:
        rows = []
        for features, name in names.items():
            if any(features in part for part in measured.values()):
                rows.append([name, *(cell(part.get(features, {})) for part in measured.values())])
        intervals = (part["results"][TRAINED]["interval"] for part in result["protocols"].values())
        rows.append(["its 95 % interval", *(f"{low:.2f} to {high:.2f}" for low, high in intervals)])
        yield _table(["top-1 accuracy, %", *map(title, measured)], rows)
    else:
        yield _table(["signal", "this encoder"], [[name, _number(value)] for name, value, *_ in signal_rows(result)])
    yield " ".join([f"On {counts(result)}.", *(f"{line}." for line in leak(result))])


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Write text of a file as Markdown's text."""
    return re.sub(r"([|<`*])", r"\\\1", printable(text))
