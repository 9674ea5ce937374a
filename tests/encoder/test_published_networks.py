"""Checkpoints of timm's and torchvision's networks, in the forms of the projects that train them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from networks import randomised
from simclr_dist.encoder.file import export_encoder
from simclr_dist.encoder.published import load_foreign, start_weights
from simclr_dist.method.encoders import build_encoder
from simclr_dist.system.errors import ConfigError, DataError

timm = pytest.importorskip("timm")

State = dict[str, Tensor]
HEAD = {"mlp.0.weight": torch.zeros(2, 2), "last_layer.weight_g": torch.zeros(2)}


def made(name: str, **settings: Any) -> nn.Module:
    """timm's own network, away from its start values."""
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **settings)).eval().requires_grad_(False)


def images(n: int, size: int, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def plus_one(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "timm": (lambda s: s, ""),
    "timm, an average too": (lambda s: {"state_dict": plus_one(s), "state_dict_ema": s, "epoch": 3}, "state_dict_ema."),
    "DINO": (
        lambda s: {
            "student": {**under("module.backbone.", plus_one(s)), **under("module.head.", HEAD)},
            "teacher": {**under("backbone.", s), **under("head.", HEAD)},
        },
        "teacher.backbone.",
    ),
    "lightly's DINO": (
        lambda s: {"state_dict": {**under("student_backbone.", plus_one(s)), **under("teacher_backbone.", s)}},
        "state_dict.teacher_backbone.",
    ),
    "MoCo v3": (
        lambda s: {
            "arch": "vit_small",
            "state_dict": {
                **under("module.base_encoder.", {key: value for key, value in s.items() if not key.startswith("head.")}),
                **under("module.base_encoder.head.", HEAD),
                **under("module.momentum_encoder.", plus_one(s)),
                **under("module.predictor.", HEAD),
            },
        },
        "state_dict.module.base_encoder.",
    ),
    "MAE": (
        lambda s: {
            "model": {
                **s,
                "mask_token": torch.zeros(1, 1, 4),
                "decoder_pos_embed": torch.zeros(1, 5, 4),
                "decoder_blocks.0.norm1.weight": torch.zeros(4),
                "decoder_norm.weight": torch.zeros(4),
            },
        },
        "model.",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_vision_transformer_wherever_it_is(tmp_path: Path, form: str) -> None:
    wrap, prefix = FORMS[form]
    network = made("test_vit")
    torch.save(wrap(network.state_dict()), tmp_path / "w.pth")
    encoder = load_foreign("timm/test_vit", tmp_path / "w.pth", image_size=160)
    x = images(2, 160)
    assert torch.equal(encoder(x), network.forward_head(network.forward_features(x), pre_logits=True))
    weights = encoder.card["weights"]
    assert (weights["prefix"], weights["adapted"]) == (prefix, [])
    export_encoder(tmp_path / "ours.safetensors", encoder, encoder.card)
    assert torch.equal(load_foreign("timm/test_vit", tmp_path / "ours.safetensors", image_size=160)(x), encoder(x))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet", "test_vit"])
def test_each_family_with_its_classifier(tmp_path: Path, name: str) -> None:
    network = made(name)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load_foreign(f"timm/{name}", tmp_path / "w.pth", image_size=160)
    network.reset_classifier(0)
    x = images(2, 160)
    assert torch.equal(encoder(x), network(x))
    assert sum(encoder.card["weights"]["left_out"].values()) == 2


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "vit_b_16", "swin_t"])
@pytest.mark.slow
def test_torchvisions_networks(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name).eval()
    torch.save({"model": under("module.", network.state_dict())}, tmp_path / "w.pth")
    encoder = load_foreign(f"torchvision/{name}", tmp_path / "w.pth")
    assert encoder.card["weights"]["prefix"] == "model.module."
    state = encoder.state_dict()
    assert state
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in state.items())


@pytest.mark.parametrize(("channels", "size"), [(1, 160), (5, 160), (3, 96), (1, 224)])
def test_other_channels_and_sizes_as_timm_adapts_them(tmp_path: Path, channels: int, size: int) -> None:
    torch.save(made("test_vit").state_dict(), tmp_path / "w.pth")
    settings = {"in_chans": channels, "img_size": size, "num_classes": 0}
    theirs = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")}, **settings
    ).eval()
    encoder = build_encoder("timm/test_vit", channels=channels, image_size=size)
    said = start_weights(encoder, "timm/test_vit", "file", str(tmp_path / "w.pth"))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor)
    adapted = [
        *([f"pos_embed from 10 x 10 places to {size // 16} x {size // 16} (bicubic)"] if size != 160 else []),
        *(["patch_embed.proj.weight from 3 channels to 1 (their sum)"] if channels == 1 else []),
        *(["patch_embed.proj.weight from 3 channels to 5 (repeated in turn, times 3/5)"] if channels == 5 else []),
    ]
    assert f"; adapted: {', '.join(adapted)};" in said
    evaluated = load_foreign("timm/test_vit", tmp_path / "w.pth", image_size=size, channels=channels)
    assert len(evaluated.card["mean"]) == channels
    assert evaluated.card["weights"]["adapted"] == adapted
    x = images(2, size, channels)
    assert torch.equal(evaluated(x), encoder.eval()(x))


def test_a_gray_image_has_the_same_features_as_its_three_equal_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    colour, gray = build_encoder("resnet10").eval(), build_encoder("resnet10", channels=1).eval()
    torch.save(colour.state_dict(), tmp_path / "w.pth")
    said = start_weights(gray, "resnet10", "file", str(tmp_path / "w.pth"))
    x = images(2, 64, 1)
    torch.testing.assert_close(gray(x), colour(x.expand(-1, 3, -1, -1)))
    assert "adapted: conv1.weight from 3 channels to 1 (their sum);" in said


def test_a_class_token_that_the_network_has_not(tmp_path: Path) -> None:
    """Its own position goes with it; the other way round there is nothing to take."""
    with_token = made("test_vit", num_classes=0)
    torch.save(with_token.state_dict(), tmp_path / "with.pth")
    without = timm.create_model("test_vit", class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    start_said = _fitted(without, tmp_path / "with.pth")
    assert torch.equal(without.pos_embed, with_token.pos_embed[:, 1:])
    assert "; adapted: pos_embed without 1 of its 1 other tokens;" in start_said
    assert "left out: cls_token 1" in start_said
    torch.save(without.state_dict(), tmp_path / "without.pth")
    with pytest.raises(DataError, match="has no 'cls_token', which"):
        _fitted(with_token, tmp_path / "without.pth")


def _fitted(network: nn.Module, path: Path) -> str:
    return start_weights(network, "a ViT", "file", str(path))


def test_what_does_not_fit(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"^arch: 'timm/vgg11' does not train on .*; set image_size to 224, for which it is"):
        load_foreign("timm/vgg11", tmp_path / "w.pth", image_size=16)
    torch.save(made("test_vit").state_dict(), tmp_path / "w.pth")
    deeper = timm.create_model("test_vit", depth=7, num_classes=0)
    with pytest.raises(DataError, match=r"has no 'blocks.6.norm1.weight', which a ViT of these settings needs"):
        _fitted(deeper, tmp_path / "w.pth")
    shallower = timm.create_model("test_vit", depth=2, num_classes=0)
    with pytest.raises(DataError, match=r"has 'blocks.2.norm1.weight', which .* has not: it is another network's"):
        _fitted(shallower, tmp_path / "w.pth")
    patches = timm.create_model("test_vit", patch_size=8, num_classes=0)
    with pytest.raises(DataError, match=r"'patch_embed.proj.weight' is \[64, 3, 16, 16\]; .* has \[64, 3, 8, 8\] there"):
        _fitted(patches, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"holds no timm/test_convnext for images of 160: hardly any"):
        load_foreign("timm/test_convnext", tmp_path / "w.pth", image_size=160)
    for settings, said in (
        ({"arch": "timm/test_wit"}, "arch: 'timm/test_wit' is not a network of timm; did you mean 'timm/test_vit"),
        ({"image_size": 40}, "arch: 'timm/test_vit' does not train on images of 3 x 40 x 40 (it cuts"),
        ({"width": 2}, "width: 2: has no effect on timm/test_vit; leave it out"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_foreign(**{"arch": "timm/test_vit", "weights": tmp_path / "w.pth", **settings})
        assert str(caught.value).startswith(said)


def of_convnexts_authors(state: State) -> State:
    """timm's names turned back into those of the authors' files."""
    named = {}
    for key, tensor in state.items():
        for pattern, name in (
            (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"\.blocks\.", "."), (r"conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"^head\.norm\.", "norm."),
            (r"^head\.fc\.", "head."),
        ):  # fmt: skip
            key = re.sub(pattern, name, key)
        named[key] = tensor
    return named


@pytest.mark.parametrize("prefix", ["model", "model."])
def test_names_that_timm_knows(tmp_path: Path, prefix: str) -> None:
    network = made("test_convnext")
    theirs = of_convnexts_authors(network.state_dict())
    assert "downsample_layers.1.0.weight" in theirs
    torch.save({"model": theirs, "model_ema": plus_one(theirs)}, tmp_path / "w.pth")
    encoder = load_foreign("timm/test_convnext", tmp_path / "w.pth", image_size=64, prefix=prefix)
    x = images(2, 64)
    assert torch.equal(encoder(x), network.forward_head(network.forward_features(x), pre_logits=True))
    weights = encoder.card["weights"]
    assert weights["adapted"] == ["names, as timm changes them"]
    assert weights["left_out"] == {"head": 2, "model_ema": len(theirs)}
    average = load_foreign("timm/test_convnext", tmp_path / "w.pth", image_size=64)
    assert torch.equal(average.head.norm.weight, network.head.norm.weight + 1)
    del theirs["norm.weight"]
    torch.save({"model": theirs}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no timm/test_convnext"):
        load_foreign("timm/test_convnext", tmp_path / "w.pth", image_size=64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # in timm's own call
def test_windows_of_another_size(tmp_path: Path) -> None:
    """Swin's windows shrink with the image, and their tables are resized as timm does."""
    name = "swin_tiny_patch4_window7_224"
    torch.save(made(name).state_dict(), tmp_path / "w.pth")
    settings = {"img_size": 96, "num_classes": 0}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")}, **settings)
    encoder = load_foreign(f"timm/{name}", tmp_path / "w.pth", image_size=96)
    assert all(torch.equal(tensor, encoder.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    adapted = encoder.card["weights"]["adapted"]
    assert adapted == ["8 relative_position_bias_table resized"], "those of the last two stages, of 6 x 6 and 3 x 3 places"
