"""Hold what our optimizers share. Closures, settings of a group, steps that torch.amp may skip."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]


class GroupOptimizer(Optimizer):
    """Optimize groups that have settings of their own.

    With `found_inf` set to a device scalar, as torch.amp does, a step where it is 1 changes nothing; `grad_scale` divides the
    gradients. Both are up to `_step`.
    """

    _step_supports_amp_scaling = True  # torch.amp's word for the two
    RATES: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")  # settings that are at least 0 and finite

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with settings of their own. The others are those of the optimizer. Raises ValueError."""
        settings = {**self.defaults, **param_group}
        for name, below in {**dict.fromkeys(self.RATES, math.inf), "momentum": 1}.items():
            if not 0 <= settings[name] < below:
                raise ValueError(f"{type(self).__name__}: {name}: {settings[name]} must be at least 0 and below {below}")
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
        self._step()
        return loss

    @abstractmethod
    def _step(self) -> None: ...


def in_order_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """Lay a gradient, or momentum, out as the weight. Fused kernels walk through memory."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)
