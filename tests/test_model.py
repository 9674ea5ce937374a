"""Encoder, projector, and the way out into plain torchvision and back."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from simclr_dist.errors import DataError
from simclr_dist.export import export_encoder, load_encoder, untrained_encoder
from simclr_dist.model import ResNet, SimCLR, build_projector, frozen_running_statistics


def _randomised(model: nn.Module) -> nn.Module:
    """BatchNorm away from its start values, its statistics too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model


def _images(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision(name: str) -> None:
    ours = _randomised(ResNet(name)).eval()
    theirs = torchvision.models.get_model(name)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())  # strict
    x = _images(2, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval()(x))
        assert torch.equal(ours.train()(x), theirs.train()(x))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "width", "feature_size", "millions"),
    [
        ("resnet10", 1, 128, 0.31),
        ("resnet18", 1, 512, 11.18),
        ("resnet34", 1, 512, 21.28),
        ("resnet50", 1, 2048, 23.51),
        ("resnet101", 1, 2048, 42.50),
        ("resnet152", 1, 2048, 58.14),
        ("resnet50", 2, 4096, 93.91),  # the paper's table 6: 24 M, 94 M and 375 M
        ("resnet50", 4, 8192, 375.38),
    ],
)
def test_sizes(name: str, width: int, feature_size: int, millions: float) -> None:
    with torch.device("meta"):
        encoder = ResNet(name, width=width)
    assert encoder.feature_size == feature_size
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("stem", "size", "after_stem"),
    [("imagenet", 64, 16), ("small", 32, 32), ("small_stride2", 32, 16), ("small_stride2", 8, 4)],
)
@pytest.mark.parametrize("width", [1, 2])
def test_stems(stem: str, size: int, after_stem: int, width: int) -> None:
    encoder = ResNet("resnet10", width=width, stem=stem)
    seen: list[torch.Size] = []
    encoder.layer1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    h = encoder(_images(3, size))
    assert seen == [(3, 16 * width, after_stem, after_stem)]
    assert h.shape == (3, encoder.feature_size)


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_starts_as_torchvision_does(name: str) -> None:
    """He et al. (2015): fan out, and every BatchNorm at 1 and 0."""
    encoder = ResNet(name, width=2 if name == "resnet10" else 1, stem="small")
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 0}, []),
        ({"depth": 1}, [(20, 128)]),
        ({}, [(20, 2048), (2048, 128)]),
        ({"depth": 3, "hidden": 30, "dim": 10}, [(20, 30), (30, 30), (30, 10)]),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_projector(settings: dict[str, int], expected: list[tuple[int, int]], batch_norm: bool) -> None:
    projector = build_projector(20, batch_norm=batch_norm, **settings)
    linear = [m for m in projector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == expected
    norms = [m.num_features for m in projector.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms == ([size for _, size in expected] if batch_norm else [])
    # A bias before a BatchNorm has no effect, and a gradient of pure noise.
    assert all((m.bias is None) == batch_norm for m in linear)
    assert sum(isinstance(m, nn.ReLU) for m in projector.modules()) == max(len(expected) - 1, 0)
    assert projector(torch.randn(4, 20)).shape == (4, expected[-1][1] if expected else 20)


def test_autocast_is_a_choice() -> None:
    encoder = ResNet("resnet10", stem="small_stride2")
    projector = build_projector(encoder.feature_size, hidden=8, dim=4)
    assert SimCLR(encoder, projector)(_images(4, 8)).dtype == torch.float32
    assert SimCLR(encoder, projector, torch.bfloat16)(_images(4, 8)).dtype == torch.bfloat16


def test_frozen_running_statistics_in_one_process() -> None:
    model = ResNet("resnet10", stem="small_stride2")
    before = [buffer.clone() for buffer in model.buffers()]
    with frozen_running_statistics(model):
        frozen = model(_images(4, 8))
    assert all(map(torch.equal, before, model.buffers()))
    assert torch.equal(frozen, model(_images(4, 8)))
    assert not any(map(torch.equal, before, model.buffers()))


CARD = {"encoder": "resnet18", "width": 1, "stem": "imagenet", "feature_size": 512, "image_size": 64, "step": 7}


def test_export_loads_into_torchvision_without_code_of_ours(tmp_path: Path) -> None:
    encoder = _randomised(ResNet("resnet18").to(memory_format=torch.channels_last)).eval()
    path = tmp_path / "encoders" / "step-7.safetensors"
    export_encoder(path, encoder, CARD)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(path))
    x = _images(2, 64)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(x), encoder(x), rtol=1e-5, atol=1e-5)
    assert json.loads(path.with_suffix(".json").read_text())["step"] == 7


def test_export_and_back(tmp_path: Path) -> None:
    card = {**CARD, "encoder": "resnet10", "width": 2, "stem": "small", "feature_size": 256}
    encoder = _randomised(ResNet("resnet10", width=2, stem="small").double())
    export_encoder(tmp_path / "e.safetensors", encoder, card)
    loaded = load_encoder(tmp_path / "e.safetensors")
    assert {key: loaded.card[key] for key in card} == card
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = _images(3, 16)
    assert torch.equal(loaded(x), encoder.float().eval()(x))
    fresh, again, other = (untrained_encoder(loaded.card, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(fresh(x), again(x))
    assert not torch.equal(fresh(x), other(x))
    assert (fresh.card["init"], fresh.card["step"]) == ("random", 0)


def test_files_that_are_not_encoders(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("not one")
    misfit = tmp_path / "misfit.safetensors"
    export_encoder(misfit, ResNet("resnet10", stem="small"), {**CARD, "encoder": "resnet10", "stem": "imagenet"})
    for path, reason in ((tmp_path / "none.safetensors", "cannot read"), (text, "not an encoder"), (misfit, "do not fit")):
        with pytest.raises(DataError, match=reason) as error:
            load_encoder(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
