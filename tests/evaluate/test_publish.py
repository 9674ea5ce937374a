"""A folder for a model hub: its code runs, its card says what the encoder is, and no path of ours is in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import training_runs as runs
from evaluated import CARD
from networks import randomised
from simclr_dist.cli.main import main
from simclr_dist.cli.train import main as train
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.encoder.published import start_weights
from simclr_dist.evaluate.publish import publish
from simclr_dist.method.encoders import build_encoder
from simclr_dist.method.model import ResNet
from simclr_dist.system.errors import ConfigError, DataError


def exported(path: Path, network: torch.nn.Module, **card: Any) -> Path:
    export_encoder(path, randomised(network), {**CARD, **card})
    return path


def outputs(folder: Path) -> list[torch.Tensor]:
    """What each piece of the card's code computes, run where the folder is all that there is."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "IMAGE.jpg")
    found = []
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        if "h = " not in code:  # torchvision's: the input is made as another piece makes it
            code += "from simclr_dist import load_encoder\nfrom PIL import Image\n"
            code += "h = encoder(load_encoder('model.safetensors').preprocess(Image.open('IMAGE.jpg'))[None])\n"
        code += "\nimport torch\ntorch.save(h, 'h.pt')"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(torch.load(folder / "h.pt"))
    return found


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_a_resnet_loads_with_timm_torchvision_and_us(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    path = exported(
        tmp_path / "e.safetensors", ResNet("resnet18"), encoder="resnet18", stem="imagenet", feature_size=512, image_size=64
    )
    assert publish(path, tmp_path / "hub" / "mine", "apache-2.0") == {}
    folder = tmp_path / "hub" / "mine"
    assert sorted(file.name for file in folder.parent.rglob("*")) == [
        "README.md", "config.json", "mine", "model.json", "model.safetensors",
    ]  # fmt: skip
    assert front_matter(folder) == {
        "library_name": "timm", "pipeline_tag": "image-feature-extraction", "license": "apache-2.0",
        "tags": ["simclr", "self-supervised-learning", "timm"],
    }  # fmt: skip
    with_timm, with_torchvision, ours = outputs(folder)
    assert with_timm.shape == (1, 512)
    assert (with_torchvision - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (with_timm - ours).abs().max() <= 0.02 * ours.abs().max(), "but for Pillow's rounding"


@pytest.mark.parametrize(
    ("name", "channels", "library"),
    [("timm/test_vit", 3, "timm"), ("timm/test_convnext", 1, "timm"), ("torchvision/mobilenet_v3_small", 3, "pytorch")],
)
def test_a_network_of_others(tmp_path: Path, name: str, channels: int, library: str) -> None:
    pytest.importorskip("timm")
    encoder, numbers = build_encoder(name, image_size=64, channels=channels), [0.5] * channels
    card = {"encoder": name, "stem": "imagenet", "feature_size": encoder.feature_size, "image_size": 64}
    path = exported(tmp_path / "e.safetensors", encoder, **card, channels=channels, mean=numbers, std=numbers)
    publish(path, tmp_path / "hub")
    assert front_matter(tmp_path / "hub")["library_name"] == library
    theirs, ours = outputs(tmp_path / "hub")
    assert theirs.shape == ours.shape == (1, encoder.feature_size)
    assert (theirs - ours).abs().max() <= 0.05 * ours.abs().max()
    page = (tmp_path / "hub" / "README.md").read_text()
    assert ("16 bits by 65535" in page) == ('encoder.embed("IMAGE.tif")' in page) == (channels != 3)


def test_a_run_with_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shards = runs.make_shards(tmp_path, images=60)
    model = {"init": "random"}
    assert train([str(runs.write_config(Path(), shards, steps=2, model=model))]) == 0
    encoder = "run/encoders/step-00000002.safetensors"
    capsys.readouterr()
    assert main(["export", encoder, "before"]) == 0
    assert capsys.readouterr().out == (
        "written: before; no results are in its card: `simclr-dist eval` this encoder, and export it anew\n"
    )
    assert "## Results\n\nNot measured." in Path("before/README.md").read_text()
    options = ["--train", str(shards), "--test", str(shards), "--workers", "0", "--device", "cpu", "--k", "3", "--no-features"]
    assert main(["eval", encoder, *options]) == 0
    assert main(["export", encoder, "after", "--license", "other"]) == 0
    card = Path("after/README.md").read_text()
    result = json.loads(Path("run/eval/step-00000002.json").read_text())
    top1 = [f"{part['results']['trained']['top1']:.2f}" for part in result["protocols"].values()]
    assert f"| this encoder | {' | '.join(top1)} |" in card
    assert "WARNING: 60 test images are among the training images" in card
    assert f"| images | 60 (digest {result['encoder']['data_digest']}) |" in card
    assert "| steps | 2, 0.8 epochs |" in card
    assert "| batch | 24 images, 46 negatives an anchor |" in card
    assert "| started from | random |" in card
    assert "It was trained from random weights: no weights of others are in it." in card
    assert "\nmodel:\n  encoder: resnet10\n  stem: small_stride2\n" in card
    everything = b"".join(file.read_bytes() for file in Path("after").iterdir())
    assert str(tmp_path).encode() not in everything
    (h,) = outputs(Path("after"))
    image = Image.open("after/IMAGE.jpg")
    original = load_encoder(encoder)
    assert torch.equal(h, original(original.preprocess(image)[None]))

    Path(encoder).write_bytes(Path("before/model.safetensors").read_bytes())  # the result is of another file now
    assert publish(encoder, "other") == {}


def test_start_weights_of_others_are_said(tmp_path: Path) -> None:
    path = exported(tmp_path / "e.safetensors", ResNet("resnet10", stem="small_stride2"), init="file a|<b>.pth: sha256 0; x")
    publish(path, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert r"| started from | file a\|\<b>.pth: sha256 0; x |" in text
    assert (
        r"Of this encoder: not stated. It was started from weights of others (file a\|\<b>.pth), and their licence holds too:"
        in text
    )
    assert "license" not in front_matter(tmp_path / "hub")


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("random", "It was trained from random weights: no weights of others are in it."),
        ("imagenet, supervised (W): all", "of others (imagenet, supervised (W)), and their licence holds too: torchvision"),
        ("file a.pth: sha256 0; how is not known", "of others (file a.pth), and their licence holds too: not"),
    ],
)
def test_the_licence_is_that_of_the_first_of_a_chain(tmp_path: Path, first: str, said: str) -> None:
    network = ResNet("resnet10", stem="small_stride2")
    path = exported(tmp_path / "0.safetensors", network, init=first)
    for number in range(1, 8):
        init = start_weights(network, "resnet10", "file", str(path))
        path = exported(tmp_path / f"{number}.safetensors", network, init=init)
        assert len(init) < 1500
    publish(path, tmp_path / "hub")
    assert said in (tmp_path / "hub" / "README.md").read_text()


def test_an_encoder_of_earlier_days(tmp_path: Path) -> None:
    """Its card does not say how the network is built, nor how many images it has seen."""
    path = exported(tmp_path / "e.safetensors", ResNet("resnet10", stem="small_stride2"))
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["card"])
    for later in ("built", "shape", "preprocess", "channels", "config", "images", "images_seen"):
        card.pop(later, None)
    save_file(load_file(path), path, {"card": json.dumps(card)})
    publish(path, tmp_path / "hub")
    assert "The network: a ResNet of torchvision's BasicBlock" in (tmp_path / "hub" / "README.md").read_text()


def test_what_cannot_be_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path / "e.safetensors", ResNet("resnet10", stem="small_stride2"))
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        publish(path, tmp_path)
    with pytest.raises(ConfigError, match="license: 'MIT, perhaps' is no identifier"):
        publish(path, tmp_path / "a", "MIT, perhaps")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        publish(path, tmp_path / "file" / "a")
    for words, said in (
        (["e.onx"], "export: 'e.onx' must end in .onnx or .safetensors, or in / for a folder"),
        (["e.onnx", "--license", "mit"], "--license: 'mit': has no effect on a .onnx file; leave it out"),
        (["folder", "--layer", "z"], "--layer: 'z': has an effect on an .onnx file alone; leave it out"),
    ):
        assert main(["export", str(path), *words]) == 2
        assert capsys.readouterr().err == f"simclr-dist: {said}\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.json", "e.safetensors", "file"]


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path / "e.safetensors", ResNet("resnet10", stem="small_stride2"))

    def full(self: Path, *_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="hub: cannot be written: No space left on device"):
        publish(path, tmp_path / "hub")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.json", "e.safetensors"]
