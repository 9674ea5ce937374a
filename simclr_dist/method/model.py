"""Encoder by name, projector, and BatchNorm over the global micro-batch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr_dist.method.distributed import all_gather, all_sum, world_size

_SHAPES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int], int]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
}


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, in any width and with stems for small images.

    At width 1 and the ImageNet stem its state dict has torchvision's names and shapes. `width` multiplies every layer, as
    SimCLR's 2x and 4x do (torchvision's wide_resnet widens the inner layers alone). Forward: float [n, 3, s, s] to the
    representation h [n, feature_size]. Starts as torchvision's (He et al. 2015).
    """

    checkpointing = False  # keep the inputs of residual blocks alone, and compute the rest again in the backward

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: str, *, width: int = 1, stem: str = "imagenet") -> None:
        super().__init__()
        block, depths, base = _SHAPES[name]
        planes = base * width
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, planes, 3, stride=2 if stem == "small_stride2" else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.feature_size = planes
        expansion: int = block.expansion
        for stage, depth in enumerate(depths):
            layers = []
            for i in range(depth):
                out, stride = planes * 2**stage, 2 if stage and not i else 1
                shortcut = None
                if stride != 1 or self.feature_size != out * expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(self.feature_size, out * expansion, 1, stride=stride, bias=False),
                        nn.BatchNorm2d(out * expansion),
                    )
                layers.append(block(self.feature_size, out, stride, shortcut))
                self.feature_size = out * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            if self.checkpointing and torch.is_grad_enabled():
                for block in layer:
                    x = _checkpointed(block, x)
            else:
                x = layer(x)
        h: Tensor = self.avgpool(x).flatten(1)
        return h


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, computed a second time in the backward; BatchNorm's running statistics move in the first time alone."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_running_statistics(block)

    y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return y


def build_projector(
    feature_size: int, *, depth: int = 2, hidden: int = 2048, dim: int = 128, batch_norm: bool = True
) -> nn.Module:
    """MLP from h to z: `depth` linear layers with ReLU between; BatchNorm, after each, takes the place of its bias."""
    layers: list[nn.Module] = []
    for i in range(depth):
        last = i == depth - 1
        size_in, size_out = feature_size if i == 0 else hidden, dim if last else hidden
        layers.append(nn.Linear(size_in, size_out, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size_out))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class SimCLR(nn.Module):
    """Encoder and projector: float [n, 3, s, s] to z [n, dim]; `autocast` (bfloat16, say) is for both.

    Images are brought to the weights' type, and with `channels_last` to that order, here: a piece at a time.
    """

    channels_last = False

    def __init__(self, encoder: ResNet, projector: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.to(next(self.parameters()).dtype).contiguous(memory_format=order)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            z: Tensor = self.projector(self.encoder(x))
        return z


def build_simclr(
    encoder: str,
    *,
    width: int = 1,
    stem: str = "imagenet",
    projector_depth: int = 2,
    projector_hidden: int = 2048,
    projector_dim: int = 128,
    projector_batch_norm: bool = True,
) -> SimCLR:
    """The model by the names of the settings."""
    network = ResNet(encoder, width=width, stem=stem)
    projector = build_projector(
        network.feature_size,
        depth=projector_depth,
        hidden=projector_hidden,
        dim=projector_dim,
        batch_norm=projector_batch_norm,
    )
    return SimCLR(network, projector)


class _GlobalNorm(torch.autograd.Function):
    """Batch normalisation with statistics over all ranks, stable in float32.

    Each rank's mean and centred sum of squares are merged in float64 in rank order (Chan et al. 1983): E[x^2] - E[x]^2
    would lose every digit where the mean is large against the deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        ctx.mark_non_differentiable(mean, unbiased, total)
        return y, mean, unbiased, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        if x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grad,
            x,
            weight,
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        # dx holds weight * invstd * grad; what the statistics' own dependence on x takes off needs the sums of all ranks.
        sums = all_sum(torch.stack([d_bias, d_weight]).double())
        mean_grad, mean_grad_xhat = (sums / total).to(weight.dtype)
        invstd = (var + ctx.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = (weight * invstd).view(shape)
        dx -= scale * mean_grad.view(shape)
        dx.addcmul_(x - mean.view(shape), scale * (invstd * mean_grad_xhat).view(shape), value=-1)
        return dx, d_weight, d_bias, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics are those of the micro-batch over all ranks, on the CPU too (SyncBatchNorm is CUDA's).

    The gradients of weight and bias are this rank's part, as DDP expects them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, var, _ = _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
                self.running_var.lerp_(var, self.momentum)  # type: ignore[union-attr, arg-type]
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        output: Tensor = y
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def use_global_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace each BatchNorm by one over all ranks: torch's SyncBatchNorm on CUDA, ours on the CPU; in place."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm  # type: ignore[assignment]


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm in training mode still uses the batch's statistics but leaves its running ones alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    for norm, own in buffers:
        for name, buffer in own.items():
            setattr(norm, name, buffer.clone())  # to be moved in its place
    try:
        yield
    finally:
        for norm, own in buffers:
            for name, buffer in own.items():
                setattr(norm, name, buffer)
