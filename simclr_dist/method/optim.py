"""Build optimizers, parameter groups, learning rate, and skippable steps."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.method.group_optimizer import Group
from simclr_dist.method.lars import LARS
from simclr_dist.method.muon import Muon


def numbers_kept(name: str, momentum: float) -> int | None:
    """Return how many numbers an optimizer keeps for a weight. None where that is not known."""
    return {"lars": 1, "muon": 1, "sgd": int(momentum > 0), "adamw": 2}.get(name)


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
    """Return two groups. Weights (decayed, adapted by LARS and Muon), and all else (neither).

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


def build_optimizer(
    name: str,
    groups: list[Group],
    *,
    lr: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Build `lars`, `muon`, `sgd` (Nesterov off), `adamw` or `torch_optimizer.NAME`. Groups come from `parameter_groups`."""
    if name == "lars":
        return LARS(groups, lr, momentum=momentum, trust_coefficient=trust_coefficient)
    if name == "muon":
        return Muon(groups, lr, momentum=momentum, betas=betas)
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

    LARS, Muon and torch's fused optimizers decide on the device. For torch-optimizer's, which sync the host, the host does.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # what GradScaler sets, too
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # the same
    elif not skip.item():
        optimizer.step()
