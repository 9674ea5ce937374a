"""Build optimizers: LARS, parameter groups, learning rate, and skippable steps."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
import torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

Group = dict[str, Any]

_CACHE_BYTES = 2**20

OPTIMIZER_BUFFERS = {"lars": 1, "sgd": 1, "adamw": 2}  # numbers that each keeps for a weight; others' are not known


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the rate of step 0, 1, ... A linear warm-up reaches `peak` in its last step; then a cosine falls to 0.

    Raises ValueError for a rate that is negative or not finite, negative steps, and a warm-up that is longer than the whole.
    """
    if not (0 <= peak < math.inf and step >= 0 and 0 <= warmup_steps <= total_steps):
        raise ValueError(f"learning_rate: step {step}, peak {peak}, warmup_steps {warmup_steps}, total_steps {total_steps}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Return two groups. Weights (decayed, adapted by LARS), and all else (neither).

    By module type: weights are those of linear layers, convolutions, attention and recurrent layers. Norms, biases, position
    and other embeddings, tokens, scales of layers and temperatures are not.
    """
    weights: list[Tensor] = []
    excluded: list[Tensor] = []
    for module in model.modules():
        is_table = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            multiplies = "weight" in name and parameter.dim() > 1 and not is_table
            (weights if multiplies else excluded).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]


class LARS(Optimizer):
    """LARS as in SimCLR's official code (google-research/simclr, `lars_optimizer.py`; You et al. 2017).

    For a group with `adapt`: g += weight_decay * w; trust = eta * |w| / |g| (1 if either norm is 0); then classic momentum
    with the rate inside the buffer, v = momentum * v + rate * trust * g; w -= v. Without `adapt`: the same with trust 1.
    No host sync. With `found_inf` set to a device scalar, as torch.amp does, a step where it is 1 changes nothing.
    `foreach` does each operation over all tensors of a group (few operations), else over portions of them (warm caches); None
    is True on CUDA and False on the CPU. `trust_ratios` are those of the last step, in device tensors: one for each weight
    with a gradient in a group with `adapt`, in the order of the parameters. Raises ValueError for a negative or infinite rate.
    """

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
        self._step_supports_amp_scaling = True
        self.trust_ratios: list[Tensor] = []
        self._foreach = foreach

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with settings of their own. The others are those of the optimizer."""
        for name, below in (("lr", math.inf), ("momentum", 1), ("weight_decay", math.inf), ("trust_coefficient", math.inf)):
            if not 0 <= (value := param_group.get(name, self.defaults[name])) < below:
                raise ValueError(f"LARS: {name}: {value} must be at least 0 and below {below}")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their .grad."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.trust_ratios = []
        for group in self.param_groups:
            for weights in self._portions([p for p in group["params"] if p.grad is not None]):
                self._update(group, weights)
        return loss

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
            state["momentum_buffer"] = _in_order_of(weight, state["momentum_buffer"])  # a checkpoint may have another order
        gradients: Any = [_in_order_of(p, p.grad) for p in weights if p.grad is not None]
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


def _in_order_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """Lay a gradient, or momentum, out as the weight. The fused kernel walks through memory."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def build_optimizer(
    name: str,
    groups: list[Group],
    *,
    lr: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Build `lars`, `sgd` (Nesterov off), `adamw` or `torch_optimizer.NAME`. Groups come from `parameter_groups`."""
    if name == "lars":
        return LARS(groups, lr, momentum=momentum, trust_coefficient=trust_coefficient)
    plain = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    if name == "sgd":
        sgd = torch.optim.SGD(plain, lr, momentum=momentum, fused=True)
        for group in sgd.param_groups if momentum else ():
            for p in group["params"]:  # fused SGD leaves uninitialised memory here when the very first step is skipped
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if name == "adamw":
        return torch.optim.AdamW(plain, lr, betas=betas, fused=True)
    third_party = name.removeprefix("torch_optimizer.")
    # Its LARS's documented default is .001, its real one .01. It does not adapt where weight_decay is 0, as in our group
    # without adaptation.
    more: Any = {"momentum": momentum, "trust_coefficient": trust_coefficient} if third_party == "lars" else {}
    make: Callable[..., Optimizer] = torch_optimizer.get(third_party)
    return make(plain, lr=lr, **more)


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Take an optimizer step unless the device scalar `skip` (bool) is true.

    LARS and torch's fused optimizers decide on the device; for torch-optimizer's, which sync the host anyway, the host does.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # what GradScaler sets, too
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # the same
    elif not skip.item():
        optimizer.step()
