"""What the embeddings of a step look like: how near partners are, how spread the rest, how many dimensions are in use."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.method.distributed import all_sum, rank
from simclr_dist.method.loss.tiles import Similarities, gather_views


@torch.no_grad()
def embedding_statistics(z_a: Tensor, z_b: Tensor) -> dict[str, float]:
    """Of the global batch, from each rank's [n, d] views; the same on every rank. One walk over the tiles, no matrix.

    similarity/positive and /negative are mean cosines; retrieval/top1 and /top5 the shares of anchors whose partner is among
    the one or five nearest (a tie counts against it: collapsed embeddings find nothing); embedding/alignment the mean squared
    distance of partners and /uniformity the log of the mean exp(-2 distance^2) of negatives (Wang and Isola 2020);
    embedding/effective_rank is `rank_me`.
    """
    n = len(z_a)
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)
    columns = gather_views(z)
    positive = (z * z.roll(n, 0)).sum(1)
    nearly = positive - 1e-5  # a tie is one also where rounding hides it; what is not a number is never below
    before = torch.zeros_like(positive)  # how many negatives are as near as the partner
    spread = torch.zeros((), dtype=torch.float64, device=z.device)
    for rows, others, mirrored, tile in Similarities(z, columns, rank() * n, 1.0).tiles():
        before[rows] += (~(tile < nearly[rows, None])).sum(1)
        if mirrored:
            before[others] += (~(tile < nearly[None, others])).sum(0)
        spread += tile.sub_(1).mul_(4).exp_().sum() * (2 if mirrored else 1)  # |a - b|^2 = 2 - 2 a.b
    sums = torch.stack([positive.double().sum(), (before < 1).double().sum(), (before < 5).double().sum(), spread])
    positives, first, fifth, spread = all_sum(sums)
    anchors = len(columns)
    columns = columns.double()
    own = columns.square().sum()
    negatives = (columns.sum(0).square().sum() - own - positives) / (anchors * (anchors - 2) or torch.nan)
    found = {
        "similarity/positive": positives / anchors,
        "similarity/negative": negatives,
        "retrieval/top1": first / anchors,
        "retrieval/top5": fifth / anchors,
        "embedding/alignment": 2 - 2 * positives / anchors,
        "embedding/uniformity": (spread / (anchors * (anchors - 2) or torch.nan)).log(),
        "embedding/effective_rank": rank_me(columns.T @ columns),
    }
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))


def rank_me(gram: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023) of features z by their Gram matrix z.T @ z [d, d], float64.

    exp of the entropy of the normalised singular values. NaN where one is not finite, or all are zero.
    """
    values = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()  # which refuses what is not finite
    shares = values / values.sum() + 0 * gram.sum()
    return torch.exp(-(torch.special.xlogy(shares, shares)).sum())
