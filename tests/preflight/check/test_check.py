"""`simclr-dist check --only gradient`: exact for the trainer's gradient, and a clear no for the losses of others."""

import dataclasses
from typing import Any
from unittest import mock

import pytest

import ranks
from simclr_dist.config.settings import Config, ModelConfig, ViewsConfig
from simclr_dist.method.distributed import World
from simclr_dist.preflight.check.gradient import gradient_report

CONFIG = Config(
    global_batch_size=24,
    steps=1,
    model=ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=32, projector_dim=16),
    views=ViewsConfig(preset="small", image_size=12),
)


def _reports(here: World) -> list[Any]:
    return [list(gradient_report(dataclasses.replace(CONFIG, micro_batches=pieces), here)) for pieces in (1, 2)]


def _rows(text: str) -> dict[str, tuple[float, float, float]]:
    """Scale, cosine and relative error by name."""
    rows = [line.rsplit(maxsplit=3) for line in text.splitlines()[2:]]
    return {name: (float(scale), float(cosine), float(error)) for name, scale, cosine, error in rows}


@pytest.mark.slow
def test_the_report_tells_right_from_wrong() -> None:
    for by_rank in zip(*ranks.run(_reports, 2), strict=True):
        assert all(exact for _, exact in by_rank)
        rows = _rows(by_rank[0][0])
        scale, cosine, error = rows.pop("this trainer")
        assert (scale, cosine) == (1, 1)
        assert error < 1e-11
        assert len(rows) == 3
        for name, (_, _, wrong) in rows.items():
            assert name.startswith("wrong: ")
            assert wrong > 0.01, name
        scale, cosine, _ = rows["wrong: without the factor world_size"]
        assert scale == pytest.approx(0.5, abs=1e-6)
        assert cosine == pytest.approx(1, abs=1e-7)


def _local_statistics(here: World) -> Any:
    with mock.patch("simclr_dist.train.learner.use_global_batch_norm"):
        return list(gradient_report(CONFIG, here))


def test_the_report_fails_on_a_wrong_trainer() -> None:
    for text, exact in ranks.run(_local_statistics, 2):
        assert not exact, text
