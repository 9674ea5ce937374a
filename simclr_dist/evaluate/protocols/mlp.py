"""Train the downstream classifier of the introductory blog. It is a small MLP with dropout on frozen features.

Linear(d, 128), ReLU, dropout 0.2, Linear(128, 128), ReLU, dropout 0.2, Linear(128, classes), Adam with learning rate 1e-4
and cross-entropy, on features as they are. The blog names neither batch size nor epochs; those here are ours. Its listing
never clears the gradients, which sums them up over the whole training; here every step has its own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simclr_dist.evaluate.protocols.scores import Predict, top1
from simclr_dist.evaluate.rows import copied
from simclr_dist.evaluate.settings import Settings

HIDDEN = 128
DROPOUT = 0.2
LR = 1e-4
GRID = (1e-4, 3e-4, 1e-3)  # of learning rates that validation images choose from
BATCH_SIZE = 128
SEEDS = (0, 1, 2)
_ROWS_AT_ONCE = 8192


def mlp_probe(
    train_h: Tensor,
    train_y: Tensor,
    *,
    classes: int,
    epochs: int = Settings.mlp_epochs,
    lr: float = LR,
    batch_size: int = BATCH_SIZE,
    seeds: Sequence[int] = SEEDS,
) -> tuple[list[Predict], dict[str, Any]]:
    """Train one MLP for each seed.

    A seed decides initial weights, order of the rows and dropout; the global random state is left as it was.

    Args:
        train_h: [n, d] features. train_y: [n] int64 labels in [0, classes).
        batch_size: at most; the last batch of an epoch has what is left.

    Returns:
        The MLPs after their last epoch, each from test rows [m, d] on the device of train_h to float32 logits [m, classes],
        to be measured one by one and joined by `scores.spread`, and a dict of plain values: the settings, `steps` of each
        MLP, and for each seed `loss` (mean over the last epoch, with dropout) and `train_top1` (percent, without).
    """
    if epochs < 1 or batch_size < 1 or len(seeds) == 0:
        raise ValueError(f"epochs, batch_size and the number of seeds must be at least 1, got {epochs}, {batch_size}, {seeds}")
    if len(train_h) == 0:
        raise ValueError("there are no training rows to fit")
    device, y = train_h.device, train_y.to(train_h.device)
    x = train_h if train_h.dtype == torch.float32 else copied(train_h, dtype=torch.float32)
    predict: list[Predict] = []
    losses = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for seed in seeds:
            torch.manual_seed(seed)
            network, loss = _fit(x, y, classes, epochs, batch_size, lr)
            predict.append(partial(_logits, network))
            losses.append(loss)
    info = {
        "layers": [x.shape[1], HIDDEN, HIDDEN, classes], "dropout": DROPOUT, "optimizer": "Adam", "lr": lr,
        "features": "as they are", "epochs": epochs, "batch_size": batch_size, "seeds": list(seeds),
        "steps": epochs * -(-len(x) // batch_size), "loss": losses,
        "train_top1": [top1(one, x, y, classes) for one in predict],
    }  # fmt: skip
    return predict, info


def classifier(features: int, classes: int) -> nn.Sequential:
    """Build the blog's `DownstreamClassifier` for features [n, `features`], initialised as torch does."""
    return nn.Sequential(
        nn.Linear(features, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN, classes),
    )  # fmt: skip


def _fit(x: Tensor, y: Tensor, classes: int, epochs: int, batch_size: int, lr: float) -> tuple[nn.Module, float]:
    """Train the network; return it in eval mode, with its loss. That is the last epoch's mean. Uses the global random state."""
    network = classifier(x.shape[1], classes).to(x.device)
    optimizer, total = torch.optim.Adam(network.parameters(), lr=lr), torch.zeros((), device=x.device)
    for _ in range(epochs):
        total = torch.zeros_like(total)
        for rows in torch.randperm(len(x)).split(batch_size):
            rows = rows.to(x.device)
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    return network.eval(), float(total) / len(x)


@torch.no_grad()
def _logits(network: nn.Module, h: Tensor) -> Tensor:
    return torch.cat([network(rows.float()) for rows in h.split(_ROWS_AT_ONCE)])
