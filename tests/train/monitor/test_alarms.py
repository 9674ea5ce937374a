"""Alarms: the rules on made-up numbers, and each of them on a run that really goes wrong."""

import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import training_runs as runs
from faults import hooks
from simclr_dist.cli.train import main
from simclr_dist.data.steps import StepDataset
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.train import learner
from simclr_dist.train.monitor.alarms import PATIENCE, Alarms, Change
from simclr_dist.train.monitor.clock import spread

HEALTHY = {
    "loss/nt_xent": 3.0,
    "loss/chance": 6.0,
    "embedding/uniformity": -3.0,
    "embedding/effective_rank": 30.0,
    "optim/gradient_norm": 1.0,
    "optim/skipped_steps": 0.0,
}
TIMING = {
    "speed/step_ms": 100.0,
    "speed/data_wait_percent": 2.0,
    "ranks/data_wait_percent_max": 3.0,
    "ranks/own_ms": 21.0,
    "ranks/own_ms_others": 20.0,
    "ranks/slowest": 1.0,
    "ranks/starving": 1.0,
}


def told(alarms: Alarms, steps: range, metrics: Any = None, timing: Any = None) -> list[Change]:
    return [change for step in steps for change in alarms.see(step, HEALTHY | (metrics or {}), TIMING | (timing or {}))]


@pytest.mark.parametrize(
    ("kind", "metrics", "timing", "word"),
    [
        ("collapse", {"embedding/uniformity": -0.1}, {}, "uniformity -0.10"),
        ("collapse", {"embedding/effective_rank": 1.2}, {}, "effective rank 1.2"),
        ("divergence", {"loss/nt_xent": 5.0, "optim/gradient_norm": 50.0}, {}, "from 1 to 50"),
        ("above_chance", {"loss/nt_xent": 6.1}, {}, "chance, 6.000"),
        ("starving_loader", {}, {"ranks/data_wait_percent_max": 45.0}, "images on rank 1 (node-b)"),
        (
            "starving_loader",
            {},
            {"ranks/data_wait_percent_max": 45.0, "speed/data_wait_percent": 40.0},
            "waiting for images; likely cure: more data.workers",
        ),
        ("slow_rank", {}, {"ranks/own_ms": 60.0}, "rank 1 (node-b) needs 60.0 ms"),
    ],
)
def test_each_is_raised_once_and_is_over(kind: str, metrics: dict[str, float], timing: dict[str, float], word: str) -> None:
    alarms = Alarms(warmup_steps=50, hosts=["node-a", "node-b"])
    assert told(alarms, range(10, 510, 10)) == []
    readings = max(PATIENCE[kind].readings, PATIENCE[kind].steps // 10 + 1)
    assert told(alarms, range(510, 510 + 10 * (readings - 1), 10), metrics, timing) == []
    (raised, *more) = told(alarms, range(1000, 1200, 10), metrics, timing)
    assert (raised.alarm.kind, raised.step, raised.over, more) == (kind, 1000, False, [])
    assert alarms.active == [raised.alarm]
    assert word in raised.line
    assert raised.line.startswith(f"ALARM step 1000: {kind}: ")
    assert "; likely cure: " in raised.line
    assert "\n" not in raised.line
    (over,) = told(alarms, range(1200, 1600, 10))
    assert (over.over, alarms.active) == (True, [])
    assert over.line == f"step {over.step}: over: {kind}, which began at step 1000"


def test_one_bad_reading_is_none() -> None:
    alarms = Alarms()
    for step in range(0, 3000, 100):
        assert told(alarms, range(step + 1, step + 3), {"embedding/uniformity": 0.0}, {"ranks/own_ms": 99.0}) == []
        assert told(alarms, range(step + 3, step + 4)) == []


def test_what_a_start_looks_like_is_none() -> None:
    """Before the warm-up is over, embeddings may be alike, and the loss above chance."""
    alarms = Alarms(warmup_steps=300)
    assert told(alarms, range(1, 200), {"embedding/uniformity": -0.05}) == []
    assert told(alarms, range(200, 301), {"loss/nt_xent": 6.4}) == []


def test_skipped_steps_and_numbers_that_are_none() -> None:
    alarms = Alarms()
    assert told(alarms, range(100)) == []
    nothing = {"loss/nt_xent": float("nan"), "optim/gradient_norm": float("nan"), "embedding/uniformity": float("nan")}
    changes = [
        change
        for step in range(100, 105)
        for change in told(alarms, range(step, step + 1), {**nothing, "optim/skipped_steps": step - 99.0})
    ]
    assert [change.alarm.kind for change in changes] == ["divergence"]
    assert "steps are skipped, 3 so far" in changes[0].line


def test_steps_that_fp16_skips_while_it_finds_its_scale_are_none() -> None:
    alarms = Alarms()
    changes = [
        change
        for step in range(20)
        for change in told(alarms, range(step, step + 1), {"optim/skipped_steps": step, "optim/loss_scale": 2.0 ** (16 - step)})
    ]
    assert [(change.alarm.kind, change.step) for change in changes] == [("divergence", 18)], "at a scale of 1, 1/2 and 1/4"


def test_missing_numbers_raise_nothing() -> None:
    alarms = Alarms()
    assert [change for step in range(300) for change in alarms.see(step, {}, {})] == []


def test_a_slow_rank_must_matter() -> None:
    """Twice as slow in what is a hundredth of a step holds nobody up."""
    alarms = Alarms()
    assert told(alarms, range(300), timing={"ranks/own_ms": 2.0, "ranks/own_ms_others": 1.0}) == []


def test_a_slow_rank_is_the_same_one_all_the_time() -> None:
    """Of many ranks on busy machines some other one is late at each reading."""
    alarms = Alarms()
    late = {"ranks/own_ms": 60.0}
    for step in range(0, 300, 2):
        assert told(alarms, range(step, step + 2), timing={**late, "ranks/slowest": float(step % 7)}) == []
    (raised,) = told(alarms, range(300, 340), timing={**late, "ranks/slowest": 3.0})
    assert raised.alarm.why.startswith("rank 3 needs")
    changes = told(alarms, range(340, 440), timing={**late, "ranks/slowest": 5.0})
    assert [(change.over, change.alarm.why.split(" needs")[0]) for change in changes] == [(True, "rank 3"), (False, "rank 5")]


def test_a_rank_that_was_held() -> None:
    """What two processes logged, the second stopped for nine tenths of the time from step 11 on: step, own work, the others."""
    readings = [
        (634, 57, 49), (508, 59, 54), (3268, 328, 29), (2554, 216, 102), (1548, 144, 16), (2431, 272, 24), (2924, 308, 39),
        (2056, 148, 16),
    ]  # fmt: skip
    alarms = Alarms(hosts=["here", "there"])
    changes = []
    for number, (step_ms, own, others) in enumerate(readings, 1):
        timing = {"speed/step_ms": step_ms, "ranks/own_ms": own, "ranks/own_ms_others": others, "ranks/slowest": 1.0}
        changes += alarms.see(5 * number, {}, timing)
    (raised,) = changes
    assert (raised.alarm.kind, raised.step) == ("slow_rank", 35)
    assert "rank 1 (there) needs 308.0 ms" in raised.line
    assert "--profile-rank 1" in raised.line


def test_the_spread_over_ranks() -> None:
    speed, wait, memory = torch.tensor([5.0, 7, 6]), torch.tensor([1.0, 40, 2]), torch.tensor([1.0, 1, 3])
    found = spread(speed, wait, memory, torch.tensor([10.0, 11, 30]))
    assert (found["ranks/images_per_second_min"], found["ranks/images_per_second_max"]) == (5, 7)
    assert (found["ranks/data_wait_percent_max"], found["ranks/starving"]) == (40, 1)
    assert (found["ranks/own_ms"], found["ranks/slowest"]) == (30, 2)
    assert 10 <= found["ranks/own_ms_others"] <= 11
    alone = spread(*torch.ones(4, 1))
    assert alone["ranks/own_ms"] == alone["ranks/own_ms_others"]


# Runs that go wrong


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


SMALL: dict[str, Any] = {"global_batch_size": 12, "views": {"image_size": 8}}


def run_with(folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """status.json of a run of 70 steps in this process."""
    monkeypatch.chdir(folder)
    assert main([str(runs.write_config(Path(), shards, **{"steps": 70, "checkpoint": {"every": 70}, **changes}))]) == 0
    return runs.status(Path("run"))


def kinds(status: dict[str, Any]) -> list[str]:
    return [alarm["kind"] for alarm in status.get("alarms", [])]


def test_a_healthy_run_raises_none(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = run_with(
        tmp_path, shards, monkeypatch, steps=110, optim={"name": "adamw", "base_lr": 0.003, "lr_rule": "constant"}
    )
    assert (status["state"], kinds(status)) == ("done", [])
    assert "ALARM" not in Path("run/train.log").read_text()
    assert "alarms" not in status


class Attraction(torch.nn.Module):
    """The loss without its negatives: all embeddings go to one point."""

    temperature = 0.2
    cut = NTXentLoss.cut

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        centre = F.normalize(torch.cat([z_a, z_b]).mean(0, keepdim=True), dim=1).detach()
        return 1 - (F.normalize(torch.cat([z_a, z_b]), dim=1) * centre).sum(1).mean()


def test_a_collapsed_encoder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learner, "NTXentLoss", lambda *_, **__: Attraction())
    status = run_with(
        tmp_path,
        shards,
        monkeypatch,
        steps=100,
        **SMALL,
        model={"projector_batch_norm": False},
        optim={"name": "adamw", "base_lr": 0.01, "lr_rule": "constant"},
    )
    assert "collapse" in kinds(status)
    (alarm,) = (alarm for alarm in status["alarms"] if alarm["kind"] == "collapse")
    assert 50 < alarm["step"] <= 100
    assert capsys.readouterr().out.count("ALARM step") == len(status["alarms"])


def test_a_run_that_diverges(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights overflow, and each step from there is skipped."""
    optim = {"name": "sgd", "base_lr": 1e30, "lr_rule": "constant", "warmup_steps": 0}
    status = run_with(tmp_path, shards, monkeypatch, steps=8, max_skipped_steps=1000, optim=optim, **SMALL)
    assert kinds(status) == ["divergence"]
    assert "steps are skipped" in status["alarms"][0]["why"]


def test_a_run_that_learns_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = {"name": "sgd", "base_lr": 1e-9, "lr_rule": "constant", "warmup_steps": 0}
    status = run_with(tmp_path, shards, monkeypatch, steps=111, log={"every": 10}, optim=optim, **SMALL)
    assert kinds(status) == ["above_chance"]


def test_a_slow_reader(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs four times as long as the step, however long that is on a busy machine."""
    read = StepDataset.portion
    returned = time.monotonic()

    def slowly(dataset: StepDataset, number: int) -> Any:
        nonlocal returned
        time.sleep(max(0.1, 4 * (time.monotonic() - returned)))
        portion = read(dataset, number)
        returned = time.monotonic()
        return portion

    monkeypatch.setattr(StepDataset, "portion", slowly)
    status = run_with(tmp_path, shards, monkeypatch, steps=22)
    assert kinds(status) == ["starving_loader"]
    assert "more data.workers" in status["alarms"][0]["cure"]
    assert status["alarms"][0]["step"] == 21


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "kind", "why", "cure"),
    [
        (
            partial(hooks.slow_optimizer, 0.1, rank=1),
            "slow_rank",
            "ms a step for its own work, the others",
            "--profile-rank 1`",
        ),
        (
            partial(hooks.slow_reader, 0.3, rank=1),
            "starving_loader",
            "% of the time is spent waiting for images on rank 1",
            "workers",
        ),
        (None, None, "", ""),
    ],
    ids=["own work", "images", "healthy"],
)
def test_one_of_two_ranks(
    shards: Path, tmp_path: Path, hook: Callable[[], None] | None, kind: str | None, why: str, cure: str
) -> None:
    """In their real clocks: who waits for the slow one does not look slow."""
    runs.write_config(tmp_path, shards, steps=24, checkpoint={"every": 24})
    with runs.started(tmp_path, 2, hook=hook) as ranks:
        assert ranks.wait() == [0, 0], ranks.output
        lines = [line for line in ranks.output.splitlines() if "ALARM" in line]
    alarms = runs.status(tmp_path / "run").get("alarms", [])
    assert [alarm["kind"] for alarm in alarms] == ([kind] if kind else [])
    assert len(lines) == len(alarms)
    for alarm, line in zip(alarms, lines, strict=True):
        assert f"rank 1 ({socket.gethostname()})" in alarm["why"]
        assert why in alarm["why"]
        assert cure in alarm["cure"]
        assert line == f"ALARM step {alarm['step']}: {kind}: {alarm['why']}; likely cure: {alarm['cure']}"
        assert line in (tmp_path / "run" / "train.log").read_text()
