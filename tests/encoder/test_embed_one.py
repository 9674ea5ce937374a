"""One picture to its features: from a path, bytes, PIL or a tensor, the same as `simclr-dist embed` writes."""

import io
import re
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image

import simclr_dist
from networks import randomised
from simclr_dist import load_encoder
from simclr_dist.data.pixels.decode import decode
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.encoder.file import export_encoder
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.settings import EmbedSettings
from simclr_dist.method.model import ResNet
from simclr_dist.preflight.demo.images import render
from simclr_dist.system.errors import DataError
from simclr_dist.train import session

ROOT = Path(__file__).parents[2]
CARD = {
    "encoder": "resnet10", "width": 1, "stem": "small_stride2", "feature_size": 128, "image_size": 32, "step": 1000,
    "init": "random", "data_digest": None,
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README has it, and pictures beside it; of these turned.jpg lies on its side."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = Path("runs/mine/encoders/step-00001000.safetensors")
    network = randomised(ResNet("resnet10", stem="small_stride2"))
    export_encoder(path, network, CARD)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, how in (("cat.jpg", {}), ("turned.jpg", {"exif": exif})):
        Image.fromarray(render(1, np.random.default_rng(1), size=60)[:40]).save(name, **how)
    Image.fromarray(render(2, np.random.default_rng(2), size=50)).convert("P").save("dog.gif")
    return path


def test_every_way_to_give_an_image(encoder: Path) -> None:
    embed(encoder, ["cat.jpg", "dog.gif", "turned.jpg"], "h.parquet", EmbedSettings(workers=0), device="cpu")
    cat, dog, turned = torch.from_numpy(read_features("h.parquet").embedding)
    network = load_encoder(encoder)
    content = Path("cat.jpg").read_bytes()
    pixels = decode(prepare_image(Path("dog.gif").read_bytes()).content)
    for image in ("cat.jpg", Path("cat.jpg"), content, Image.open(io.BytesIO(content))):
        torch.testing.assert_close(network.embed(image), cat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.embed("turned.jpg"), turned, rtol=1e-5, atol=1e-5)
    together = network.embed(["cat.jpg", Path("dog.gif"), pixels])
    assert (together.shape, together.dtype) == ((3, 128), torch.float32)
    torch.testing.assert_close(together, torch.stack([cat, dog, dog]), rtol=1e-5, atol=1e-5)
    assert network.embed([]).shape == (0, 128)
    assert network.embed(["dog.gif"] * 150).shape == (150, 128)
    torch.testing.assert_close(load_encoder(encoder).double().embed("cat.jpg"), cat, rtol=1e-4, atol=1e-4)


def test_an_encoder_of_other_images(encoder: Path) -> None:
    """16-bit gray keeps its bits, and a file of RGB is refused, as `embed` does both."""
    torch.manual_seed(0)
    gray = Path("gray.safetensors")
    card = {**CARD, "channels": 1, "mean": [0.5], "std": [0.25], "config": {"data": {"channels": 1, "bit_depth": 16}}}
    export_encoder(gray, randomised(ResNet("resnet10", stem="small_stride2", channels=1)), card)
    Image.fromarray((render(1, np.random.default_rng(1), size=40)[:, :, 0].astype(np.uint16) << 8) + 77).save("deep.png")
    embed(gray, ["deep.png"], "h.parquet", EmbedSettings(workers=0), device="cpu")
    (h,) = torch.from_numpy(read_features("h.parquet").embedding)
    for image in ("deep.png", Path("deep.png").read_bytes(), Image.open("deep.png")):
        torch.testing.assert_close(load_encoder(gray).embed(image), h, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match=r"^cat\.jpg: "):
        load_encoder(gray).embed("cat.jpg")


def test_a_training_mode_changes_nothing(encoder: Path) -> None:
    """Neither the features nor BatchNorm's statistics depend on it, nor on the images beside one."""
    network = load_encoder(encoder)
    h, before = network.embed("cat.jpg"), {name: one.clone() for name, one in network.state_dict().items()}
    network.train()
    frozen = next(module for module in network.modules() if not list(module.children())).eval()
    torch.testing.assert_close(network.embed(["cat.jpg", "dog.gif"])[0], h, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert network.training
    assert not frozen.training


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("none.jpg", "none.jpg: No such file or directory"),
        ("runs", "runs: "),
        (["cat.jpg", b"\xff\xd8 no image"], "image 1: not an image"),
        (b"", "image 0: "),
        (3, "image 0: int is no image; give a path, bytes, a PIL image, or a tensor"),
        (["cat.jpg", 3], "image 1: int is no image; give a path, bytes, a PIL image, or a tensor"),
    ],
)
def test_what_is_no_image_is_named(encoder: Path, image: Any, line: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(line)}"):
        load_encoder(encoder).embed(image)


def test_the_readmes_lines(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, in a module of their own; but nothing is trained."""
    trained = session.Run(Path("runs/mine"), "done", 1000, encoder, {"loss/nt_xent": 0.5})
    monkeypatch.setattr(simclr_dist, "train", create_autospec(session.train, return_value=trained))
    with Image.open("cat.jpg") as image:
        names: dict[str, Any] = {"z_a": torch.randn(8, 4), "z_b": torch.randn(8, 4), "image": image}
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
            exec(block, names)  # noqa: S102 (our own README)
    assert names["run"] is trained
    assert names["h"].shape == (128,)
    torch.testing.assert_close(names["h"], names["same"][0])
    assert float(names["loss"]) > 0


def test_an_image_of_16_bits_keeps_them(tmp_path: Path) -> None:
    network = randomised(ResNet("resnet10", stem="small_stride2", channels=1))
    trained = {"config": {"data": {"channels": 1, "bit_depth": 16}}, "channels": 1, "mean": [0.4], "std": [0.2]}
    export_encoder(tmp_path / "gray.safetensors", network, {**CARD, **trained})
    pixels = np.random.default_rng(0).integers(0, 2**16, (32, 32), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "gray.png")
    encoder = load_encoder(tmp_path / "gray.safetensors")
    expected = encoder.embed(torch.from_numpy(pixels)[None])
    assert torch.equal(encoder.embed(tmp_path / "gray.png"), expected)
    assert not torch.allclose(encoder.embed(torch.from_numpy(pixels // 256 * 256)[None]), expected, atol=1e-6)
