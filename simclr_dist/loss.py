"""NT-Xent (Chen et al. 2020, equation 1) over the global batch, without the 2N x 2N matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.distributed import all_gather, rank, world_size

_TILE_BYTES = 64 * 2**20


def nt_xent_reference(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """The definition, for one process, with the whole matrix: the oracle of the tests.

    Shapes: z_a, z_b float [n, d], rows i are the two views of image i. Returns the mean over the 2n anchors.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(similarity, positive)


class NTXentLoss(nn.Module):
    """NT-Xent over the embeddings of all ranks.

    Each rank passes its own n images' embeddings (the same n on every rank); each of the 2N anchors of the global batch
    has its partner as positive and 2(N - 1) negatives. The value is the global mean, the same on every rank. The gradient
    carries a factor world_size, so that the average which DDP takes over ranks is the gradient of that mean: the gradient
    of one process that holds the whole batch. Computed in float32 (float64 stays) whatever autocast says.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """z_a, z_b: float [n, d], row i of each a view of image i; need not be normalised. Returns a scalar."""
        with torch.autocast(z_a.device.type, enabled=False):
            z = torch.cat([z_a, z_b])
            z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
            loss: Tensor = _NTXent.apply(z, self.temperature)
            return loss


class _NTXent(torch.autograd.Function):
    """Mean NT-Xent of normalised rows; local rows against gathered columns, a tile of rows at a time.

    The gradient of row i, with l_i = softplus(L_i - p_i), L_i the log-sum-exp over the negatives of i, p_i its positive's
    logit and a_i = sigmoid(L_i - p_i), is

        dl/dz_i = 1/(2N tau) * (sum_j [a_i exp(s_ij - L_i) + a_j exp(s_ij - L_j)] z_j - (a_i + a_pos) z_pos)

    so once every rank knows L and a of all rows, each has the whole gradient of its own rows, and the backward needs no
    collective. Summing over negatives only keeps the digits that 1 - softmax loses once the loss is small.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        n = len(z) // 2
        # [W, 2, n, d] -> [2, W, n, d]: columns in the order of the global batch, view a then view b.
        columns = all_gather(z.view(2, n, -1)).transpose(0, 1).reshape(-1, z.shape[1])
        total = len(columns) // 2
        local = torch.arange(n, device=z.device) + rank() * n
        own = torch.cat([local, local + total])  # this rank's rows among the columns
        partner = own.roll(n)
        positive = (z * z.roll(n, 0)).sum(1) / temperature
        tile = max(1, _TILE_BYTES // (len(columns) * z.element_size()))

        def negatives(rows: slice) -> Tensor:
            logits = z[rows] @ columns.T / temperature
            logits.scatter_(1, torch.stack([own[rows], partner[rows]], 1), -torch.inf)
            return logits

        tiles = [slice(i, i + tile) for i in range(0, 2 * n, tile)]
        lse = torch.cat([negatives(rows).logsumexp(1) for rows in tiles])
        lse = lse.clamp_min(torch.finfo(z.dtype).min / 2)  # one image has no negatives: loss and gradient are 0, not nan
        log_a = F.logsigmoid(lse - positive)
        anchors = all_gather(torch.stack([F.softplus(lse - positive), log_a - lse]).view(2, 2, n))
        losses, offset = anchors.permute(1, 2, 0, 3).reshape(2, -1)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(z)
            for rows in tiles:
                logits = negatives(rows)
                weights = torch.exp(logits + (log_a - lse)[rows, None]) + torch.exp(logits + offset)
                gradient[rows] = weights @ columns
            a = log_a.exp()
            gradient -= (a + a.roll(n))[:, None] * z.roll(n, 0)
            gradient *= world_size() / (len(columns) * temperature)
        ctx.save_for_backward(gradient)
        loss: Tensor = losses.mean()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None
