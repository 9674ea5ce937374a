"""Measure a step's embeddings. How near partners are, how spread the rest, how many dimensions are in use."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simclr_dist.method.distributed import all_sum, rank
from simclr_dist.method.loss.tiles import Similarities, gather_views, unit_rows

Cut = Callable[[Tensor], Sequence[Tensor]]


@torch.no_grad()
def embedding_statistics(z_a: Tensor, z_b: Tensor, cut: Cut = lambda z: [z]) -> dict[str, float]:
    """Compute the global batch's statistics from each rank's [n, d] views. The same on every rank.

    similarity/positive and /negative are mean cosines; retrieval/top1 and /top5 the shares of anchors whose partner is among
    the one or five nearest (a tie counts against it: collapsed embeddings find nothing); embedding/alignment the mean squared
    distance of partners and /uniformity the log of the mean exp(-2 distance^2) of negatives (Wang and Isola 2020);
    embedding/effective_rank is `rank_me`. One walk over the tiles, no matrix. `cut` gives the parts of a view that are
    computed one by one.
    """
    parts = [unit_rows(torch.cat(views).float()) for views in zip(cut(z_a), cut(z_b), strict=True)]
    columns = gather_views(parts)
    n = len(parts[0]) // 2
    firsts = (rank() * len(parts) + number for number in range(len(parts)))
    sums = all_sum(*(_sums(Similarities(z, columns, first * n, 1.0)) for z, first in zip(parts, firsts, strict=True)))
    positives, first, fifth, spread = sums
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


def _sums(similarities: Similarities) -> Tensor:
    """Sum over z's rows. Float64 [4]: positives; anchors with no negative nearer, with fewer than five; exp(-2 distance^2)."""
    z = similarities.z
    positive = (z * z.roll(len(z) // 2, 0)).sum(1)
    nearly = positive - 1e-5  # rounding must not hide a tie; NaN is never below
    before = torch.zeros_like(positive)  # how many negatives are as near as the partner
    spread = torch.zeros((), dtype=torch.float64, device=z.device)
    for rows, others, mirrored, tile in similarities.tiles():
        before[rows] += (~(tile < nearly[rows, None])).sum(1)
        if mirrored:
            before[others] += (~(tile < nearly[None, others])).sum(0)
        spread += tile.sub_(1).mul_(4).exp_().sum() * (2 if mirrored else 1)  # |a - b|^2 = 2 - 2 a.b
    return torch.stack([positive.double().sum(), (before < 1).double().sum(), (before < 5).double().sum(), spread])


def rank_me(gram: Tensor) -> Tensor:
    """Compute RankMe of features z (Garrido et al. 2023). `gram` is z.T @ z [d, d], float64.

    It is exp of the entropy of the normalised singular values. NaN where one is not finite, or all are zero.
    """
    values = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()  # eigvalsh refuses what is not finite
    shares = values / values.sum() + 0 * gram.sum()
    return torch.exp(-(torch.special.xlogy(shares, shares)).sum())
