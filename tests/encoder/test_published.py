"""Checkpoints of others: found wherever they are in a file, and refused by the first key that does not fit."""

import argparse
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
from simclr_dist.encoder.published import IMAGENET_MEAN, IMAGENET_STD, load_foreign
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
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_found_wherever_it_is(tmp_path: Path, published: nn.Module, layout: str) -> None:
    wrap, prefix, left_out = LAYOUTS[layout]
    path = tmp_path / "weights.pth"
    torch.save(wrap(published.state_dict()), path)
    encoder = load_foreign("resnet18", path)
    x = images()
    assert torch.equal(encoder(x), representation(published, x))
    assert encoder.card["weights"] == {"file": str(path), "prefix": prefix, "left_out": left_out}


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
    assert card["init"] == "published weights r18.pth (not known: how they were trained)"
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


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:Sparse invariant checks")  # torch 2.14, torch 2.11
@pytest.mark.parametrize(
    ("state", "settings", "says"),
    [
        (changed(bn1__bias=None, layer4__0__bn1__bias=None), {}, "has no 'bn1.bias', which a resnet10 of width 1, stem small,"),
        (under("module.", changed(bn1__bias=None)), {}, "has no 'module.bn1.bias'"),
        (changed(), {"width": 2}, "'conv1.weight' is [16, 3, 3, 3]; a resnet10 of width 2, stem small, has [32, 3, 3, 3]"),
        (changed(), {"stem": "imagenet"}, "'conv1.weight' is [16, 3, 3, 3]; a resnet10 of width 1, stem imagenet, has [16, 3"),
        (changed(), {"arch": "resnet18"}, "'conv1.weight' is [16, 3, 3, 3]; a resnet18 of width 1, stem small, has [64, 3"),
        (changed(bn1__weight=torch.ones(1)), {}, "'bn1.weight' is [1]; a resnet10 of width 1, stem small, has [16] there"),
        (changed(bn1__weight=torch.ones(16).to(torch.int8)), {}, "'bn1.weight' is torch.int8, torch.strided; weights are"),
        (changed(bn1__weight=torch.ones(16).to_sparse()), {}, "'bn1.weight' is torch.float32, torch.sparse_coo; weights are"),
        (changed(layer1__1__conv1__weight=torch.ones(1)), {}, "has 'layer1.1.conv1.weight', which a resnet10 of width 1, stem"),
        (changed(layer1__0__se__weight=torch.ones(1)), {}, "has 'layer1.0.se.weight', which"),
        (changed(bn2__weight=torch.ones(1)), {}, "has 'bn2.weight', which a resnet10 of width 1, stem small, has not"),
        (changed(attnpool__weight=torch.ones(1)), {}, "has 'attnpool.weight', which"),
        ({"a": {**under("s.", changed()), **under("t.", changed())}}, {}, "holds several ResNets, behind 'a.s.', 'a.t.'; name"),
        (under("s.", changed()), {"prefix": "t"}, "no ResNet has the prefix 't'; there is one behind 's.'"),
        ({"visual.stem.0.weight": torch.ones(1)}, {}, "holds no ResNet with torchvision's names: no conv1.weight with layer1"),
        (changed(conv1__weight=None), {}, "holds no ResNet with torchvision's names"),
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
    assert "has 'layer1.2.conv1.weight', which a resnet18" in refusal(
        DataError, tmp_path / "r34.pth", arch="resnet18", stem="imagenet"
    )
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    assert "has no 'layer1.2.conv1.weight', which a resnet34" in refusal(
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


def test_dictionaries_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"weight": torch.zeros(1)}
    endless["self"] = endless
    torch.save(endless, tmp_path / "w.pth")
    assert "holds no ResNet" in refusal(DataError, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"arch": "resnet51"}, "arch: 'resnet51' is not one of resnet10, resnet18,"),
        ({"width": 3}, "width: 3 is not one of 1, 2, 4"),
        ({"stem": "tiny"}, "stem: 'tiny' is not one of imagenet, small, small_stride2"),
        ({"mean": (0.5, 0.5)}, "mean: [0.5, 0.5]: must be three finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean: [0.5, 0.5, nan]: must be three finite numbers"),
        ({"std": (0.5, 0.5, 0)}, "std: [0.5, 0.5, 0]: must be three numbers above 0, and finite"),
        ({"image_size": 0}, "image_size: 0 must be at least 8 and at most 4096"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    assert refusal(ConfigError, tmp_path / "none.pth", **settings).startswith(says)
