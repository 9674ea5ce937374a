"""Build LARS, the optimizer of large batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simclr_dist.method.group_optimizer import Group, GroupOptimizer, in_order_of

_CACHE_BYTES = 2**20


class LARS(GroupOptimizer):
    """LARS as in SimCLR's official code (google-research/simclr, `lars_optimizer.py`; You et al. 2017).

    For a group with `adapt`: g += weight_decay * w; trust = eta * |w| / |g| (1 if either norm is 0); then classic momentum
    with the rate inside the buffer, v = momentum * v + rate * trust * g; w -= v. Without `adapt`: the same with trust 1.
    No host sync. With `found_inf` set to a device scalar, as torch.amp does, a step where it is 1 changes nothing.
    `foreach` does each operation over all tensors of a group (few operations), else over portions of them (warm caches); None
    is True on CUDA and False on the CPU. `trust_ratios` are those of the last step, in device tensors: one for each weight
    with a gradient in a group with `adapt`, in the order of the parameters. Raises ValueError for a negative or infinite rate.
    """

    RATES = (*GroupOptimizer.RATES, "trust_coefficient")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
        foreach: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient, "adapt": adapt})
        self.trust_ratios: list[Tensor] = []
        self._foreach = foreach

    def _step(self) -> None:
        self.trust_ratios = []
        for group in self.param_groups:
            for weights in self._portions([p for p in group["params"] if p.grad is not None]):
                self._update(group, weights)

    def _portions(self, weights: list[Tensor]) -> Iterator[list[Tensor]]:
        """Cut a group into portions that stay in a core's cache. With `foreach` it is one portion."""
        portion: list[Tensor] = []
        size = 0
        for weight in weights:
            bytes_of_weight = weight.numel() * weight.element_size()
            at_once = weight.is_cuda if self._foreach is None else self._foreach
            if portion and not at_once and size + bytes_of_weight > _CACHE_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(weight)
            size += bytes_of_weight
        if portion:
            yield portion

    def _update(self, group: Group, weights: list[Tensor]) -> None:
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
                if state["momentum_buffer"].stride() != weight.stride():
                    shape = list(weight.shape)
                    raise ValueError(f"LARS: a weight of shape {shape} is a view with gaps; give it memory of its own")
            state["momentum_buffer"] = in_order_of(weight, state["momentum_buffer"])  # a checkpoint may have another order
        gradients: Any = [in_order_of(p, p.grad) for p in weights if p.grad is not None]
        if (scale := getattr(self, "grad_scale", None)) is not None:  # torch.amp.GradScaler leaves the division to us
            gradients = torch._foreach_div(gradients, scale)
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        rates: Any = group["lr"]
        if group["adapt"]:
            weight_norms, gradient_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
            trust = group["trust_coefficient"] * weight_norms / gradient_norms
            trust = torch.where((weight_norms > 0) & (gradient_norms > 0), trust, 1.0)
            self.trust_ratios.append(trust)
            rates = list((group["lr"] * trust).unbind())
        if group["weight_decay"]:
            torch._foreach_mul_(gradients, rates)  # a copy already
        else:
            gradients = torch._foreach_mul(gradients, rates)
        # Momentum and update in one pass; with `found_inf` it changes nothing: v = momentum * v + g; w -= v.
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights] if group["momentum"] else []
        plain: Any = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
        found_inf = getattr(self, "found_inf", None)
        torch._fused_sgd_(weights, gradients, buffers, lr=1.0, momentum=group["momentum"], found_inf=found_inf, **plain)
