"""Encoder, projector, and BatchNorm."""

import pytest
import torch
import torchvision
from torch import nn

from networks import images, randomised
from simclr_dist.config.settings import ENCODERS, STEMS
from simclr_dist.method.batch_norm import frozen_running_statistics
from simclr_dist.method.model import ResNet, SimCLR, build_projector


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision(name: str) -> None:
    ours = randomised(ResNet(name)).eval()
    theirs = torchvision.models.get_model(name)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())  # strict
    x = images(2, 64)
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


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("stem", STEMS)
def test_every_name_of_the_settings_is_built(name: str, stem: str) -> None:
    with torch.device("meta"):
        ResNet(name, stem=stem)


@pytest.mark.parametrize(
    ("stem", "size", "after_stem"),
    [("imagenet", 64, 16), ("small", 32, 32), ("small_stride2", 32, 16), ("small_stride2", 8, 4)],
)
@pytest.mark.parametrize("width", [1, 2])
def test_stems(stem: str, size: int, after_stem: int, width: int) -> None:
    encoder = ResNet("resnet10", width=width, stem=stem)
    seen: list[torch.Size] = []
    encoder.layer1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    h = encoder(images(3, size))
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
    assert SimCLR(encoder, projector)(images(4, 8)).dtype == torch.float32
    assert SimCLR(encoder, projector, torch.bfloat16)(images(4, 8)).dtype == torch.bfloat16


def test_frozen_running_statistics_in_one_process() -> None:
    model = ResNet("resnet10", stem="small_stride2")
    before = [buffer.clone() for buffer in model.buffers()]
    with frozen_running_statistics(model):
        frozen = model(images(4, 8))
    assert all(map(torch.equal, before, model.buffers()))
    assert torch.equal(frozen, model(images(4, 8)))
    assert not any(map(torch.equal, before, model.buffers()))
