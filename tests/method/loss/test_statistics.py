"""What a log line says of the embeddings, against the definitions with the whole matrix."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ranks
from simclr_dist.method.distributed import World
from simclr_dist.method.loss.statistics import embedding_statistics


def _pair(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    z_a = torch.randn(n, 16, generator=generator)
    return z_a, z_a + 0.9 * torch.randn(n, 16, generator=generator)


def _definitions(z_a: Tensor, z_b: Tensor) -> dict[str, float]:
    z = F.normalize(torch.cat([z_a, z_b]).double(), dim=1)
    rows = torch.arange(len(z))
    partner = rows.roll(len(z_a))
    cosines = z @ z.T
    negative = torch.ones_like(cosines, dtype=torch.bool)
    negative[rows, rows] = negative[rows, partner] = False
    positive = cosines[rows, partner]
    nearer = ((cosines >= positive[:, None]) & negative).sum(1)
    distances = torch.cdist(z, z).square()
    singular = torch.linalg.svdvals(z)
    shares = singular / singular.sum()
    return {
        "similarity/positive": positive.mean().item(),
        "similarity/negative": cosines[negative].mean().item(),
        "retrieval/top1": (nearer < 1).double().mean().item(),
        "retrieval/top5": (nearer < 5).double().mean().item(),
        "embedding/alignment": distances[rows, partner].mean().item(),
        "embedding/uniformity": (-2 * distances[negative]).exp().mean().log().item(),
        "embedding/effective_rank": math.exp(-(shares * shares.log()).sum().item()),
    }


@pytest.mark.parametrize("n", [2, 7, 700])
def test_they_are_what_they_are_called(n: int) -> None:
    expected = _definitions(*_pair(n))
    found = embedding_statistics(*_pair(n))
    assert list(found) == list(expected)
    for name, value in expected.items():
        # A rank one short of full has a singular value that is 0 but for rounding.
        assert found[name] == pytest.approx(value, rel=1e-3 if n == 2 and "rank" in name else 1e-5, abs=1e-6), name
    if n == 700:
        assert 0.1 < found["retrieval/top1"] < found["retrieval/top5"] < 0.99, "an easy case would hide a mistake"


@pytest.mark.parametrize("seed", range(8))
def test_collapse_shows(seed: int) -> None:
    """Whatever the one vector is: the same cosine comes out of two sums, and rounds differently."""
    z = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed)).expand(100, 128)
    found = embedding_statistics(z, z)
    assert found["embedding/effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["retrieval/top1"] == found["retrieval/top5"] == 0
    assert found["embedding/uniformity"] == pytest.approx(0, abs=1e-5)


def test_one_image_and_bad_values() -> None:
    alone = embedding_statistics(torch.ones(1, 4), torch.ones(1, 4))
    assert math.isnan(alone["similarity/negative"])
    assert alone["retrieval/top1"] == 1
    bad = embedding_statistics(torch.full((4, 4), torch.nan), torch.ones(4, 4))
    assert math.isnan(bad["embedding/effective_rank"])
    assert math.isnan(bad["similarity/positive"])
    assert bad["retrieval/top1"] == 0


def _on_ranks(world: World) -> dict[str, float]:
    z_a, z_b = _pair(60)
    mine = slice(world.rank * 20, world.rank * 20 + 20)
    return embedding_statistics(z_a[mine], z_b[mine])


def test_they_are_of_the_global_batch() -> None:
    alone = embedding_statistics(*_pair(60))
    for found in ranks.run(_on_ranks, 3):
        for name, value in alone.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
