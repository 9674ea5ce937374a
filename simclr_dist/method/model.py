"""Build encoder and projector."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr_dist.method.dropout import Keys

_SHAPES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int], int]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
}


class Encoder(nn.Module):
    """What every encoder has. Others' networks get these attributes when they are built."""

    feature_size: int
    keys: Keys  # of its dropout and drop path
    arguments: Mapping[str, Any] = {}  # with which its library builds it again


class ResNet(Encoder):
    """torchvision's ResNet without classifier, in any width. It has stems for small images too.

    At width 1 and the ImageNet stem its state dict has torchvision's names and shapes. `width` multiplies every layer, as
    SimCLR's 2x and 4x do (torchvision's wide_resnet widens the inner layers alone). Initial values are torchvision's (He et
    al. 2015). Forward: float [n, channels, s, s] to the representation h [n, feature_size].
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: str, *, width: int = 1, stem: str = "imagenet", channels: int = 3) -> None:
        super().__init__()
        self.keys = Keys()
        block, depths, base = _SHAPES[name]
        planes = base * width
        kernel, stride = {"imagenet": (7, 2), "small_stride2": (3, 2)}.get(stem, (3, 1))
        self.conv1 = nn.Conv2d(channels, planes, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.feature_size = planes
        for stage, depth in enumerate(depths):
            layers = []
            for i in range(depth):
                out, stride = planes * 2**stage, 2 if stage and not i else 1
                size_in, self.feature_size = self.feature_size, out * block.expansion
                shortcut = None
                if stride != 1 or size_in != self.feature_size:
                    convolution = nn.Conv2d(size_in, self.feature_size, 1, stride=stride, bias=False)
                    shortcut = nn.Sequential(convolution, nn.BatchNorm2d(self.feature_size))
                layers.append(block(size_in, out, stride, shortcut))
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        h: Tensor = self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)
        return h


def build_projector(size: int, *, depth: int = 2, hidden: int = 2048, dim: int = 128, batch_norm: bool = True) -> nn.Module:
    """Build the MLP from h [n, size] to z. `depth` linear layers, ReLU between; BatchNorm after each replaces its bias."""
    layers: list[nn.Module] = []
    for i in range(depth):
        size_in, size_out = hidden if i else size, hidden if i < depth - 1 else dim
        layers.append(nn.Linear(size_in, size_out, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size_out))
        if i < depth - 1:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class SimCLR(nn.Module):
    """Encoder and projector, both under `autocast`. Forward: float [n, c, s, s] to z [n, dim]."""

    channels_last = False

    def __init__(self, encoder: nn.Module, projector: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder, self.projector, self.autocast = cast(Encoder, encoder), projector, autocast

    def forward(self, x: Tensor) -> Tensor:
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.to(next(self.parameters()).dtype).contiguous(memory_format=order)  # here: a micro-batch at a time
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            z: Tensor = self.projector(self.encoder(x))
        return z
