"""Label-free signals and false negatives against plain float64, enumeration and scikit-learn."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import hyp0f1
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from simclr_dist.evaluate import signals as module
from simclr_dist.evaluate.signals import (
    alignment,
    effective_rank,
    false_negatives,
    flat,
    meanings,
    pairs,
    random_uniformity,
    signals,
    view_signals,
)
from simclr_dist.method.loss.statistics import embedding_statistics
from simclr_dist.system.errors import ConfigError


def features(n: int, d: int, seed: int = 0) -> Tensor:
    """As an encoder gives them: not negative, of uneven length."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=random) + 0.5).relu() * torch.rand(n, 1, generator=random).add(0.1)


def cosines(h: Tensor) -> NDArray[np.float64]:
    """Of the pairs row < column, in order."""
    return cosine_similarity(h.double().numpy())[np.triu_indices(len(h), 1)]


@pytest.fixture(params=[7, 1024])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles with an uneven last one, and one."""
    monkeypatch.setattr(module, "_TILE", request.param)
    monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 30), (1, 3)])
@pytest.mark.usefixtures("tile")
def test_effective_rank(n: int, d: int) -> None:
    h = features(n, d)
    values = np.linalg.svd(h.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(h) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_effective_rank_of_what_is_known() -> None:
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.ones(9, 8) * torch.arange(1, 10)[:, None]) == pytest.approx(1, abs=1e-5)
    assert math.isnan(effective_rank(torch.zeros(3, 4)))


@pytest.mark.usefixtures("tile")
def test_alignment() -> None:
    a, b = features(23, 6), features(23, 6, seed=1)
    unit = [h.double().numpy() / np.linalg.norm(h.double().numpy(), axis=1, keepdims=True) for h in (a, b)]
    assert alignment(a, b) == pytest.approx(((unit[0] - unit[1]) ** 2).sum(1).mean(), rel=1e-12)
    assert alignment(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert alignment(a, b) == pytest.approx(embedding_statistics(a, b)["embedding/alignment"], rel=1e-5)  # training's number


@pytest.mark.usefixtures("tile")
def test_uniformity_and_near_duplicates() -> None:
    h = features(50, 4)
    h[31], h[44] = 2 * h[3], h[3]
    expected = cosines(h)
    found = pairs(h, threshold=0.9, listed=10_000)
    assert found.mean_cosine == pytest.approx(expected.mean(), rel=1e-6)
    assert found.uniformity == pytest.approx(np.log(np.exp(4 * (expected - 1)).mean()), rel=1e-6)
    near = expected > 0.9
    assert found.duplicates == near.sum() > 20
    all_pairs = list(itertools.combinations(range(50), 2))
    assert {(a, b) for a, b, _ in found.nearest} == {all_pairs[i] for i in np.flatnonzero(near)}
    assert {(a, b) for a, b, _ in found.nearest[:3]} == {(3, 31), (3, 44), (31, 44)}
    listed = np.array([cosine for _, _, cosine in found.nearest])
    np.testing.assert_allclose(listed, np.sort(expected[near])[::-1], atol=1e-6)


@pytest.mark.usefixtures("tile")
def test_pairs_between_two_sets_and_each_rows_nearest() -> None:
    h, others = features(50, 4), features(31, 4, seed=1)
    unit = [torch.nn.functional.normalize(one.double(), dim=1).numpy() for one in (h, others)]
    expected, within = unit[0] @ unit[1].T, unit[0] @ unit[0].T - 3 * np.eye(50)
    found = pairs(h, others, threshold=0.9, listed=10_000)
    assert found.mean_cosine == pytest.approx(expected.mean(), rel=1e-6)
    assert found.uniformity == pytest.approx(np.log(np.exp(4 * (expected - 1)).mean()), rel=1e-6)
    assert found.duplicates == (expected > 0.9).sum() > 20
    assert {(a, b) for a, b, _ in found.nearest} == set(zip(*map(list, np.nonzero(expected > 0.9)), strict=True))
    np.testing.assert_allclose(found.cosine, expected.max(1), atol=1e-6)
    np.testing.assert_allclose(pairs(h).cosine, within.max(1), atol=1e-6)


@pytest.mark.usefixtures("tile")
def test_only_so_many_are_listed_but_all_are_counted() -> None:
    h = features(50, 4)
    whole, some = pairs(h, threshold=0.5, listed=10_000), pairs(h, threshold=0.5, listed=9)
    assert whole.duplicates == some.duplicates > 100
    assert whole.nearest[:9] == some.nearest
    assert pairs(h, threshold=0.5, listed=0).nearest == ()
    assert pairs(h, threshold=0.5, listed=0).duplicates == whole.duplicates


def test_collapsed_features_and_too_few() -> None:
    found = pairs(torch.ones(3000, 4), listed=5)
    assert found.uniformity == pytest.approx(0, abs=1e-6)
    assert found.duplicates == 3000 * 2999 // 2
    assert len(found.nearest) == 5
    alone = pairs(torch.ones(1, 4))
    assert math.isnan(alone.uniformity)
    assert math.isnan(alone.mean_cosine)
    assert (alone.duplicates, alone.nearest) == (0, ())


def test_a_feature_of_zeros_is_near_to_none() -> None:
    h = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert pairs(h, threshold=0.5).duplicates == 0
    assert signals(h)["zero_features"] == 2


def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = module._tiles

    def seen(z: Tensor, side: int):  # type: ignore[no-untyped-def]
        for top, left, tile in whole(z, side):
            sizes.append(tile.numel())
            yield top, left, tile

    monkeypatch.setattr(module, "_tiles", seen)
    pairs(features(3000, 2))
    assert len(sizes) == 6
    assert max(sizes) == 1024**2


def test_all_signals_as_json() -> None:
    h = features(10, 4)
    h[7] = h[2]
    found = signals(h)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["images"], found["feature_size"]) == (10, 4)
    assert found["near_duplicates"]["pairs"] == 1
    alone = signals(torch.zeros(1, 4))
    assert alone["uniformity"] is None
    assert alone["effective_rank"] is None
    views = view_signals(h, features(10, 4, seed=1))
    assert views == {
        "images": 10,
        "alignment": alignment(h, features(10, 4, seed=1)),
        "uniformity": pairs(h).uniformity,
    }
    assert view_signals(torch.ones(1, 4), torch.ones(1, 4)) == {"images": 1, "alignment": 0.0, "uniformity": None}


@pytest.mark.parametrize("batch", [2, 3, 5, 7])
def test_false_negatives_by_enumeration(batch: int) -> None:
    """Every batch that can be drawn, and every anchor in it; two images have no label."""
    labels = [0, 0, 0, 1, 1, 2, 3]
    negatives, same, anchors, some = 0, 0, 0, 0
    for drawn in itertools.combinations(range(7), batch):
        for anchor in drawn:
            own = sum(labels[other] == labels[anchor] for other in drawn if other != anchor)
            negatives, same, anchors, some = negatives + batch - 1, same + own, anchors + 1, some + (own > 0)
    found = false_negatives(torch.tensor([-1, *labels, -1]), batch)
    assert found.share == pytest.approx(same / negatives, rel=1e-12)
    assert found.images == pytest.approx(same / anchors, rel=1e-12)
    assert found.anchors == pytest.approx(some / anchors, rel=1e-12)


def test_false_negatives_of_large_sets() -> None:
    found = false_negatives(torch.arange(50_000) % 10, 4096)
    assert found.share == pytest.approx(4999 / 49_999)
    assert found.anchors == pytest.approx(1)
    none = math.comb(49_950, 63) / math.comb(49_999, 63)
    assert false_negatives(torch.arange(50_000) % 1000, 64).anchors == pytest.approx(1 - none, rel=1e-10)


def test_what_is_refused() -> None:
    for batch in (1, 4):
        with pytest.raises(ConfigError, match="from 2 to the number of labelled images, 3"):
            false_negatives(torch.tensor([0, 1, 0, -1]), batch)


@pytest.mark.parametrize("d", [1, 2, 16, 128, 512, 2048])
def test_uniformity_of_random_directions(d: int) -> None:
    """By scipy's 0F1, and by random directions."""
    assert random_uniformity(d) == pytest.approx(math.log(hyp0f1(d / 2, 4)) - 4, abs=1e-12)
    drawn = torch.randn(2000, d, generator=torch.Generator().manual_seed(0))
    assert pairs(drawn, listed=0).uniformity == pytest.approx(random_uniformity(d), abs=0.01)


def test_what_is_good_is_said_of_each_signal() -> None:
    """Of each that can be good, under its own name; and the bounds that it names are the real ones."""
    n, d = 40, 6
    found = signals(features(n, d))
    found["views"] = view_signals(features(n, d), features(n, d, seed=1))
    found["false_negatives"] = {"batch": 8, **false_negatives(torch.arange(n) % 3, 8)._asdict()}
    good, names = meanings(found), set(flat(found))
    assert set(good) <= names
    assert {name.rpartition(": ")[2] for name in names - set(good)} == {"images", "feature_size", "threshold", "batch"}
    assert good["effective_rank"].endswith("at most 6")
    assert meanings({"images": 5, "feature_size": 30})["effective_rank"].endswith("at most 5")
    assert f"random directions {random_uniformity(d):.2f}" in good["uniformity"]
    assert good["near_duplicates: pairs"].startswith("of 780;")
    one = torch.ones(n, d)
    assert (pairs(one).mean_cosine, pairs(one).uniformity, alignment(one, one)) == pytest.approx((1, 0, 0), abs=1e-6)
    drawn = torch.randn(2, 2000, 64, generator=torch.Generator().manual_seed(0))
    assert alignment(drawn[0], drawn[1]) == pytest.approx(2, abs=0.02)
    assert pairs(drawn[0], listed=0).mean_cosine == pytest.approx(0, abs=1e-3)
    assert pairs(drawn[0].relu(), listed=0).uniformity > random_uniformity(64) + 1
