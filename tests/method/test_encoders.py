"""Others' networks as encoders: built by name, refused by one line."""

from typing import Any

import pytest
import timm
import torch
import torchvision

from simclr_dist.config.networks import encoder_names, names_of, unknown_encoder
from simclr_dist.method.encoders import build_encoder
from simclr_dist.system.errors import ConfigError

SMALL = ["timm/test_vit", "timm/test_convnext", "timm/test_efficientnet.r160_in1k", "torchvision/mobilenet_v3_small"]


def test_the_names_are_those_of_the_libraries() -> None:
    """They are read from the source, as an import takes seconds."""
    assert set(names_of("timm")) == set(timm.list_models())
    assert set(names_of("torchvision")) == set(torchvision.models.list_models(module=torchvision.models))
    assert {"resnet10", "timm/vit_small_patch16_224", "torchvision/swin_t"} < set(encoder_names())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "resnet5",
            "is not one of resnet10, resnet18, resnet34, resnet50, resnet101, resnet152, timm/NAME and torchvision/NAME",
        ),
        ("timm/vit_smal_patch16_224", "is not a network of timm; did you mean 'timm/vit_small_patch16_224'?"),
        ("torchvision/swint", "is not a network of torchvision; did you mean 'torchvision/swin_t'?"),
        ("lib/resnet50", "is not one of resnet10"),
        ("timm/", "is not a network of timm"),
    ],
)
def test_an_unknown_name_is_refused(name: str, reason: str) -> None:
    assert reason in str(unknown_encoder(name))


@pytest.mark.parametrize("name", SMALL)
def test_an_encoder_of_others_gives_features(name: str) -> None:
    encoder = build_encoder(name, image_size=32)
    with torch.no_grad():
        assert encoder.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.feature_size)


@pytest.mark.parametrize(
    "name", ["timm/resnet18", "timm/vgg11", "timm/poolformer_s12", "timm/hrnet_w18_small", "timm/coat_tiny"]
)
def test_arguments_that_a_network_has_not_are_left_out(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=224)
    assert {key: encoder.arguments[key] for key in ("num_classes", "in_chans")} == {"num_classes": 0, "in_chans": 3}


def test_a_trial_leaves_all_tensors_where_they_are() -> None:
    """CoaT's parallel blocks share their position encodings."""
    encoder = build_encoder("timm/coat_tiny", image_size=32)
    assert not any(tensor.is_meta for tensor in encoder.state_dict().values())


def test_channels_are_the_networks_own() -> None:
    for name in ("resnet10", "timm/test_vit"):
        encoder = build_encoder(name, image_size=32, channels=5)
        with torch.no_grad():
            assert encoder.eval()(torch.zeros(2, 5, 32, 32)).shape == (2, encoder.feature_size)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        (
            "timm/test_vit",
            {"image_size": 33},
            "does not train on images of 3 x 33 x 33 (it cuts them into patches of 16: 32 or 48 pixels would fit).",
        ),
        ("timm/test_vit.nobody", {}, "Invalid pretrained tag (nobody)"),
        ("timm/vgg11", {"image_size": 8}, "Output size is too small); set views.image_size to 224, for which it is made"),
        ("torchvision/squeezenet1_0", {"image_size": 64}, "it does not end in a linear layer)."),
        ("torchvision/vit_b_32", {"image_size": 40}, "indivisible by patch size"),
        ("torchvision/resnet18", {"channels": 4}, "torchvision's networks take 3 channels, timm/NAME any number"),
    ],
)
def test_images_that_a_network_does_not_take_are_refused(name: str, how: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_encoder(name, **how)
    assert str(caught.value).startswith(f"model.encoder: '{name}' ")
    assert reason in f"{caught.value}.", "it ends where another size would not help"
    assert "\n" not in str(caught.value)
