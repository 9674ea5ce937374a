"""Each family of networks leaves: into its own library without our code, into ONNX, and into a folder for a model hub."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from networks import randomised
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.encoder.onnx import TOLERANCE, export_onnx
from simclr_dist.method.encoders import build_encoder

timm = pytest.importorskip("timm")

FAMILIES = [
    ("timm/test_resnet", 64, 3), ("timm/test_vit", 64, 3), ("timm/test_vit", 32, 5), ("timm/test_convnext", 64, 1),
    ("timm/test_efficientnet", 64, 3), ("resnet10", 32, 2), ("torchvision/mobilenet_v3_small", 64, 3),
    pytest.param("timm/swin_tiny_patch4_window7_224", 64, 3, marks=pytest.mark.slow),
    pytest.param("torchvision/vit_b_16", 32, 3, marks=pytest.mark.slow),
]  # fmt: skip


def exported(path: Path, name: str, size: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    encoder = randomised(build_encoder(name, image_size=size, channels=channels)).eval().requires_grad_(False)
    card: dict[str, Any] = {
        "encoder": name, "width": 1, "stem": "imagenet", "channels": channels, "feature_size": encoder.feature_size,
        "image_size": size, "mean": [0.5] * channels, "std": [0.25] * channels, "step": 7, "init": "random",
        "data_digest": None,
    }  # fmt: skip
    export_encoder(path, encoder, card)
    return encoder


@pytest.mark.parametrize(("name", "size", "channels"), FAMILIES)
def test_onnx_of_each_family(tmp_path: Path, name: str, size: int, channels: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = exported(tmp_path / "e.safetensors", name, size, channels)
    assert export_onnx(tmp_path / "e.safetensors", tmp_path / "e.onnx") <= TOLERANCE
    content = (tmp_path / "e.onnx").read_bytes()
    assert str(Path(timm.__file__).parents[1]).encode() not in content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.json", "e.onnx", "e.safetensors"], "no weights beside it"
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(3))
    (h,) = session.run(None, {"images": x.numpy()})
    assert (torch.from_numpy(h) - encoder(x)).abs().max() <= TOLERANCE * encoder(x).abs().max()


@pytest.mark.parametrize(("name", "size", "channels"), [one for one in FAMILIES if "resnet10" not in one])
def test_its_own_library_loads_it(tmp_path: Path, name: str, size: int, channels: int) -> None:
    path = tmp_path / "e.safetensors"
    encoder = exported(path, name, size, channels)
    x = torch.randn(2, channels, size, size)
    arguments: dict[str, Any] = {"in_chans": channels} if channels != 3 else {}
    library, _, network = name.partition("/")
    if library == "timm":
        arguments |= {"img_size": size} if "vit" in name or "swin" in name else {}
        theirs = timm.create_model(network, num_classes=0, checkpoint_path=str(path), **arguments)  # strict
    else:
        theirs = torchvision.models.get_model(network, **({"image_size": size} if "vit" in name else {}))
        missing, unexpected = theirs.load_state_dict(load_file(path), strict=False)
        head = missing[0].rpartition(".")[0]
        assert (missing, unexpected) == ([f"{head}.weight", f"{head}.bias"], [])
        theirs.set_submodule(head, nn.Identity())
    assert torch.equal(theirs.eval().requires_grad_(False)(x), encoder(x))
    assert torch.equal(load_encoder(path)(x), encoder(x))
