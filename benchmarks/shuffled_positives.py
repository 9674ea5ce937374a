"""The control of the first run: the same training, but the two views of a pair come from DIFFERENT images.

If accuracy rose here too, it would come from something else than what SimCLR teaches.
    torchrun --nproc-per-node 2 benchmarks/shuffled_positives.py simclr_dist/demo.yaml --run_folder runs/demo-control
"""

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from simclr_dist.cli.train import main
from simclr_dist.data.steps import Views, coloured
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.train import loop


def views_of_different_images(
    views: Views, settings: ViewSettings, device: torch.device, **how: Any
) -> Sequence[tuple[Tensor, Tensor]]:
    """View b moves on by one image of its micro-batch."""
    return [(view_a, view_b.roll(1, 0)) for view_a, view_b in coloured(views, settings, device, **how)]


if __name__ == "__main__":
    with mock.patch.object(loop, "coloured", views_of_different_images):
        sys.exit(main(sys.argv[1:]))
