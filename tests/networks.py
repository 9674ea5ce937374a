"""Networks and images that differ everywhere, for tests of what a model computes."""

import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """BatchNorm away from its start values, its statistics too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model


def images(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
