"""A network of timm's goes the whole way: training, online probe, evaluation, embedding, finetuning, other arithmetic."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import training_runs as runs
from simclr_dist.config.settings import Config, DataConfig, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.finetune import finetune
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.settings import EmbedSettings, FinetuneSettings
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.method.microbatch import contrastive_backward
from simclr_dist.method.model import SimCLR, build_projector
from simclr_dist.preflight.plan.report import make_plan, text
from simclr_dist.train.learner import build_learner, cut, keyed
from simclr_dist.train.loop import training_step

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_from_images_to_results(tmp_path: Path) -> None:
    shards, held_out = runs.make_shards(tmp_path / "a"), runs.make_shards(tmp_path / "b", images=60, seed=1)
    model = {"encoder": "timm/test_vit", "stem": "imagenet", "drop_path": 0.2}
    changes = {"model": model, "views": {"image_size": 32}, "probe": {"every_epochs": 1, "shards": str(held_out)}}
    runs.write_config(tmp_path, shards, steps=8, **changes)
    assert "timm/test_vit" in runs.train(tmp_path, 1)
    assert "probe/knn_top1" in runs.metrics(tmp_path / "run")[-1]
    path = tmp_path / "run/encoders/step-00000008.safetensors"
    card: Any = load_encoder(path).card
    assert (card["encoder"], card["feature_size"], card["channels"]) == ("timm/test_vit", 64, 3)
    result = evaluate(path, shards, held_out, device="cpu", protocols=("knn",), workers=0)
    assert result["encoder"]["name"] == "timm/test_vit"
    embed(path, held_out, tmp_path / "h.parquet", EmbedSettings(workers=0), device="cpu")
    finetune(path, shards, held_out, FinetuneSettings(0.5, epochs=1, seeds=1, workers=0), device="cpu")


def test_images_that_do_not_fit_are_refused_before_there_is_a_run(tmp_path: Path) -> None:
    model = {"encoder": "timm/test_vit", "stem": "imagenet"}
    runs.write_config(tmp_path, runs.make_shards(tmp_path / "a"), model=model, views={"image_size": 40})
    with runs.started(tmp_path, 2) as ranks:
        assert ranks.wait() == [2, 2]
        assert "(it cuts them into patches of 16: 32 or 48 pixels would fit)" in ranks.output
    assert not (tmp_path / "run").exists()


def test_it_is_said_that_there_is_no_batch_norm() -> None:
    model = dataclasses.replace(SMALL.model, projector_batch_norm=False)
    plain = text(make_plan(dataclasses.replace(SMALL, model=model, data=DataConfig(shards="none")), samples=100))
    assert "BatchNorm group             none: any number of micro-batches is the same gradient" in plain


SMALL = Config(
    global_batch_size=16,
    micro_batches=2,
    steps=1,
    device="cpu",
    model=ModelConfig("timm/test_vit", projector_hidden=16, projector_dim=8, drop_path=0.2),
    views=ViewsConfig(image_size=32),
    optim=OptimConfig(warmup_steps=0),
)


@pytest.mark.parametrize("encoder", ["timm/test_vit", "timm/test_convnext"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"precision": "fp64"},
        {"channels_last": False},
        {"optim": OptimConfig("adamw", warmup_steps=0)},
    ],
    ids=str,
)
def test_a_step_in_every_arithmetic(encoder: str, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, encoder=encoder), **changes)
    learner = build_learner(config, ALONE)
    before = [p.detach().clone() for p in learner.model.parameters()]
    views = torch.randn(2, 16, 3, 32, 32).unbind()
    rows = list(torch.arange(16).chunk(2))
    outcome = training_step(learner, cut(*views, 2), config, lr=0.1, rows=rows)
    assert outcome["loss"].isfinite()
    assert int(learner.counters["skipped"]) == 0
    moved = [not torch.equal(p, q) for p, q in zip(learner.model.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_what_is_dropped_belongs_to_image_view_step_and_seed() -> None:
    model = build_learner(dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, drop_path=0.5)), ALONE).model
    images = torch.randn(1, 3, 32, 32).expand(8, -1, -1, -1)  # eight times the same, so what differs is what was dropped

    def views(seed: int, step: int, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), keyed(model, seed, step, torch.tensor(rows)):
            a, b = model.encoder(images.repeat(2, 1, 1, 1)).chunk(2)
        return a, b

    rows = list(range(8))
    a, b = views(1, 2, rows)
    assert not torch.allclose(a[0], a[1:]), "another image"
    assert not torch.allclose(a, b), "the other view"
    for again in (views(1, 2, rows), [view.flip(0) for view in views(1, 2, rows[::-1])]):
        torch.testing.assert_close(list(again), [a, b])
    for name, others in {"step": views(1, 3, rows), "seed": views(2, 2, rows)}.items():
        assert not torch.allclose(others[0], a), f"another {name}"
        assert not torch.allclose(others[1], b), f"another {name}"


def test_any_module_is_an_encoder_in_python() -> None:
    encoder = torch.nn.Sequential(torch.nn.Conv2d(5, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 12))
    model = SimCLR(encoder, build_projector(12, hidden=16, dim=4, batch_norm=False)).double()
    view_a, view_b = torch.randn(2, 12, 5, 8, 8, dtype=torch.float64).unbind()
    gradients = []
    for pieces in (1, 3):
        model.zero_grad()
        contrastive_backward(model, cut(view_a, view_b, pieces), NTXentLoss(0.2))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[0].norm()
