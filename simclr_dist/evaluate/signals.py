"""Measure an encoder's features without labels, and training batches by their labels.

On one process: whoever calls it has all features. A similarity matrix of all pairs never exists.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_dist.evaluate.rows import unit_copy
from simclr_dist.method.loss.statistics import rank_me
from simclr_dist.method.loss.tiles import unit_rows
from simclr_dist.system.errors import ConfigError

# 80 copies planted among 320 photos (JPEG of quality 50; 2 % cut off all round and half as large), by two short SimCLR runs:
# at .95 they find 97 and 82 % of the pairs of copies with 1 and 0 false ones of 80,000, at .98 they find 78 and 52 %. Features
# with a large common part, as an untrained network's, have nearly all pairs above either: `mean_cosine` shows it.
DUPLICATE_COSINE = 0.95

_CHUNK = 8192  # rows that are turned into float64 at a time
_TILE = 1024  # rows and columns of a tile of similarities
_CUDA_TILES = 8  # so many times as many on a GPU


class Pairs(NamedTuple):
    """Statistics of all pairs of images. `duplicates` counts the near-duplicates; `nearest` are the nearest of those.

    `nearest` holds (row, later row, cosine), the largest cosine first. Where it has no place for all of equal cosines,
    the choice is arbitrary but fixed. `cosine` is each row's with its nearest, float32 [n].
    """

    mean_cosine: float
    uniformity: float
    duplicates: int
    nearest: tuple[tuple[int, int, float], ...]
    cosine: Tensor


class FalseNegatives(NamedTuple):
    """Negatives of their anchor's class, in batches drawn without replacement: see `false_negatives`."""

    share: float
    images: float
    anchors: float


def signals(h: Tensor) -> dict[str, Any]:
    """Measure all label-free signals of features [n, d], as JSON takes them. None for what so few images do not have."""
    compared = pairs(h)
    return {
        "images": len(h), "feature_size": h.shape[1], "zero_features": int((h == 0).all(dim=1).sum()),
        "effective_rank": _json(effective_rank(h)),
        "mean_cosine": _json(compared.mean_cosine), "uniformity": _json(compared.uniformity),
        "near_duplicates": {"threshold": DUPLICATE_COSINE, "pairs": compared.duplicates},
    }  # fmt: skip


def flat(measured: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested signals to one level. They are named like "views: alignment". Lists are for the JSON file."""
    level: dict[str, Any] = {}
    for name, value in measured.items():
        if isinstance(value, Mapping):
            level |= flat(value, f"{before}{name}: ")
        elif not isinstance(value, list):
            level[before + name] = value
    return level


def meanings(measured: Mapping[str, Any]) -> dict[str, str]:
    """Say how to read the values, by `flat` name. Names are of `signals` and `view_signals`; some need no words.

    Alignment and uniformity: Wang and Isola 2020, whose minimum is what random directions have; effective rank: RankMe,
    Garrido et al. 2023. They show collapse; a better value is no better encoder (docs/choosing.md has the correlations).
    """
    n, d = measured["images"], measured["feature_size"]
    uniformity = f"0 is collapse (all alike); random directions {random_uniformity(d):.2f}"
    return {
        "zero_features": "0 is good: of such an image the features say nothing",
        "effective_rank": f"1 is collapse (all on one line); more is no better encoder; at most {min(n, d)}",
        "mean_cosine": "1 is collapse (all alike); 0 for random directions",
        "uniformity": f"{uniformity}, above which most features without negative numbers (h) stay",
        "near_duplicates: pairs": f"of {n * (n - 1) // 2}; as many as there are copies; of no use if the mean cosine is near 1",
        "views: alignment": "0 where views are alike, 2 for random directions; near 0 beside a uniformity near 0 is collapse",
        "views: uniformity": uniformity,
        "false_negatives: share": "lower is better: of a batch's negatives, those of the anchor's own class",
        "false_negatives: anchors": "lower is better: of a batch's anchors, those with such a negative, up to 1",
    }


def random_uniformity(d: int) -> float:
    """Return the uniformity of random directions: about -4 + 8 / d. They are independent, in d dimensions.

    The mean of exp(4 t) over the sphere, t the cosine, is 0F1(; d / 2; 4), as in von Mises-Fisher's norm. This is its series.
    """
    term = total = 1.0
    for k in range(1, 60):
        term *= 4 / (k * (d / 2 + k - 1))
        total += term
    return math.log(total) - 4


def view_signals(h_a: Tensor, h_b: Tensor) -> dict[str, Any]:
    """Measure two views of n images: `alignment` and `uniformity`. Features are [n, d]; uniformity (see `pairs`) is of `h_a`.

    SimCLR's loss weighs the two (Wang and Isola 2020). Low values are good. But where uniformity is near 0 too, it is collapse.
    """
    uniformity = pairs(h_a).uniformity
    return {"images": len(h_a), "alignment": _json(alignment(h_a, h_b)), "uniformity": _json(uniformity)}


def effective_rank(h: Tensor) -> float:
    """Compute `loss.statistics.rank_me` of features [n, d] as they are.

    From 1 (all features on one line) to min(n, d). In float64 from the d x d Gram matrix, whose rounding leaves some
    1e-8 of the largest singular value in place of a zero. NaN where every feature is zero.
    """
    gram = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64, device=h.device)
    for part in h.split(_CHUNK):
        part = part.double()
        gram.addmm_(part.T, part)
    return float(rank_me(gram))


def alignment(h_a: Tensor, h_b: Tensor) -> float:
    """Compute the mean squared distance of the features of two views. They are [n, d], normalised, of the same images.

    Wang and Isola 2020. 0 where views do not matter, 2 where an image's views have nothing in common. In float64.
    """
    assert h_a.shape == h_b.shape, "two views of the same images"
    total = torch.zeros((), dtype=torch.float64, device=h_a.device)
    for a, b in zip(h_a.split(_CHUNK), h_b.split(_CHUNK), strict=True):
        total += (unit_rows(a.double()) - unit_rows(b.double())).square().sum()
    return float(total / len(h_a))


def pairs(h: Tensor, others: Tensor | None = None, *, threshold: float = DUPLICATE_COSINE, listed: int = 0) -> Pairs:
    """Compare all pairs of features [n, d], exactly. The n (n - 1) / 2 cosines come a tile at a time.

    With `others` [m, d] the pairs are the n m of a row and one of those.

    `mean_cosine` and `uniformity` are NaN for fewer than two images. Uniformity is the log of the mean over pairs of
    exp(-2 distance^2) of normalised features (Wang and Isola 2020): 0 when all are one point, about -4 when they fill a
    sphere of many dimensions. A pair is a near-duplicate when its cosine (in float32, good to some 1e-6) is above
    `threshold`; `duplicates` counts all of them, and the `listed` nearest are in `nearest`. A feature of zeros has the cosine
    0 with every other.
    """
    z = unit_copy(h)
    columns = z if others is None else unit_copy(others)
    largest = z.new_full((len(z),), -torch.inf)
    spread = torch.zeros((), dtype=torch.float64, device=z.device)
    duplicates = torch.zeros((), dtype=torch.int64, device=z.device)
    best: list[Tensor] = [z.new_empty(0), *(torch.empty(0, dtype=torch.int64, device=z.device) for _ in range(2))]
    for top, left, tile in _tiles(z, columns):
        for first, values in ((top, tile.amax(1)), (left, tile.amax(0)))[: 1 + (columns is z)]:
            rows = largest[first : first + len(values)]
            torch.maximum(rows, values, out=rows)
        row, column = (tile > threshold).nonzero(as_tuple=True)
        duplicates += len(row)
        cosine = tile[row, column]
        if len(best[0]) == listed:  # then an equal one comes too late
            nearer = cosine > (best[0][-1] if listed else torch.inf)
            row, column, cosine = row[nearer], column[nearer], cosine[nearer]
        if len(row):
            merged = [torch.cat(part) for part in zip(best, (cosine, row + top, column + left), strict=True)]
            order = merged[0].argsort(descending=True, stable=True)[:listed]
            best = [part[order] for part in merged]
        spread += tile.sub_(1).mul_(4).exp_().sum(dtype=torch.float64)  # |a - b|^2 = 2 - 2 a.b; exp(-inf) is 0
    count = len(z) * (len(z) - 1) // 2 if columns is z else len(z) * len(columns)
    if not count:
        return Pairs(math.nan, math.nan, 0, (), largest)
    sums = [torch.stack([part.double().sum(0) for part in one.split(_CHUNK)]).sum(0) for one in (z, columns)]
    itself = sum(float(part.double().square().sum()) for part in z.split(_CHUNK))
    mean = float(sums[0] @ sums[1])
    mean = (mean - itself) / (2 * count) if columns is z else mean / count
    nearest = sorted(zip(*(part.tolist() for part in best), strict=True), key=lambda pair: (-pair[0], pair[1], pair[2]))
    best_pairs = tuple((a, b, cosine) for cosine, a, b in nearest)
    return Pairs(mean, float((spread / count).log()), int(duplicates), best_pairs, largest)


def false_negatives(label: Tensor, batch: int) -> FalseNegatives:
    """Compute the expected negatives that show their anchor's class. Batches of `batch` images are drawn without replacement.

    Of `label` int64 [n], -1 for none (such images are left out). `share`: the probability that a negative has its anchor's
    class, sum_c n_c (n_c - 1) / (n (n - 1)), which does not depend on the batch; `images`: how many of the batch's other
    images have it, (batch - 1) * share; `anchors`: the share of anchors that have one or more such,
    1 - sum_c n_c / n * C(n - n_c, batch - 1) / C(n - 1, batch - 1). Exact up to rounding.

    Raises ConfigError for a batch below 2, or larger than the number of labelled images.
    """
    counts = label[label >= 0].unique(return_counts=True)[1].tolist()
    n = sum(counts)
    if not 2 <= batch <= n:
        raise ConfigError(f"batch: {batch}: must be from 2 to the number of labelled images, {n}")
    share = sum(c * (c - 1) for c in counts) / (n * (n - 1))
    none = sum(times * c / n * _ratio(n - c, n - 1, batch - 1) for c, times in Counter(counts).items())
    return FalseNegatives(share, (batch - 1) * share, 1 - none)


def _tiles(z: Tensor, others: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, first column, cosines) of each tile. Of `z` with itself, -inf except row < column."""
    side = _TILE * (_CUDA_TILES if z.is_cuda else 1)
    for top in range(0, len(z), side):
        for left in range(top if others is z else 0, len(others), side):
            tile = z[top : top + side] @ others[left : left + side].T
            if others is z and left == top:
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril(), -torch.inf)
            yield top, left, tile


def _ratio(a: int, b: int, k: int) -> float:
    """Compute C(a, k) / C(b, k) for a <= b."""
    return math.exp(math.fsum(math.log1p((a - b) / (b - i)) for i in range(k))) if k <= a else 0.0


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
