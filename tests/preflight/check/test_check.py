"""`simclr-dist check --only gradient`: exact for the trainer's gradient, and a clear no for the losses of others."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch

import ranks
from simclr_dist.config.settings import Config, LossConfig, ModelConfig, ViewsConfig
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import NTXentLoss, nt_xent, tiles
from simclr_dist.preflight.check import gradient, machines
from simclr_dist.preflight.check.checks import run_checks
from simclr_dist.preflight.check.gradient import check_loss, gradient_report
from simclr_dist.train import learner

CONFIG = Config(
    global_batch_size=24,
    steps=1,
    model=ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=32, projector_dim=16),
    views=ViewsConfig(preset="small", image_size=12),
)


def _reports(here: World) -> list[Any]:
    exact = dataclasses.replace(CONFIG, deterministic="exact", exact_piece=4)  # which does not divide a rank's 6 images
    configs = [CONFIG, dataclasses.replace(CONFIG, micro_batches=2), dataclasses.replace(exact, micro_batches=2)]
    return [list(gradient_report(config, here)) for config in configs]


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


def _of_a_vit(here: World) -> Any:
    model = ModelConfig("timm/test_vit", drop_path=0.3, projector_hidden=32, projector_dim=16, projector_batch_norm=False)
    views = ViewsConfig(image_size=32)
    config = dataclasses.replace(CONFIG, model=model, views=views, micro_batches=2)
    kept_or_not = (dataclasses.replace(config, activation_checkpointing=again) for again in (False, True))
    return [gradient_report(one, here) for one in kept_or_not]


def test_the_proof_holds_for_a_vit_that_drops_paths() -> None:
    """Also where its blocks are computed again, in the backward."""
    for reports in ranks.run(_of_a_vit, 2):
        for table, is_exact in reports:
            assert is_exact, table


DCL = dataclasses.replace(CONFIG, loss=LossConfig(0.2, decoupled=True, scale=2.0))


def _of_another_loss(here: World) -> list[Any]:
    sound = gradient_report(DCL, here)
    with mock.patch.object(learner, "NTXentLoss", lambda temperature, **_: NTXentLoss(temperature)):
        return [sound, gradient_report(DCL, here)]


def test_the_proof_is_of_the_loss_that_trains() -> None:
    for (table, exact), (_, other) in ranks.run(_of_another_loss, 2):
        assert exact, table
        assert not other, "a loss without its settings must show"


class _Coarse(tiles.Similarities):
    """Products of bfloat16's digits, in float32 alone: as kernels might be wrong that the proof in float64 never runs."""

    def weighted_sum(self, *weights: Any) -> Any:
        found = super().weighted_sum(*weights)
        return found.bfloat16().float() if found.dtype is torch.float32 else found


def _losses(here: World) -> list[Any]:
    kinds: list[dict[str, Any]] = [{"precision": precision} for precision in ("fp32", "bf16", "fp64")]
    kinds.append({"deterministic": "exact", "exact_piece": 8})  # which does not divide a rank's 12 images
    found = [check_loss(dataclasses.replace(DCL, **kind), here) for kind in kinds]
    with mock.patch.object(nt_xent, "Similarities", _Coarse if here.rank else tiles.Similarities):
        found += run_checks(CONFIG, here, ["gradient"])[0]
    return [[one.level, one.seen] for one in found]


def test_the_loss_is_checked_in_the_numbers_that_train() -> None:
    for found in ranks.run(_losses, 2):
        assert [level for level, _ in found] == ["ok", "ok", "ok", "ok", "ok", "failure"]
        assert [seen[:20] for _, seen in found] == [
            *["the loss (float32 on"] * 2, "the loss (float64 on", "the loss (float32 on",
            "the distributed grad", "the loss (float32 on",
        ]  # fmt: skip
        assert "float32 on cpu, 48 embeddings of 16) is not what its definition says on " in found[-1][1]
        assert found[-1][1].endswith("(rank 1)")


def test_a_gpu_whose_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss has another way, and torch.compile has none."""
    gpu = World(0, 1, 0, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(learner, "triton_problem", lambda _: "Triton cannot compile: gcc fails")
    assert learner.kernel_problem(CONFIG, 16, gpu) == "Triton cannot compile: gcc fails"
    assert learner.kernel_problem(CONFIG, 512, gpu) == "", "these take no kernel anyway"
    compiled = dataclasses.replace(CONFIG, compile=True)
    [finding] = machines.compiler(compiled, gpu)
    assert finding.level == "failure"
    assert finding.seen.endswith("compile: true: Triton cannot compile: gcc fails; install it, or set compile: false")
    monkeypatch.setattr(gradient, "kernel_problem", lambda *_: "Triton cannot compile: gcc fails")
    slower = check_loss(CONFIG, World(0, 1, 0, torch.device("cpu")))
    assert (slower.level, slower.seen.partition(": ")[2]) == ("warning", "Triton cannot compile: gcc fails")
