"""Build encoder, projector, and BatchNorm over the global micro-batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr_dist.method.distributed import all_gather, all_sum, first_derivative_only, world_size
from simclr_dist.method.dropout import Keys
from simclr_dist.system.errors import ConfigError

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


class _GlobalNorm(torch.autograd.Function):
    """Batch normalisation with statistics over all ranks, stable in float32.

    The ranks' means and centred sums of squares are merged in float64 in rank order (Chan et al. 1983). E[x^2] - E[x]^2
    would lose every digit where the mean is large against the deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros_like(weight)  # with it, the statistics of a bfloat16 input come in the weight's precision
        mean, var = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
        count = x.numel() / x.shape[1]
        stats = torch.cat([mean.double(), var.double(), mean.new_tensor([count], dtype=torch.float64)])
        means, variances, counts = all_gather(stats).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        merged = (means * counts).sum(0) / total
        variance = ((variances + (means - merged) ** 2) * counts).sum(0) / total
        mean, var = merged.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        unbiased = (variance * (total / (total - 1).clamp_min(1))).to(weight.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        if x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # dx holds weight * invstd * grad. The statistics depend on x too: that part needs the sums of all ranks.
        sums = all_sum(torch.stack([d_bias, d_weight]).double())
        mean_grad, mean_grad_xhat = (sums / total).to(weight.dtype)
        invstd = (var + ctx.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = (weight * invstd).view(shape)
        dx -= scale * mean_grad.view(shape)
        dx.addcmul_(x - mean.view(shape), scale * (invstd * mean_grad_xhat).view(shape), value=-1)
        return dx, d_weight, d_bias, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for the CPU too. Weight and bias get this rank's part of the gradient, as DDP expects."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        like = torch.promote_types(x.dtype, torch.float32)  # the statistics are of the weight's precision
        weight = x.new_ones(x.shape[1], dtype=like) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y: Tensor
        y, mean, var = _GlobalNorm.apply(x, weight, bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(var.to(self.running_var.dtype), share)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _ThenActivation:
    """The rest of timm's BatchNormAct2d, whose own forward normalises over one rank."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[misc, attr-defined]  # of the other base class
        return y


class GlobalBatchNormAct(_ThenActivation, GlobalBatchNorm):
    """BatchNormAct2d on the CPU."""


class SyncBatchNormAct(_ThenActivation, nn.SyncBatchNorm):
    """BatchNormAct2d on CUDA."""


_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FIXED_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and timm's: their statistics never move


def use_global_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let each BatchNorm, in place, see all ranks. On CUDA it becomes torch's SyncBatchNorm, on the CPU ours.

    Raises ConfigError for a layer that keeps statistics of batches and is none that is understood, at any world size.
    """
    kinds = (nn.SyncBatchNorm, SyncBatchNormAct) if device.type == "cuda" else (GlobalBatchNorm, GlobalBatchNormAct)
    for name, module in model.named_modules():
        has_activation = type(module).__name__ == "BatchNormAct2d"
        if type(module) in _PLAIN_NORMS or has_activation:
            if world_size() > 1:
                module.__class__ = kinds[has_activation]
                module.process_group = None  # torch's SyncBatchNorm asks for it
        elif type(module) not in kinds and type(module).__name__ not in _FIXED_NORMS:
            keeps = [buffer for buffer, _ in module.named_buffers(recurse=False) if buffer.startswith("running_")]
            if keeps or isinstance(module, nn.modules.batchnorm._BatchNorm):
                cure = "only torch's BatchNorm and timm's BatchNormAct2d can be taken over all ranks"
                raise ConfigError(f"model.encoder: {name} is a {type(module).__name__}, with statistics of its batch; {cure}")


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are. In training mode it still uses the batch's."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())  # moves in its place
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)
