"""Run the paper's linear evaluation by SGD. A classifier learns from features of randomly cropped and flipped training images.

SimCLR (Chen et al. 2020), appendix B.6 with the settings of B.5 that it builds on: Nesterov momentum 0.9, learning rate
0.1 x B / 256 without warm-up, 90 epochs, no weight decay or other regularisation, random crops and flips for training, one
plain view for testing, features as they are. The paper names no decay of the learning rate: the cosine to zero over all
steps is its published code's, and so is the classifier that starts from zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from simclr_dist.evaluate.protocols.scores import Predict, top1
from simclr_dist.evaluate.settings import Settings
from simclr_dist.method.optim import learning_rate

BATCH_SIZE = 512  # of the published code for CIFAR-10; on ImageNet 4096
BASE_LR = 0.1
MOMENTUM = 0.9
_ROWS_AT_ONCE = 8192

EpochFeatures = Callable[[int], tuple[Tensor, Tensor]]


def sgd_probe(
    train: EpochFeatures,
    *,
    classes: int,
    epochs: int = Settings.sgd_epochs,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> tuple[Predict, dict[str, Any]]:
    """Train the classifier.

    Args:
        train: gives, for an epoch's number from 0, the features [n, d] of newly drawn views of all training images and
            their labels [n] int64 in [0, classes).
        batch_size: at most; of fewer training rows, all of them.
        seed: of the order of the rows. The caller seeds its crops.

    Returns:
        The classifier after its last epoch, from test rows [m, d] on the device of the training features to float32 logits
        [m, classes], and a dict of plain values: the settings,
        `paper_epochs`, `as_in_paper` (90 epochs), `steps`, `loss` (mean over the last epoch) and
        `train_top1` in percent (of the last epoch's rows, by the final classifier).
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got epochs={epochs} and batch_size={batch_size}")
    fit = _fit(train, classes, epochs, batch_size, seed)
    info = {
        "epochs": epochs, "paper_epochs": Settings.sgd_epochs, "as_in_paper": epochs == Settings.sgd_epochs,
        "views": "new in every epoch",
        "batch_size": fit.batch_size, "lr": fit.lr, "schedule": "cosine to 0, no warm-up",
        "momentum": MOMENTUM, "nesterov": True, "weight_decay": 0.0,
        "features": "as they are",
        "seed": seed, "steps": fit.steps, "loss": fit.loss, "train_top1": fit.train_top1,
    }  # fmt: skip
    return fit.logits, info


class _Fit(NamedTuple):
    """Classifier [classes, d] and bias [classes] after the last step. The other fields say how it came to be."""

    weight: Tensor
    bias: Tensor
    batch_size: int
    lr: float
    steps: int
    loss: float
    train_top1: float

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        return torch.cat([linear(rows.float(), self.weight, self.bias) for rows in h.split(_ROWS_AT_ONCE)])


def _fit(draw: EpochFeatures, classes: int, epochs: int, batch_size: int, seed: int) -> _Fit:
    """Go through all rows once an epoch. Batch sizes differ by one at most: no small last one takes a full step."""
    h, y = draw(0)
    if len(h) == 0:
        raise ValueError("there are no training rows to fit")
    device, batches = h.device, -(-len(h) // batch_size)
    batch_size = min(batch_size, len(h))
    lr, steps = BASE_LR * batch_size / 256, epochs * batches
    weight = torch.zeros(classes, h.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=MOMENTUM, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    step, total = 0, torch.zeros((), device=device)
    for epoch in range(epochs):
        if epoch > 0:
            h, y = draw(epoch)
        y, total = y.to(device), torch.zeros_like(total)
        for rows in torch.randperm(len(h), generator=generator).tensor_split(batches):
            rows = rows.to(device)
            optimizer.param_groups[0]["lr"] = learning_rate(step, peak=lr, warmup_steps=0, total_steps=steps)
            loss = cross_entropy(linear(h[rows].float(), weight, bias), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
            step += 1
    fit = _Fit(weight, bias, batch_size, lr, steps, float(total) / len(h), 0.0)
    return fit._replace(train_top1=top1(fit.logits, h, y, classes))
