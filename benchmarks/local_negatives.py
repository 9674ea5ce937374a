"""Negatives alone: the same training, but the loss compares each image with those of its group of a few images.

So do programs whose ranks share no embeddings; here batch, steps and BatchNorm stay as they are. One process. What the log
says of negatives and of chance is of the whole batch.
    python benchmarks/local_negatives.py 64 configs/cifar10_cpu.yaml --run_folder runs/groups-of-64
"""

import dataclasses
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from simclr_dist.cli.train import main
from simclr_dist.method.distributed import world_size
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.train import learner


class LocalNegatives(NTXentLoss):
    """The mean of NTXentLoss over groups of so many images, in the order of the batch."""

    def __init__(self, images: int, **how: Any) -> None:
        super().__init__(**how)
        self.images = images

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Compute it. z_a, z_b: float [n, d], n a multiple of the group's images."""
        assert world_size() == 1, "a group would go over all ranks"
        groups = zip(*(z.unflatten(0, (-1, self.images)) for z in (z_a, z_b)), strict=True)
        return torch.stack([NTXentLoss.forward(self, *views) for views in groups]).mean()


if __name__ == "__main__":
    images = int(sys.argv[1])
    with mock.patch.object(learner, "build_loss", lambda config: LocalNegatives(images, **dataclasses.asdict(config.loss))):
        sys.exit(main(sys.argv[2:]))
