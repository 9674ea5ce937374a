"""Checkpoints of others: found wherever they are in a file, and refused by the first key that does not fit."""

import argparse
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr_dist.encoder.file import export_encoder, untrained_encoder
from simclr_dist.encoder.published import IMAGENET_MEAN, IMAGENET_STD, load_foreign, start_weights
from simclr_dist.method.model import ResNet
from simclr_dist.system.errors import ConfigError, DataError, UserError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """torchvision's network, with its classifier, away from its start values."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    for tensor in network.state_dict().values():
        if tensor.dim() == 1:
            tensor.add_(torch.rand(tensor.shape) / 10)
    return network.eval().requires_grad_(False)


def small_state(stem: str = "small", **settings: Any) -> State:
    torch.manual_seed(1)
    return dict(ResNet("resnet10", stem=stem, **settings).state_dict())


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def representation(network: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = network.avgpool.register_forward_hook(lambda _, __, output: seen.append(output.flatten(1)))
    network(x)
    hook.remove()
    return seen[0]


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def refusal(error: type[UserError], path: Path, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        load_foreign(**{"arch": "resnet10", "stem": "small", "weights": path, **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plus_one(state: State) -> State:
    """The copy that is not evaluated."""
    return {key: value + 1 for key, value in state.items()}


def without_classifier(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def numbered(state: State) -> State:
    """As `nn.Sequential(*list(resnet.children())[:-1])` names it."""
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    return dict(nn.Sequential(*list(network.children())[:-1]).state_dict())


HEAD = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}
LAYOUTS: dict[str, tuple[Callable[[State], Any], str, dict[str, int]]] = {
    "plain": (lambda s: s, "", {"fc": 2}),
    "ordered": (lambda s: OrderedDict(s), "", {"fc": 2}),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 800, "arch": "resnet18"}, "state_dict.", {"fc": 2}),
    "model": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "args": argparse.Namespace(lr=0.1)},
        "model.",
        {"fc": 2, "optimizer": 1},
    ),
    "data parallel": (lambda s: under("module.", s), "module.", {"fc": 2}),
    "encoder": (lambda s: {**under("encoder.", s), **under("projector.", HEAD)}, "encoder.", {"fc": 2, "projector": 2}),
    "backbone": (
        lambda s: {"state_dict": {**under("backbone.", s), **under("projection_head.", HEAD)}, "hyper_parameters": {"lr": 1.0}},
        "state_dict.backbone.",
        {"fc": 2, "projection_head": 2},
    ),
    "head inside": (
        lambda s: under("model.module.", {**s, **under("projection_head.", HEAD)}),
        "model.module.",
        {"fc": 2, "projection_head": 2},
    ),
    "MoCo": (
        lambda s: {
            "epoch": 200,
            "state_dict": {
                **under("module.encoder_k.", {key: value + 1 for key, value in s.items()}),
                **under("module.encoder_q.", s),
                "module.queue": torch.zeros(3, 4),
            },
        },
        "state_dict.module.encoder_q.",
        {"encoder_k": 122, "fc": 2, "queue": 1},
    ),
    "MoCo v3": (
        lambda s: {"state_dict": {**under("module.momentum_encoder.", plus_one(s)), **under("module.base_encoder.", s)}},
        "state_dict.module.base_encoder.",
        {"fc": 2, "momentum_encoder": 122},
    ),
    "DINO": (
        lambda s: {
            "student": {**under("module.backbone.", plus_one(s)), **under("module.head.", HEAD)},
            "teacher": {**under("backbone.", s), **under("head.", HEAD)},
            "dino_loss": {"center": torch.zeros(1, 4)},
            "args": argparse.Namespace(arch="resnet18"),
        },
        "teacher.backbone.",
        {"dino_loss": 1, "fc": 2, "head": 2, "student": 124},
    ),
    "lightly, numbered": (
        lambda s: {**under("backbone.", numbered(s)), **under("projection_head.layers.", HEAD)},
        "backbone.",
        {"projection_head": 2},
    ),
    "lightly's MoCo": (
        lambda s: {
            "state_dict": {**under("backbone.", numbered(s)), **under("backbone_momentum.", numbered(plus_one(s)))},
        },
        "state_dict.backbone.",
        {"backbone_momentum": 120},
    ),
    "solo-learn": (
        lambda s: {
            "state_dict": {
                **under("backbone.", without_classifier(s)),
                **under("momentum_backbone.", without_classifier(plus_one(s))),
                **under("classifier.", {"weight": torch.zeros(2, 2)}),
            },
        },
        "state_dict.backbone.",
        {"classifier": 1, "momentum_backbone": 120},
    ),
    "VISSL": (
        lambda s: {
            "phase_idx": 1,
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": under("_feature_blocks.", without_classifier(s)),
                        "heads": under("0.clf.", HEAD),
                    },
                },
            },
        },
        "classy_state_dict.base_model.model.trunk._feature_blocks.",
        {"heads": 2},
    ),
    "an average over steps": (
        lambda s: {"state_dict": plus_one(s), "state_dict_ema": s},
        "state_dict_ema.",
        {"fc": 2, "state_dict": 122},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_found_wherever_it_is(tmp_path: Path, published: nn.Module, layout: str) -> None:
    wrap, prefix, left_out = LAYOUTS[layout]
    path = tmp_path / "weights.pth"
    torch.save(wrap(published.state_dict()), path)
    encoder = load_foreign("resnet18", path)
    x = images()
    assert torch.equal(encoder(x), representation(published, x))
    assert encoder.card["weights"] == {"file": str(path), "prefix": prefix, "left_out": left_out, "adapted": []}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_of_any_precision(tmp_path: Path, published: nn.Module, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    state = {key: value.to(dtype) for key, value in published.state_dict().items() if value.is_floating_point()}
    save_file(state, path)  # without num_batches_tracked, as old files are
    encoder = load_foreign("resnet18", path)
    for name, tensor in encoder.named_parameters():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float())
    assert encoder(images()).shape == (2, 512)
    save_file({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "zeros")
    path.write_bytes((tmp_path / "zeros").read_bytes())  # in its place
    assert encoder.conv1.weight.any(), "the encoder is no view of its file"


def test_timm_and_torchvision_files_are_the_same(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=7).eval().requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    encoder, x = load_foreign("resnet18", tmp_path / "a.pt"), images()
    expected = network.forward_head(network.forward_features(x), pre_logits=True)
    assert (encoder(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert encoder.card["weights"]["left_out"] == {"fc": 2}


@pytest.mark.parametrize(
    ("arch", "width", "stem", "size"),
    [("resnet10", 2, "imagenet", 256), ("resnet10", 4, "small", 512), ("resnet18", 2, "imagenet", 1024)],
)
def test_widths_and_stems(tmp_path: Path, arch: str, width: int, stem: str, size: int) -> None:
    torch.manual_seed(0)
    network = ResNet(arch, width=width, stem=stem).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pth")
    encoder = load_foreign(arch, tmp_path / "a.pth", width=width, stem=stem)
    assert torch.equal(encoder(images(2, 32)), network(images(2, 32)))
    assert (encoder.card["width"], encoder.card["stem"], encoder.card["feature_size"]) == (width, stem, size)


def test_the_card_has_what_an_evaluation_needs(tmp_path: Path, published: nn.Module) -> None:
    path = tmp_path / "r18.pth"
    torch.save(published.state_dict(), path)
    before = torch.get_rng_state()
    encoder = load_foreign("resnet18", path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    card = encoder.card
    assert {key: card[key] for key in ("encoder", "width", "stem", "feature_size", "layer", "step", "data_digest")} == {
        "encoder": "resnet18", "width": 1, "stem": "imagenet", "feature_size": 512, "layer": "h", "step": 0,
        "data_digest": None,
    }  # fmt: skip
    assert (card["mean"], card["std"], card["image_size"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD), 224)
    assert card["init"] == "published weights r18.pth (how they were trained is not known)"
    assert untrained_encoder(card)(images()).shape == (2, 512)
    own = load_foreign("resnet18", path, mean=(0, 0, 0), std=(1, 1, 1), image_size=96).card
    assert (own["mean"], own["std"], own["image_size"]) == ([0, 0, 0], [1, 1, 1], 96)
    export_encoder(tmp_path / "ours.safetensors", encoder, card)
    assert torch.equal(load_foreign("resnet18", tmp_path / "ours.safetensors")(images()), encoder(images()))


def changed(**changes: Tensor | None) -> State:
    """A state dict with other tensors under keys (dots written __), or without them."""
    state = small_state()
    for name, value in changes.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    return state


SMALL = "resnet10 (width 1, stem small)"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:Sparse invariant checks")  # torch 2.14, torch 2.11
@pytest.mark.parametrize(
    ("state", "settings", "says"),
    [
        (changed(bn1__bias=None, layer4__0__bn1__bias=None), {}, f"has no 'bn1.bias', which {SMALL} needs"),
        (under("module.", changed(bn1__bias=None)), {}, "has no 'module.bn1.bias'"),
        (changed(), {"width": 2}, "'conv1.weight' is [16, 3, 3, 3]; resnet10 (width 2, stem small) has [32, 3, 3, 3]"),
        (changed(), {"stem": "imagenet"}, "'conv1.weight' is [16, 3, 3, 3]; resnet10 (width 1, stem imagenet) has [16, 3"),
        (changed(), {"arch": "resnet18"}, "'conv1.weight' is [16, 3, 3, 3]; resnet18 (width 1, stem small) has [64, 3"),
        (changed(bn1__weight=torch.ones(1)), {}, f"'bn1.weight' is [1]; {SMALL} has [16] there"),
        (changed(bn1__weight=torch.ones(16).to(torch.int8)), {}, "'bn1.weight' is torch.int8, torch.strided; weights are"),
        (changed(bn1__weight=torch.ones(16).to_sparse()), {}, "'bn1.weight' is torch.float32, torch.sparse_coo; weights are"),
        (changed(layer1__1__conv1__weight=torch.ones(1)), {}, "has 'layer1.1.conv1.weight', which resnet10 (width 1, stem"),
        (changed(layer1__0__se__weight=torch.ones(1)), {}, "has 'layer1.0.se.weight', which"),
        (changed(bn2__weight=torch.ones(1)), {}, f"has 'bn2.weight', which {SMALL} has not"),
        (changed(attnpool__weight=torch.ones(1)), {}, "has 'attnpool.weight', which"),
        ({**under("s.", changed()), **under("t.", changed())}, {}, f"holds {SMALL} several times, behind 's.', 't.'"),
        (under("s.", changed()), {"prefix": "t"}, f"no {SMALL} has the prefix 't'; there is one behind 's.'"),
        ({"visual.stem.0.weight": torch.ones(1)}, {}, f"holds no {SMALL}: hardly any of its names is there; it begins: 'vis"),
        (changed(conv1__weight=None), {}, f"has no 'conv1.weight', which {SMALL} needs"),
        ({}, {}, "it begins: none"),
        ({"a\nb": torch.ones(1)}, {}, "it begins: 'a\\nb'"),
        ([torch.ones(1)], {}, "holds a list, not a state dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_key(tmp_path: Path, state: Any, settings: dict[str, Any], says: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    message = refusal(DataError, path, **settings)
    assert message.startswith(f"{path}: ")
    assert says in message


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in torchvision.models.resnet34().state_dict().items()}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "r34.pth")
    assert "has 'layer1.2.conv1.weight', which resnet18" in refusal(
        DataError, tmp_path / "r34.pth", arch="resnet18", stem="imagenet"
    )
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    assert "has no 'layer1.2.conv1.weight', which resnet34" in refusal(
        DataError, tmp_path / "r18.pth", arch="resnet34", stem="imagenet"
    )


@pytest.mark.parametrize("prefix", ["a.t", "a.t."])
def test_a_prefix_names_one_of_several(tmp_path: Path, prefix: str) -> None:
    other = {key: value + 1 for key, value in small_state().items()}
    torch.save({"a": {**under("s.", small_state()), **under("t.", other)}}, tmp_path / "w.pth")
    encoder = load_foreign("resnet10", tmp_path / "w.pth", stem="small", prefix=prefix)
    assert torch.equal(encoder.bn1.weight, other["bn1.weight"])
    assert encoder.card["weights"]["left_out"] == {"s": len(other)}


class Harmful:
    """What a checkpoint must not be able to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (warnings.warn, ("this code ran",))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": small_state(), "extra": Harmful()}, path)
    message = refusal(DataError, path)
    assert message.startswith(f"{path}: holds ")
    assert message.endswith("warnings.warn, which is not loaded as it could run code; save its state dict alone in a new file")
    torch.save(ResNet("resnet10", stem="small"), path)
    assert "holds simclr_dist.method.model.ResNet, which is not loaded" in refusal(DataError, path)

    whole = tmp_path / "whole.pth"
    torch.save(small_state(), whole)
    for content in (b"", b"text", whole.read_bytes()[:1000], whole.read_bytes()[:-100]):
        path.write_bytes(content)
        assert refusal(DataError, path).startswith(f"{path}: is no whole file of torch.save (")
    for content in (b"", b"text", whole.read_bytes()):
        (tmp_path / "w.safetensors").write_bytes(content)
        assert refusal(DataError, tmp_path / "w.safetensors").endswith("w.safetensors: is no whole safetensors file")
    for name in ("none.pth", "none.safetensors"):
        assert "cannot read the weights: No such file" in refusal(DataError, tmp_path / name)
    assert "cannot read the weights: Is a directory" in refusal(DataError, tmp_path)
    with pytest.raises(DataError, match=r"^model.init_file: .*none.pth: cannot read the weights: No such file"):
        start(tmp_path / "none.pth")


def test_dictionaries_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"weight": torch.zeros(1)}
    endless["self"] = endless
    torch.save(endless, tmp_path / "w.pth")
    assert "holds no resnet10" in refusal(DataError, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"arch": "resnet51"}, "arch: 'resnet51' is not one of resnet10, resnet18,"),
        ({"width": 3}, "width: 3 is not one of 1, 2, 4"),
        ({"stem": "tiny"}, "stem: 'tiny' is not one of imagenet, small, small_stride2"),
        ({"mean": (0.5, 0.5)}, "mean: [0.5, 0.5]: must be 3 finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean: [0.5, 0.5, nan]: must be 3 finite numbers"),
        ({"std": (0.5, 0.5, 0)}, "std: [0.5, 0.5, 0]: must be 3 numbers above 0, and finite"),
        ({"image_size": 0}, "image_size: 0 must be at least 8 and at most 4096"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    assert refusal(ConfigError, tmp_path / "none.pth", **settings).startswith(says)


def test_a_resnet_of_small_images_by_its_other_names(tmp_path: Path) -> None:
    """CIFAR's ResNets say shortcut, where torchvision says downsample."""
    state = small_state()
    named = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    torch.save({"state_dict": under("backbone.", named)}, tmp_path / "w.pth")
    encoder = load_foreign("resnet10", tmp_path / "w.pth", stem="small")
    assert torch.equal(encoder.layer2[0].downsample[0].weight, state["layer2.0.downsample.0.weight"])
    assert encoder.card["weights"]["left_out"] == {}


def start(path: Path, **settings: str) -> tuple[ResNet, str]:
    """A resnet10 with the small stem that was started from a file."""
    torch.manual_seed(2)
    encoder = ResNet("resnet10", stem="small")
    return encoder, start_weights(encoder, "resnet10", "file", str(path), **settings)


def test_a_training_starts_from_published_weights(tmp_path: Path) -> None:
    state, path = small_state(), tmp_path / "theirs.pth"
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save(
        {
            "state_dict": {
                **under("module.encoder_q.", {**state, "fc.weight": torch.zeros(2, 2)}),
                "module.queue": HEAD["0.bias"],
            }
        },
        path,
    )
    encoder, said = start(path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    tensors = len([name for name in state if not name.endswith("tracked")])
    assert said == (
        f"file theirs.pth: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()};"
        f" {tensors} of {tensors} tensors behind 'state_dict.module.encoder_q.', all of the encoder's numbers;"
        " left out: fc 1, queue 1; how they were trained is not known"
    )


def test_torchvisions_own_weights(monkeypatch: pytest.MonkeyPatch, published: nn.Module) -> None:
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: published.state_dict())
    encoder = ResNet("resnet18")
    said = start_weights(encoder, "resnet18", "imagenet")
    assert said == (
        "imagenet, supervised (torchvision ResNet18_Weights.IMAGENET1K_V1): 100 of 100 tensors, all of the encoder's numbers;"
        " left out: fc 2"
    )
    assert torch.equal(encoder.eval()(images()), representation(published, images()))

    gray = ResNet("resnet18", channels=1)
    said = start_weights(gray, "resnet18", "imagenet")
    assert "; adapted: conv1.weight from 3 channels to 1 (their sum);" in said

    def offline(*_: Any, **__: Any) -> State:
        raise OSError("no network")

    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(ConfigError, match=r"model.init: 'imagenet': cannot download https://.*no network"):
        start_weights(encoder, "resnet18", "imagenet")
    assert start_weights(encoder, "resnet18", "imagenet_or_random") == "random (ImageNet weights could not be downloaded)"


def test_another_stem_is_left_random_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(small_state(stem="imagenet"), path)
    with pytest.raises(
        DataError, match=r"^model.init_file: .*'conv1.weight' is \[16, 3, 7, 7\]; resnet10 of these settings has"
    ):
        start(path)
    encoder, said = start(path, leave="conv1,bn1")
    torch.manual_seed(2)
    fresh, theirs = ResNet("resnet10", stem="small"), small_state(stem="imagenet")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name] if name.startswith(("conv1.", "bn1.")) else theirs[name]), name
    assert "; random: bn1 5, conv1 1;" in said or "; random: conv1 1, bn1 5;" in said
    assert "100.0 %" not in said
    for wrong in ("conv", "conv1,", "layer1.0.conv9"):
        with pytest.raises(
            ConfigError, match=r"^model.init_except: '.*' is no part of resnet10 of these settings; its parts: conv1, "
        ):
            start(path, leave=wrong)


def test_an_encoder_of_ours_says_what_it_was_started_from(tmp_path: Path) -> None:
    """Labels that a first training saw stay in the history of all that follow."""
    network = ResNet("resnet10", stem="small")
    card = {
        "encoder": "resnet10", "width": 1, "stem": "small", "feature_size": 128, "image_size": 16, "step": 7,
        "mean": [0.5] * 3, "std": [0.5] * 3, "init": "imagenet, supervised\n (x)", "data_digest": None,
    }  # fmt: skip
    export_encoder(tmp_path / "ours.safetensors", network, card)
    _, said = start(tmp_path / "ours.safetensors")
    assert said.endswith(r"; ours, step 7, started from imagenet, supervised\n (x)")
    assert "left out" not in said
