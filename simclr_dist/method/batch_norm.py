"""Normalise over the global micro-batch: BatchNorm whose statistics are of all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.method.distributed import all_gather, all_sum, first_derivative_only, world_size
from simclr_dist.method.pieces import Pieces, spread
from simclr_dist.system.errors import ConfigError


class _GlobalNorm(torch.autograd.Function):
    """Batch normalisation with statistics over all ranks, stable in float32.

    `tensors` are `count` inputs, as many weights, and biases. The inputs' means and centred sums of squares are merged in
    float64, those of one rank after another's (Chan et al. 1983). E[x^2] - E[x]^2 would lose every digit where the mean is
    large against the deviation. Returns (mean, unbiased variance, the outputs).
    """

    @staticmethod
    def forward(ctx: Any, eps: float, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        xs, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        weight = weights[0]
        unused = torch.zeros_like(weight)  # with it, the statistics of a bfloat16 input come in the weight's precision
        stats = []
        for x in xs:
            mean, var = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
            numbers = mean.new_tensor([x.numel() / x.shape[1]], dtype=torch.float64)
            stats.append(torch.cat([mean.double(), var.double(), numbers]))
        means, variances, counts = all_gather(torch.stack(stats)).flatten(0, 1).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        merged = (means * counts).sum(0) / total
        variance = ((variances + (means - merged) ** 2) * counts).sum(0) / total
        mean, var = merged.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(weight, mean, var, total, *xs)
        ctx.eps = eps
        ys = [F.batch_norm(x, mean, var, w, b, training=False, eps=eps) for x, w, b in zip(xs, weights, biases, strict=True)]
        unbiased = (variance * (total / (total - 1).clamp_min(1))).to(weight.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return mean, unbiased, *ys

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, _mean: Tensor, _unbiased: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        weight, mean, var, total, *xs = ctx.saved_tensors
        dxs, d_weights, d_biases = [], [], []
        for x, grad in zip(xs, gradients, strict=True):
            if x.is_contiguous(memory_format=torch.channels_last):
                grad = grad.contiguous(memory_format=torch.channels_last)
            dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            dxs.append(dx)
            d_weights.append(d_weight)
            d_biases.append(d_bias)
        # dx holds weight * invstd * grad. The statistics depend on x too: that part needs the sums of all inputs.
        sums = all_sum(*(torch.stack(pair).double() for pair in zip(d_biases, d_weights, strict=True)))
        mean_grad, mean_grad_xhat = (sums / total).to(weight.dtype)
        invstd = (var + ctx.eps).rsqrt()
        shape = (1, -1, *[1] * (xs[0].dim() - 2))
        scale = (weight * invstd).view(shape)
        for x, dx in zip(xs, dxs, strict=True):
            dx -= scale * mean_grad.view(shape)
            dx.addcmul_(x - mean.view(shape), scale * (invstd * mean_grad_xhat).view(shape), value=-1)
        return None, None, *dxs, *d_weights, *d_biases


class _CudaGlobalNorm(torch.autograd.Function):
    """`_GlobalNorm` of one input, by the operations of torch's SyncBatchNorm. Unlike that, it never waits for the device."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        mean, invstd = torch.batch_norm_stats(x, eps)
        numbers = torch.full_like(mean[:1], x.numel() / x.shape[1])
        gathered = all_gather(torch.cat([mean, invstd, numbers]))
        means, invstds, counts = (part.contiguous() for part in gathered.split([len(mean), len(mean), 1], dim=1))
        merged, unbiased = torch.zeros_like(mean), torch.zeros_like(mean)  # running statistics at momentum 1
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, merged, unbiased, 1.0, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.flatten().to(torch.int32))
        ctx.mark_non_differentiable(merged, unbiased)
        return merged, unbiased, torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, _mean: Tensor, _unbiased: Tensor, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        sum_dy, sum_dy_xmu, d_weight, d_bias = torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, True, True, True)
        sum_dy, sum_dy_xmu = all_sum(torch.stack([sum_dy, sum_dy_xmu]))
        dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        return None, dx, d_weight, d_bias


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for the CPU too. Weight and bias get this rank's part of the gradient, as DDP expects."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (world_size() == 1 and not isinstance(x, Pieces)):
            return super().forward(x)
        like = torch.promote_types(x.dtype, torch.float32)  # the statistics are of the weight's precision
        weight = torch.ones(x.shape[1], dtype=like, device=x.device) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y: Tensor
        if isinstance(x, Pieces):
            count = len(x.parts)
            mean, var, *ys = _GlobalNorm.apply(self.eps, count, *x.parts, *spread(weight, count), *spread(bias, count))
            y = Pieces(ys)
        elif x.is_cuda:
            mean, var, y = _CudaGlobalNorm.apply(self.eps, x, weight, bias)
        else:
            mean, var, y = _GlobalNorm.apply(self.eps, 1, x, weight, bias)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(var.to(self.running_var.dtype), share)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same in timm's BatchNormAct2d, whose own forward normalises over one rank."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[operator]  # modules of the class before
        return y


_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FIXED_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and timm's: their statistics never move


def use_global_batch_norm(model: nn.Module, *, in_pieces: bool = False) -> None:
    """Let each BatchNorm, in place, see all ranks and pieces.

    Raises ConfigError for a layer that keeps statistics of batches and is none that is understood, at any world size.
    """
    kinds = GlobalBatchNorm, GlobalBatchNormAct
    for name, module in model.named_modules():
        has_activation = type(module).__name__ == "BatchNormAct2d"
        if type(module) in _PLAIN_NORMS or has_activation:
            if world_size() > 1 or in_pieces:
                module.__class__ = kinds[has_activation]
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
