"""`plan --measure`: real steps for a while, in one process and in two, and nothing left behind."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ranks
from measured import config
from simclr_dist.cli import plan as verb
from simclr_dist.cli.main import main
from simclr_dist.config.settings import Config, DataConfig, ModelConfig
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.convert.shards import write_shards
from simclr_dist.method.distributed import World
from simclr_dist.preflight.plan import measure
from simclr_dist.preflight.plan.hardware import Machines, Measured, gpu
from simclr_dist.preflight.plan.report import make_plan, text
from simclr_dist.system.errors import ConfigError

SMALL = ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=16, projector_dim=8)
ALONE = World(0, 1, 0, torch.device("cpu"))


def small(shards: str = "none", **changes: object) -> Config:
    return config(
        global_batch_size=8, micro_batches=2, model=SMALL, data=DataConfig(shards=shards, workers=0), run_folder="r", **changes
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{number}.png")
    write_shards(images, tmp_path / "shards", shard_size=6, seed=0, processes=1, progress=False)
    return tmp_path / "shards"


def measured(here: World, of: Config) -> Measured:
    return measure.measure(make_plan(of, samples=1000, world_size=here.size, machines=Machines(on_cuda=False)), here)


def measured_on_ranks(here: World, of: Config) -> dict[str, object]:
    measure.SECONDS = 0.3
    return dataclasses.asdict(measured(here, of))


def test_random_views_where_the_shards_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.3)
    found = measured(ALONE, small())
    assert found.steps >= 1
    assert found.seconds > 0
    assert found.where.endswith(" cores")


def test_two_ranks_end_with_the_same_step() -> None:
    one, other = ranks.run(measured_on_ranks, 2, small())
    assert one["steps"] == other["steps"] >= 1
    assert one["ranks"] == 2


def test_shards_by_their_names_are_here_as_their_folder_is(shards: Path) -> None:
    """So they are measured with, and their disk is known; one that lacks a part is not here."""
    tars = sorted(shards.glob("*.tar"))
    one, both = tars[0].stat().st_size, sum(tar.stat().st_size for tar in tars)
    stream = DataConfig(f"{shards}/shard-{{000000..000001}}.tar", reader="stream", samples=12, workers=0)
    places = {str(shards): both, f"{shards}/shard-{{000000..000001}}.tar": both, str(tars[0]): one}
    for place, size in places.items():
        assert make_plan(small(place), samples=12).shards == size, place
    assert make_plan(dataclasses.replace(small(), data=stream)).shards == both
    assert make_plan(small(f"{shards}/shard-{{000000..000002}}.tar"), samples=18).shards is None
    assert make_plan(small("https://nowhere.invalid/shards"), samples=12).shards is None


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_the_shards_are_read_and_nothing_stays(shards: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Also where the first step takes all the time there is."""
    monkeypatch.setattr(measure, "SECONDS", seconds)
    made = make_plan(small(str(shards)))
    before = {path: path.stat().st_mtime_ns for path in shards.parent.rglob("*")}
    found = measure.measure(made, ALONE)
    assert found.steps == 1 if seconds == 0 else found.steps > 1
    assert {path: path.stat().st_mtime_ns for path in shards.parent.rglob("*")} == before


def test_what_was_measured_is_counted_on() -> None:
    made = make_plan(small(steps=1800), samples=1000, world_size=2, machines=Machines(on_cuda=False))
    found = Measured(steps=50, seconds=25.0, ranks=2, where="2 cores")
    plan = made.on(dataclasses.replace(made.machines, measured=found))
    assert plan.values()["seconds_a_step"] == 0.5
    assert [scale.get("hours") for scale in plan.values()["scales"]] == [None, 0.25, None, None]
    (line,) = [line[28:] for line in text(plan).splitlines() if line.startswith("speed")]
    assert line == (
        "measured 16.0 images/s over 25 s (50 steps by 2 ranks on 2 cores, with random views, which nobody has to read or"
        " augment): 15 min for 1800 steps"
    )


def test_a_step_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "memory_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"--measure: a step needs .* of this machine's 0\.0 GiB; raise micro_batches"):
        measure.measure(make_plan(small(), samples=1000), ALONE)


def test_the_verb_starts_ranks_that_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(write_yaml({**small().to_dict(), "steps": None, "epochs": 2.0}))
    started: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(verb, "torchrun", lambda processes, command: started.append((processes, command)) or 0)
    typed = ["plan", str(file), "--processes", "2", "--samples", "100", "--measure", "--json", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["simclr-dist", *typed])
    assert main() == 0
    assert started == [(2, ["-m", "simclr_dist", *typed])]

    place = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ranks.free_port()),
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    assert main(typed) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["measured"]["steps"] == 1
    assert values["steps"] == 24
    assert "TORCHELASTIC_RUN_ID" not in os.environ


@pytest.mark.parametrize("other", ["--images-per-second", "--utilisation"])
def test_a_guess_beside_it_is_refused(other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(write_yaml({**small().to_dict(), "device": "auto"}))
    assert main(["plan", str(file), "--samples", "100", "--measure", other, "0.5", "--gpu", "h100"]) == 2
    assert capsys.readouterr().err.endswith("--measure: each says how fast a rank is; give one of them\n")


def test_only_what_was_measured_has_a_speed() -> None:
    """A GPU's sheet and a network's rate are of other machines than these."""
    h100 = Machines(gpu=gpu("h100"), measured=Measured(steps=10, seconds=5.0, ranks=2, where="2 cores"))
    plan = make_plan(small(), samples=1000, world_size=2, machines=h100)
    assert [scale.get("images_per_second") for scale in plan.values()["scales"]] == [None, None, None, None, None]
    assert plan.values()["fewest_micro_batches"] == 1, "which is not the number that was measured"
    plan = make_plan(dataclasses.replace(small(), micro_batches=1), samples=1000, world_size=2, machines=h100)
    assert [scale.get("images_per_second") for scale in plan.values()["scales"]] == [None, 16.0, None, None, None]
    assert text(plan).endswith("\nother numbers of ranks are not measured: --processes measures them")


def test_a_network_beside_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(write_yaml(small().to_dict()))
    assert main(["plan", str(file), "--samples", "100", "--measure", "--bandwidth", "25Gbit"]) == 2
    assert "--bandwidth: has no effect with --measure" in capsys.readouterr().err
