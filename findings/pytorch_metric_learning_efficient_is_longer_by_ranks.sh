#!/usr/bin/env bash
# pytorch-metric-learning's DistributedLossWrapper gathers the embeddings of all ranks, so that a loss sees all negatives. Behind DDP its
# plain form gives exactly the gradient of one process that holds the whole batch. With efficient=True the documentation says that
# loss and gradients differ. It does not say how: nothing flows through the other ranks' embeddings, which turns the gradient a little,
# AND it is about as many times longer as there are ranks. So a learning rate that was tuned on one process is W times too high on W
# for optimizers that feel the gradient's length, and clipping by norm sets in W times earlier.
#
# Seen with pytorch-metric-learning 2.9.0 and torch 2.14.1 on 2 CPU processes (gloo). Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 pytorch-metric-learning==2.9.0

cat >ranks.py <<'EOF_PYTHON'
import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import NTXentLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
images = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
labels = torch.arange(32).repeat(2)  # rows i and i + 32 are the two views of image i
mine = torch.cat([torch.arange(32).chunk(ranks)[rank] + view for view in (0, 32)])


def gradient(loss, rows, parallel):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)).double()
    forward = DistributedDataParallel(model) if parallel else model
    loss(forward(images[rows]), labels[rows]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


truth = gradient(NTXentLoss(0.1), slice(None), parallel=False)
for efficient in (False, True):
    found = gradient(DistributedLossWrapper(NTXentLoss(0.1), efficient=efficient), mine, parallel=True)
    cosine = float(found @ truth / (found.norm() * truth.norm()))
    length = float(found.norm() / truth.norm())
    if rank == 0:
        print(f"efficient={efficient}: cosine {cosine:.3f}, length {length:.3f} of one process's")
    if efficient:
        assert 0.9 < cosine < 0.9999 and 0.9 * ranks < length < 1.1 * ranks
    else:
        assert abs(cosine - 1) < 1e-9 and abs(length - 1) < 1e-9
dist.destroy_process_group()
EOF_PYTHON
venv/bin/torchrun --standalone --nproc-per-node 2 ranks.py
echo "as described: about as many times the length as there are ranks"
