"""The control of the first run: the same training, but the two views of a pair come from DIFFERENT images.

If accuracy rose here too, it would come from something else than what SimCLR teaches.
    torchrun --nproc-per-node 2 benchmarks/shuffled_positives.py simclr_dist/demo.yaml --run_folder runs/demo-control
"""

import sys
from unittest import mock

import torch
from torch import Tensor

from simclr_dist import train
from simclr_dist.data.draws import ViewSettings
from simclr_dist.data.steps import Views, two_views


def views_of_different_images(views: Views, settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """View b moves on by one image."""
    view_a, view_b = two_views(views, settings, device)
    return view_a, view_b.roll(1, 0)


if __name__ == "__main__":
    with mock.patch.object(train, "two_views", views_of_different_images):
        sys.exit(train.main(sys.argv[1:]))
