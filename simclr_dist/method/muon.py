"""Build Muon. It makes the update of each weight matrix orthogonal, and leaves all else to AdamW."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from simclr_dist.method.group_optimizer import Group, GroupOptimizer, in_order_of

# Jordan's: five steps lift a singular value of a thousandth of the norm to about a half, and put the large ones near 1.
_STEPS = 5
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_LEAST = 1e-15  # a norm below is taken for it: squares of much smaller numbers are 0 in float32, and so would be their norm


class Muon(GroupOptimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) at AdamW's rates (Liu et al. 2025).

    For a group with `adapt`, with a weight as the matrix w [outputs, rest]: m = momentum * m + (1 - momentum) * g;
    u = momentum * m + (1 - momentum) * g (Nesterov); w -= rate * (weight_decay * w + 0.2 * sqrt(largest side) *
    `orthogonal(u)`). The root of the mean square of such an update is 0.2, as AdamW's is about. Without `adapt`: AdamW.
    No host sync. With `found_inf` set to a device scalar, as torch.amp does, a step where it is 1 changes nothing.
    Matrices of one shape are computed at once. Raises ValueError for a negative or infinite rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "adapt": adapt}
        super().__init__(params, defaults)

    def _step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not group["adapt"]:
                self._adamw(group, weights)
                continue
            of_shape: dict[Any, list[Tensor]] = {}
            for weight in weights:
                shape = len(weight), math.prod(weight.shape[1:])
                of_shape.setdefault((shape, weight.dtype, weight.device), []).append(weight)
            for alike in of_shape.values():
                self._update(group, alike)

    def _update(self, group: Group, weights: list[Tensor]) -> None:
        """Update weights that are matrices of one shape."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        momenta = [self._state(weight, "momentum_buffer")[0] for weight in weights]
        gradients = [p.grad if scale is None else p.grad / scale for p in weights if p.grad is not None]
        rate: Any = group["lr"]
        if found_inf is not None:  # then the mean stands in for the gradient, so that it stays, and the rate is 0
            bad = found_inf.bool()
            gradients = [torch.where(bad, m, g) for m, g in zip(momenta, gradients, strict=True)]
            rate = weights[0].new_full((), rate) * ~bad
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonal(torch.stack([_ordered(u, weight).flatten(1) for u, weight in zip(ahead, weights, strict=True)]))
        size = 0.2 * math.sqrt(max(updates.shape[1:]))
        for weight, update in zip(weights, updates, strict=True):
            w = _ordered(weight, weight)
            w.sub_(rate * (size * update.view(w.shape) + group["weight_decay"] * w))

    def _adamw(self, group: Group, weights: list[Tensor]) -> None:
        states = [self._state(weight, "exp_avg", "exp_avg_sq") for weight in weights]
        for weight in weights:
            state, device = self.state[weight], weight.device
            # Of a checkpoint torch leaves it on the host.
            state["step"] = state["step"].to(device) if "step" in state else torch.zeros((), device=device)
        adamw(
            weights, [in_order_of(p, p.grad) for p in weights if p.grad is not None], [first for first, _ in states],
            [second for _, second in states], [], [self.state[weight]["step"] for weight in weights],
            fused=True, grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=1e-8, maximize=False,
        )  # fmt: skip

    def _state(self, weight: Tensor, *names: str) -> list[Tensor]:
        """Return tensors of the state, which start as zeros. A checkpoint's may have another order of memory."""
        state = self.state[weight]
        for name in names:
            state[name] = in_order_of(weight, state[name]) if name in state else torch.zeros_like(weight)
        return [state[name] for name in names]


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1. Float [n, rows, columns] of the same shape; a matrix of zeros stays.

    The polynomial a x + b x^3 + c x^5 five times over, of singular values divided by the matrix's norm. All is done on
    the small matrix x x^T, in which a step multiplies, so that a large one is multiplied twice and not ten times.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    matrices = matrices / norms.clamp_min(_LEAST)
    gram = matrices @ matrices.mT
    product = factor = _factor(gram)
    for _ in range(_STEPS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ matrices


def _factor(gram: Tensor) -> Tensor:
    factor = torch.baddbmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
    factor.diagonal(dim1=1, dim2=2).add_(_LINEAR)
    return factor


def _ordered(tensor: Tensor, weight: Tensor) -> Tensor:
    """View a tensor as [outputs, ...]. The rest is in the order of `weight`'s memory, so that nothing of it is copied."""
    return tensor.permute(0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True))
