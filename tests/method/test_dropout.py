"""What is dropped belongs to the image: not to its place in a batch, the number of passes, or a recomputation."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from simclr_dist.method.dropout import TRIAL_IMAGES, Keys, key_random_layers, tried
from simclr_dist.method.encoders import build_encoder, checkpoint_blocks
from simclr_dist.method.model import Encoder
from simclr_dist.system.errors import ConfigError


class Twice(nn.Module):
    """A block that calls one layer twice, as torchvision's Swin does, and a table of positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.of_positions = nn.Dropout(0.5)
        self.register_buffer("positions", torch.ones(9))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = scale * x + self.layer(x)
        y: Tensor = (x + self.layer(x)) * self.of_positions(self.positions)
        return y


def set_rate(layer: nn.Module, rate: float) -> None:
    vars(layer).update(p=rate, drop_prob=rate)


def keyed(network: nn.Module, *shape: int) -> Keys:
    keys = key_random_layers(network)
    tried(network, keys, lambda: network(torch.zeros(TRIAL_IMAGES, *shape)))
    return keys


def words(n: int, columns: int) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2**32, (n, columns), generator=generator), list(range(columns))


LAYERS = [DropPath(0.5), StochasticDepth(0.5, "row"), nn.Dropout(0.5), nn.Dropout2d(0.5)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_what_is_dropped_belongs_to_the_image(layer: nn.Module) -> None:
    block = Twice(copy.deepcopy(layer))
    keys = keyed(block, 4, 9)
    assert keys.columns == 3
    x = torch.randn(6, 4, 9)
    of_images, of_layers = words(6, 3)

    def forward(rows: slice) -> Tensor:
        with keys.using(of_images[rows], of_layers):
            h: Tensor = block(x[rows])
        return h

    whole = forward(slice(None))
    assert torch.equal(torch.cat([forward(slice(2)), forward(slice(2, 6))]), whole)
    assert not torch.equal(whole[0] / x[0], whole[1] / x[1])
    positions = (whole / x).abs() > 0
    assert 0 < positions.any(1).any(0).sum() < 9, "one mask of positions for all images"
    block.eval()
    assert torch.equal(forward(slice(None)), 4 * x)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_the_rate_and_the_scale_are_those_of_the_layer(layer: nn.Module) -> None:
    network = nn.Sequential(copy.deepcopy(layer))
    set_rate(network[0], 0.2)
    keys = keyed(network, 8, 16)
    with keys.using(*words(4000, 1)):
        y = network(torch.ones(4000, 8, 16))
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert float((y == 0).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(y.mean()) == pytest.approx(1, abs=0.04)
    with keys.using(*words(4, 1)):
        set_rate(network[0], 1.0)
        assert not network(torch.ones(4, 8, 16)).any()


def test_words_are_spread_evenly() -> None:
    layer = nn.Sequential(nn.Dropout(0.5))
    keys = keyed(layer, 1000)
    with keys.using(torch.arange(500)[:, None], [0]):
        kept = (layer(torch.ones(500, 1000)) > 0).double()
    deviations = (torch.stack([kept.mean(0).std() * 500**0.5, kept.mean(1).std() * 1000**0.5]) / 0.5).tolist()
    assert deviations == pytest.approx([1, 1], abs=0.1)
    assert float(torch.corrcoef(kept).triu(1).abs().max()) < 0.2


def test_without_keys_layers_draw_as_ever() -> None:
    layer = nn.Sequential(nn.Dropout(0.5))
    x = torch.ones(5, 50)
    torch.manual_seed(3)
    expected = layer(x)
    keyed(layer, 50)
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)


class _Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


@pytest.mark.parametrize("layer", [_Function(), StochasticDepth(0.1, "batch"), nn.AlphaDropout(0.1)])
def test_what_cannot_be_keyed_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="it draws random numbers by aten"):
        keyed(nn.Sequential(layer), 4)
    keyed(nn.Sequential(layer).eval(), 4)


class _TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
        return y


@pytest.mark.parametrize("tokens", [9, 37])
def test_images_in_another_dimension_are_refused(tokens: int) -> None:
    """The images of a batch would share, or exchange, what is dropped."""
    with pytest.raises(ValueError, match=rf"its dropout has images in another than the first dimension of \[{tokens}, "):
        keyed(_TokensFirst(), tokens, 4)


def _gradient(encoder: Encoder, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    encoder.zero_grad()
    with encoder.keys.using(*words(len(x), encoder.keys.columns)):
        encoder(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]), list(encoder.buffers())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("resnet10", {"stem": "small"}),
        ("timm/test_vit", {"drop_path": 0.5}),
        ("timm/test_efficientnet", {}),
        ("torchvision/shufflenet_v2_x0_5", {}),
    ],
)
def test_checkpointing_computes_the_same(name: str, how: dict[str, Any]) -> None:
    """Masks are drawn alike, and BatchNorm's running statistics move once."""
    x, found, kept = torch.randn(6, 3, 32, 32), [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder(name, image_size=32, **how)
        if checkpointing:
            checkpoint_blocks(encoder)
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoder(x)
        kept.append(sum(sizes.values()))
        found.append(_gradient(encoder, x))
    (gradient, buffers), (again, buffers_again) = found
    assert torch.equal(gradient, again)
    assert all(map(torch.equal, buffers, buffers_again))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("name", ["timm/vgg11", "torchvision/vgg11"])
def test_a_network_without_blocks_is_not_checkpointed(name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=32)
    with pytest.raises(ConfigError, match="activation_checkpointing: true: the blocks of a VGG are not known"):
        checkpoint_blocks(encoder)


def test_torchvisions_rates_are_spread_over_its_depth() -> None:
    with torch.device("meta"):
        encoder = build_encoder("torchvision/convnext_tiny", drop_path=0.34)
    rates = [module.p for module in encoder.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.02 * place for place in range(18)])


@pytest.mark.parametrize("name", ["timm/vgg11", "torchvision/resnet18", "resnet18"])
def test_a_rate_that_nothing_has_is_refused(name: str) -> None:
    said = f"^model.drop_path: 0.1 has no effect on {name}, which has none;"
    with torch.device("meta"), pytest.raises(ConfigError, match=said):
        build_encoder(name, drop_path=0.1, image_size=64)


def test_a_recomputed_block_counts_its_calls_as_the_forward_did() -> None:
    gradients = []
    for recomputed in (False, True):
        block = Twice(nn.Dropout(0.5))
        keys = keyed(block, 4, 9)
        x = torch.ones(6, 4, 9, requires_grad=True)
        with keys.using(*words(6, 3)):
            y = checkpoint(block.forward, x, scale=2.0, use_reentrant=False) if recomputed else block(x, scale=2.0)
            y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
