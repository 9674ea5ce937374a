"""Weighted nearest-neighbour classification of frozen features: a quality measure with nothing to train."""

import torch
from torch import Tensor

from simclr_dist.evaluate.options import TEMPERATURE, K

# Weights become integers before they are summed, so that a vote does not depend on the order of the sum (atomics on a
# GPU add in any order). 2**40 leaves 20 bits for the number of neighbours.
_WEIGHT_ONE = 2**40
_SIMILARITIES_AT_ONCE = 2**25


def weighted_knn(
    train_h: Tensor, train_y: Tensor, test_h: Tensor, *, k: int = K, temperature: float = TEMPERATURE, classes: int
) -> Tensor:
    """The class of each test row by a weighted vote of its k nearest training rows.

    Cosine similarity s, weight exp(s / temperature): Wu et al. 2018 (InstDisc), section 3.4. The protocol has k=200 and
    temperature 0.1 (the paper's 0.07 in its own code). k is limited to the number of training rows. Equally near rows
    are taken in the order of their index, equal votes go to the lower class.

    Args:
        train_h: [n, d] float features; float64 stays float64, anything else is computed in float32.
        train_y: [n] int64 labels in [0, classes).
        test_h: [m, d], on the device of train_h.

    Returns:
        [m] int64 predicted classes, on the device of the features.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got k={k} and temperature={temperature}")
    if len(train_h) == 0:
        raise ValueError("there are no training rows to vote")
    dtype = torch.float64 if train_h.dtype == torch.float64 else torch.float32
    keys = torch.nn.functional.normalize(train_h.to(dtype), dim=1)
    labels = train_y.to(train_h.device)
    k = min(k, len(keys))
    predictions = [torch.empty(0, dtype=torch.int64, device=train_h.device)]
    for queries in test_h.split(max(1, _SIMILARITIES_AT_ONCE // len(keys))):
        similarity = torch.nn.functional.normalize(queries.to(dtype), dim=1) @ keys.T
        nearest, index = _nearest(similarity, k)
        weight = ((nearest - nearest[:, :1]) / temperature).double().exp()  # relative to the nearest: exp cannot overflow
        votes = torch.zeros(len(queries), classes, dtype=torch.int64, device=keys.device)
        votes.scatter_add_(1, labels[index], (weight * _WEIGHT_ONE).round().long())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, descending, and their columns; of equal ones the leftmost."""
    values, index = similarity.topk(k, dim=1)
    tied = (similarity >= values[:, -1:]).sum(dim=1) > k  # topk is free to choose among these
    if bool(tied.any()):
        ordered, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = ordered[:, :k], order[:, :k]
    return values, index
