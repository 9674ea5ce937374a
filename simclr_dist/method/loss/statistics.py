"""Measure a step's embeddings. How near partners are, how spread the rest, how many dimensions are in use."""

import torch
from torch import Tensor

from simclr_dist.method.distributed import all_sum, rank
from simclr_dist.method.loss.tiles import Similarities, gather_views, unit_rows


@torch.no_grad()
def embedding_statistics(z_a: Tensor, z_b: Tensor) -> dict[str, float]:
    """Compute the global batch's statistics from each rank's [n, d] views. The same on every rank.

    similarity/positive and /negative are mean cosines; retrieval/top1 and /top5 the shares of anchors whose partner is among
    the one or five nearest (a tie counts against it: collapsed embeddings find nothing); embedding/alignment the mean squared
    distance of partners and /uniformity the log of the mean exp(-2 distance^2) of negatives (Wang and Isola 2020);
    embedding/effective_rank is `rank_me`. One walk over the tiles, no matrix.
    """
    n = len(z_a)
    z = unit_rows(torch.cat([z_a, z_b]).float())
    columns = gather_views(z)
    positive = (z * z.roll(n, 0)).sum(1)
    nearly = positive - 1e-5  # rounding must not hide a tie; NaN is never below
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
    norms = columns.square().sum()
    negatives = (columns.sum(0).square().sum() - norms - positives) / (anchors * (anchors - 2) or torch.nan)
    statistics = {
        "similarity/positive": positives / anchors,
        "similarity/negative": negatives,
        "retrieval/top1": first / anchors,
        "retrieval/top5": fifth / anchors,
        "embedding/alignment": 2 - 2 * positives / anchors,
        "embedding/uniformity": (spread / (anchors * (anchors - 2) or torch.nan)).log(),
        "embedding/effective_rank": rank_me(columns.T @ columns),
    }
    return dict(zip(statistics, torch.stack([*statistics.values()]).tolist(), strict=True))


def rank_me(gram: Tensor) -> Tensor:
    """Compute RankMe of features z (Garrido et al. 2023). `gram` is z.T @ z [d, d], float64.

    It is exp of the entropy of the normalised singular values. NaN where one is not finite, or all are zero.
    """
    values = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()  # eigvalsh refuses what is not finite
    shares = values / values.sum() + 0 * gram.sum()
    return torch.exp(-(torch.special.xlogy(shares, shares)).sum())
