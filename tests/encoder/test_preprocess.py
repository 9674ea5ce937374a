"""How an image becomes an encoder's input: said in the card, done by the encoder, and the same by others' programs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import randomised
from simclr_dist.data.views.crops import short_side
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.encoder.preprocess import preprocess, preprocess_card
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.settings import EmbedSettings
from simclr_dist.method.model import ResNet
from simclr_dist.preflight.demo.images import render
from simclr_dist.system.errors import DataError

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
CARD = {
    "encoder": "resnet18", "width": 1, "stem": "imagenet", "feature_size": 512, "image_size": 96, "step": 7,
    "init": "random", "data_digest": None,
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip


def exported(path: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    export_encoder(path, randomised(ResNet("resnet18")), {**CARD, **changes})
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Photographs where they are at hand, upright and lying; else rendered pictures."""
    if found := sorted(PHOTOS.glob("*.JPEG"))[:12]:
        return found
    paths = [tmp_path / "pictures" / f"{number:02}.jpg" for number in range(12)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        picture = render(number % 3, np.random.default_rng(number), size=240)
        Image.fromarray(picture[:200] if number % 2 else picture[:, :170]).save(path)
    return paths


def documented(card: dict[str, Any]) -> Any:
    """The tutorial's lines of torchvision, as they stand there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = (block for block in blocks if "v2.Compose" in block)
    names: dict[str, Any] = {"card": card, "torch": torch}
    exec(lines, names)  # noqa: S102
    return names["preprocess"]


@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_documented_lines_give_the_encoders_input(tmp_path: Path, photos: list[Path], size: int) -> None:
    path = exported(tmp_path / "e.safetensors", image_size=size)
    encoder, theirs = load_encoder(path), documented(json.loads(path.with_suffix(".json").read_text()))
    for photo in photos:
        with Image.open(photo) as image:
            ours = encoder.preprocess(image)
            assert (ours.shape, ours.dtype) == ((3, size, size), torch.float32)
            assert (ours - theirs(image)).abs().max() < 1e-3
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(ours, encoder.preprocess(pixels))


def test_their_features_are_those_of_embed(tmp_path: Path, photos: list[Path]) -> None:
    path = exported(tmp_path / "e.safetensors")
    encoder, theirs = load_encoder(path), documented(load_encoder(path).card)
    embed(path, photos, tmp_path / "h.parquet", EmbedSettings(workers=0), device="cpu")
    ours = torch.from_numpy(read_features(tmp_path / "h.parquet").embedding)
    with torch.inference_mode():
        h = encoder(torch.stack([theirs(Image.open(photo)) for photo in photos]))
        theirs.transforms[2].size = [96]  # a good guess
        guessed = encoder(torch.stack([theirs(Image.open(photo)) for photo in photos]))
    assert F.cosine_similarity(ours, h).min() > 0.999 > F.cosine_similarity(ours, guessed).min()


def test_the_card_says_it_in_timms_names(tmp_path: Path, photos: list[Path]) -> None:
    """timm's own transform, of what it read from the card, gives the same features; its Pillow rounds otherwise than torch."""
    timm = pytest.importorskip("timm")
    path = exported(tmp_path / "e.safetensors")
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["preprocess"] == {
        "input_size": [3, 96, 96], "crop_pct": 0.872727, "crop_mode": "center", "interpolation": "bicubic",
        "mean": CARD["mean"], "std": CARD["std"],
    }  # fmt: skip
    overlay = {"file": str(path), **card["preprocess"]}
    network = timm.create_model("resnet18", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    encoder = load_encoder(path)
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    with torch.inference_mode():
        theirs = network(torch.stack([transform(picture) for picture in pictures]))
        ours = encoder(torch.stack([encoder.preprocess(picture) for picture in pictures]))
    assert F.cosine_similarity(ours, theirs).min() > 0.999


def test_the_short_side_follows_from_the_card() -> None:
    """As torchvision's lines round it, and as timm cuts it off."""
    for size in range(8, 4097):
        share = preprocess_card({**CARD, "image_size": size})["crop_pct"]
        assert round(size / share) == math.floor(size / share) == short_side(size), size
    assert [short_side(size) for size in (32, 95, 96, 224)] == [32, 95, 110, 256]


def test_an_older_card_says_it_once_it_is_read(tmp_path: Path) -> None:
    path = exported(tmp_path / "e.safetensors")
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["card"])
    said = card.pop("preprocess")
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata={"card": json.dumps(card)})
    assert load_encoder(path).card["preprocess"] == said
    del card["image_size"]
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata={"card": json.dumps(card)})
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: not an encoder that this program exported"):
        load_encoder(path)


def test_images_of_every_mode(tmp_path: Path) -> None:
    """As conversion prepares them: upright, 16 bits scaled and not cut off, alpha dropped."""
    preprocess = load_encoder(exported(tmp_path / "e.safetensors", image_size=32)).preprocess
    pixels = render(0, np.random.default_rng(0), size=64)[:40]
    rgb = Image.fromarray(pixels)
    expected = preprocess(rgb)
    turned, exif = rgb.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.png", "turned.tiff"):  # Pillow turns the latter by itself
        turned.save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as image:
            assert torch.equal(preprocess(image), expected), name
    opaque = rgb.copy()
    opaque.putalpha(7)
    assert torch.equal(preprocess(opaque), expected)
    gray = rgb.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert torch.equal(preprocess(deep), preprocess(gray))


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
     torch.zeros(3, 0, 8, dtype=torch.uint8), Image.new("F", (8, 8)), "a.jpg"],
    ids=["float", "one channel", "a batch", "empty", "mode F", "a path"],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_a_line(tmp_path: Path, wrong: Any) -> None:
    preprocess = load_encoder(exported(tmp_path / "e.safetensors")).preprocess
    with pytest.raises(DataError, match=r"is no image: give a PIL image|have no fixed range") as refused:
        preprocess(wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (1, 16), (2, 8), (3, 16), (4, 8), (5, 16)])
def test_images_of_other_kinds(channels: int, bits: int, tmp_path: Path) -> None:
    """As PIL image where Pillow has such ones, turned upright; as tensor always. The scale is that of the image's own bits."""
    mean, std = [0.4] * channels, [0.3] * channels
    card = CARD | {"mean": mean, "std": std, "image_size": 16, "config": {"data": {"bit_depth": bits}}}
    dtype, most = (np.uint16, 65535) if bits == 16 else (np.uint8, 255)
    pixels = np.random.default_rng(0).integers(0, most, (16, 16, channels), dtype, endpoint=True)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = (tensor.double() / most - 0.4) / 0.3
    ours = preprocess(card, tensor)
    assert ours.shape == (channels, 16, 16)
    assert (ours - expected).abs().max() < 1e-5
    if channels == 1 or (channels <= 4 and bits == 8):
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        assert torch.equal(preprocess(card, image), ours)
        image.getexif()[0x0112] = 3
        assert torch.equal(preprocess(card, image), ours.flip(-1, -2))
        image.save(file := tmp_path / "turned.tif", exif=image.getexif())
        with Image.open(file) as turned:  # Pillow turns it by itself
            assert torch.equal(preprocess(card, turned), ours.flip(-1, -2))
    if (channels, bits) == (3, 16):
        narrow = Image.fromarray((pixels >> 8).astype(np.uint8))
        assert (preprocess(card, narrow) - ours).abs().max() < 0.02, "8 bits are the same scale"
    refused: list[Any] = [Image.new("F", (4, 4)), torch.zeros(channels + 1, 4, 4, dtype=torch.uint8)]
    for wrong in (*refused, torch.zeros(channels, 4, 4)):
        with pytest.raises(DataError):
            preprocess(card, wrong)
