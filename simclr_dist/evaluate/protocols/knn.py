"""Classify frozen features by weighted nearest neighbours. This quality measure has nothing to train."""

from collections.abc import Iterable

import torch
from torch import Tensor

from simclr_dist.evaluate.space import IN_MEMORY_BYTES
from simclr_dist.method.loss.tiles import unit_rows

# Weights become integers before they are summed, so that a vote does not depend on the order of the sum (atomics on a
# GPU add in any order). 2**40 leaves 20 bits for the number of neighbours.
_WEIGHT_ONE = 2**40
_SIMILARITIES_AT_ONCE = 2**25
_KEYS_AT_ONCE = 8192
TEMPERATURE = 0.1
GRID = {"k": (10, 20, 50, 100, 200), "temperature": (0.03, 0.07, 0.1, 0.2, 0.5)}  # that validation images choose from
MOST_NEIGHBOURS = 200  # the protocol's k; of few images it would be nearly all, and 256 of CIFAR-10 lose 4 to 6 points to 20


def neighbours(k: int | None, rows: int) -> int:
    """Return the k that is used of `rows` training rows. Without a `k`: a twentieth of them, from 10 to `MOST_NEIGHBOURS`."""
    return min(k or max(10, min(MOST_NEIGHBOURS, rows // 20)), rows)


def weighted_knn(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    *,
    k: int = MOST_NEIGHBOURS,
    temperature: float = TEMPERATURE,
    classes: int,
) -> Tensor:
    """Count the votes of each test row's k nearest training rows. There is a column for each class.

    Cosine similarity s, weight exp(s / temperature): Wu et al. 2018 (InstDisc), section 3.4. The protocol has k=200 and
    temperature 0.1 (the paper's 0.07 in its own code). k is limited to the number of training rows. Equally near rows
    are taken in the order of their index. The class with most votes is the prediction. Of equal votes it is
    the lower class (`argmax`, and `score`, which ranks all classes so).

    Args:
        train_h: [n, d] float features; float64 stays float64, anything else is computed in float32. Many are taken in parts.
        train_y: [n] int64 labels in [0, classes).
        test_h: [m, d], on the device of train_h.

    Returns:
        [m, classes] int64 votes, in units of 2**-40 of the nearest row's own, on the device of the features.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got k={k} and temperature={temperature}")
    if len(train_h) == 0:
        raise ValueError("there are no training rows to vote")
    dtype = torch.float64 if train_h.dtype == torch.float64 else torch.float32
    labels, k = train_y.to(train_h.device), min(k, len(train_h))
    votes = torch.zeros(len(test_h), classes, dtype=torch.int64, device=train_h.device)
    few = len(train_h) * train_h.shape[1] * dtype.itemsize <= IN_MEMORY_BYTES
    keys = [unit_rows(train_h.to(dtype))] if few else train_h.split(_KEYS_AT_ONCE)
    rows_at_once = max(1, _SIMILARITIES_AT_ONCE // len(keys[0]))
    for queries, counted in zip(test_h.split(rows_at_once), votes.split(rows_at_once), strict=True):
        parts = keys if few else (unit_rows(part.to(dtype)) for part in keys)
        nearest, index = nearest_of_parts(unit_rows(queries.to(dtype)), parts, k)
        weight = ((nearest - nearest[:, :1]).double() / temperature).exp()  # relative to the nearest: exp cannot overflow
        counted.scatter_add_(1, labels[index], (weight * _WEIGHT_ONE).round().long())
    return votes


def nearest_of_parts(queries: Tensor, parts: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest keys, all of norm 1. `parts` are all keys in order.

    Returns their cosines, descending, and their rows. Of equally near ones the earlier rows come first.
    """
    nearest, index, first = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64), 0
    index = index.to(queries.device)
    for keys in parts:
        values, columns = _nearest(queries @ keys.T, min(k, len(keys)))
        nearest, index = torch.cat([nearest, values], dim=1), torch.cat([index, columns + first], dim=1)
        if first:
            nearest, order = nearest.sort(dim=1, descending=True, stable=True)  # earlier rows come first among equals
            nearest, index = nearest[:, :k], index.gather(1, order[:, :k])
        first += len(keys)
    return nearest, index


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, descending, and their columns. Of equal ones the leftmost are taken."""
    if k == similarity.shape[1]:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, index = similarity.topk(k + 1, dim=1)  # one more than k: it shows whether the last place is shared
    tied = values[:, k - 1] == values[:, k]
    values, index = values[:, :k], index[:, :k]
    if bool(tied.any()):  # topk is free to choose among equal values
        ordered, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = ordered[:, :k], order[:, :k]
    return values, index
