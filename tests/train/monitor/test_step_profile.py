"""`--profile`: what is asked for, what the table says of a made-up trace, and a run of two processes."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from simclr_dist.cli.main import main as cli
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.profiling import STAGES, Profile, parse_profile, table, take_profile


def test_what_is_asked_for() -> None:
    assert parse_profile("3") == Profile(3, None, 0)
    assert parse_profile("10:13", "all") == Profile(3, 10, None)
    assert take_profile(["--seed", "1", "--profile=10:13", "--profile-rank", "2"]) == (Profile(3, 10, 2), ["--seed", "1"])
    assert take_profile(["--seed", "1"]) == (None, ["--seed", "1"])
    for profile in (Profile(3), Profile(3, 10, None), Profile(1, 7, 2)):
        assert take_profile(profile.options) == (profile, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "x"], "--profile: 'x' is neither"),
        (["--profile", "0"], "--profile: '0' is neither"),
        (["--profile", "5:5"], "--profile: '5:5' is neither"),
        (["--profile", ":5"], "--profile: ':5' is neither"),
        (["--profile", "3", "--profile-rank", "-1"], "--profile-rank: '-1' is neither"),
        (["--profile-rank", "1"], "--profile-rank goes with --profile"),
        (["--profile"], "--profile: its value is missing"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_profile(arguments)


def test_which_steps() -> None:
    assert parse_profile("3").steps(0, 100) == range(6, 9)
    assert parse_profile("3").steps(50, 100) == range(56, 59)
    assert parse_profile("3").steps(0, 4) == range(2, 5)
    assert parse_profile("3").steps(98, 100) == range(99, 101)
    assert not parse_profile("3").steps(100, 100)
    assert parse_profile("10:13").steps(0, 100) == range(10, 13)
    assert parse_profile("10:13").steps(11, 100) == range(12, 13)
    assert not parse_profile("10:13").steps(20, 100)


def event(name: str, begin: float, length: float, cat: str = "user_annotation", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length, "pid": 9, "tid": tid}


def rows(text: str) -> dict[str, list[float]]:
    return {line[:16].strip(): [float(cell.rstrip("%")) for cell in line[16:].split()] for line in text.splitlines()[2:]}


def test_the_table_of_a_trace() -> None:
    """Two steps of 10 ms: what is nested counts once, a gather within an all-reduce is a part of it."""
    events = [
        event("step", 0, 10_000),
        event("data", 0, 1000),
        event("forward", 1000, 4000),
        event("gather", 2000, 500),
        event("backward", 5000, 4000),
        event("all-reduce", 6000, 1000),
        event("gather", 6100, 100),
        event("step", 10_000, 10_000),
        event("optimizer", 12_000, 2000),
        event("gather", 0, 9999, tid=2),
        event("aten::mm", 0, 9999, cat="cpu_op"),
    ]
    found = rows(table(events, range(10, 12)))
    assert list(found) == [*STAGES, "other", "step"]
    host = {name: values[0] for name, values in found.items()}
    assert host["data"] == 0.5
    assert host["forward"] == 1.75
    assert host["gather"] == 0.25
    assert host["backward"] == 1.5
    assert host["all-reduce"] == 0.5
    assert host["optimizer"] == 1.0
    assert host["step"] == 10.0
    assert sum(host.values()) == pytest.approx(20.0)
    assert table(events, range(10, 12)).startswith("steps 10 to 11: milliseconds a step\n")


def test_the_table_of_a_gpu() -> None:
    events = [
        event("step", 0, 10_000),
        event("forward", 0, 1000),
        event("forward", 500, 6000, cat="gpu_user_annotation", tid=7),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0, 3000, cat="kernel", tid=8),
        event("ncclDevKernel_AllGather_RING_LL", 0, 200, cat="kernel", tid=8),
    ]
    found = rows(table(events, range(1, 2)))
    assert found["forward"] == [1.0, 10.0, 6.0]
    assert found["all-reduce"] == [0.0, 0.0, 3.0]
    assert found["gather"] == [0.0, 0.0, 0.2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


def test_two_processes(shards: Path, tmp_path: Path) -> None:
    """Both ranks write; the run ends with the bits of one that is not profiled."""
    for name, options in (("plain", []), ("profiled", ["--profile", "4:6", "--profile-rank", "all"])):
        runs.write_config(tmp_path / name, shards, micro_batches=2)
        output = runs.train(tmp_path / name, 2, *options)
    runs.assert_same_run(tmp_path / "profiled" / "run", tmp_path / "plain" / "run", 6)
    assert output.count("steps 4 to 5: milliseconds a step") == 2
    folder = tmp_path / "profiled" / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-00000004-rank-{rank}.{kind}" for rank in range(2) for kind in ("trace.json.gz", "txt")
    ]
    for rank in range(2):
        found = rows((folder / f"step-00000004-rank-{rank}.txt").read_text())
        host = {name: values[0] for name, values in found.items()}
        for stage in STAGES:
            assert host[stage] > 0, stage
        assert sum(host.values()) == pytest.approx(2 * host["step"], rel=0.01)
        with gzip.open(folder / f"step-00000004-rank-{rank}.trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        count = {stage: sum(e.get("name") == stage and e.get("ph") == "X" for e in events) for stage in ("step", *STAGES)}
        assert count["step"] == count["data"] == count["optimizer"] == 2
        assert count["forward"] == 8, "two micro-batches without a graph and two with one, a step"


def test_nothing_to_profile_is_said(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=2)
    output = runs.train(tmp_path, 1, "--profile", "10:13")
    assert "WARNING: --profile 10:13 --profile-rank 0: this start has steps 1 to 2: nothing to profile" in output
    assert not (tmp_path / "run" / "profile").exists()


def test_a_rank_that_there_is_not(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=2)
    with runs.started(tmp_path, 1, "--profile", "1", "--profile-rank", "1") as ranks:
        assert ranks.wait() == [2]
        assert "simclr-dist: --profile-rank: there is no rank 1 of 1" in ranks.output
    assert not (tmp_path / "run").exists(), "refused before the run begins"


def test_through_the_launcher(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher is asked to start, and that a typo is refused before."""
    started: list[list[str]] = []
    monkeypatch.setattr("simclr_dist.cli.train.torchrun", lambda _, command, *__, **___: started.append(list(command)) or 0)
    monkeypatch.chdir(tmp_path)
    config = str(runs.write_config(tmp_path, shards))
    assert cli(["train", config, "--processes", "2", "--profile", "3", "--profile-rank", "all", "--seed", "1"]) == 0
    assert started == [["-m", "simclr_dist.train", config, "--profile", "3", "--profile-rank", "all", "--seed", "1"]]
    assert cli(["train", config, "--profile", "x"]) == 2
    assert cli(["train", config, "--profile-rank", "1"]) == 2
    assert len(started) == 1
