"""`simclr-dist check`: every check is seen to fail on what it is there for, broken for real."""

import dataclasses
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import ranks
import training_runs
from simclr_dist.config.settings import Config, DataConfig, OptimConfig, ViewsConfig
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.data.manifest import load_manifest
from simclr_dist.method.distributed import World
from simclr_dist.preflight.check import disks, machines
from simclr_dist.preflight.check.checks import run_checks
from simclr_dist.preflight.check.findings import Finding, failed, table
from simclr_dist.preflight.shared_memory import cut


def _rows(findings: Sequence[Finding]) -> list[list[str]]:
    return [[f.check, f.level, f.seen, f.cure] for f in findings]


def _config(folder: Path) -> Config:
    data = DataConfig(shards=str(folder / "shards"))
    optim = OptimConfig(warmup_steps=0)
    views = ViewsConfig(preset="small", image_size=16)
    return Config(run_folder=str(folder / "runs/new"), global_batch_size=8, steps=1, data=data, views=views, optim=optim)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    training_runs.make_shards(tmp_path)
    return tmp_path


def _all_but_gradient(here: World, config: Config) -> list[list[str]]:
    only = ("versions", "network", "clock", "shards", "memory", "folder")
    return _rows(run_checks(config, here, only)[0])


def test_two_sound_ranks(folder: Path) -> None:
    before = sorted(str(path) for path in folder.rglob("*"))
    first, second = ranks.run(_all_but_gradient, 2, _config(folder))
    assert first == second
    assert [(check, level) for check, level, _, _ in first] == [
        ("versions", "ok"), ("network", "ok"), ("network", "ok"), ("network", "ok"), ("clock", "ok"), ("shards", "ok"),
        ("memory", "ok"), ("folder", "ok"),
    ]  # fmt: skip
    assert "plan --bandwidth" in first[3][2]
    assert sorted(str(path) for path in folder.rglob("*")) == before, "nothing is left behind"


def _versions(here: World, config: Config) -> list[list[str]]:
    with mock.patch.dict(os.environ, {"CXX": "no-such-compiler"} if here.rank else {}):
        return _rows(run_checks(config, here, ["versions"])[0])


@pytest.mark.usefixtures("compiler")
def test_a_machine_without_a_compiler(folder: Path) -> None:
    """The first rank has one. Who compiles nothing needs none."""
    config = _config(folder)
    assert [level for _, level, *_ in ranks.run(_versions, 2, config)[0]] == ["ok"]
    for rows in ranks.run(_versions, 2, dataclasses.replace(config, compile=True)):
        [_, [check, level, found, _]] = rows
        assert (check, level) == ("versions", "failure")
        assert "(rank 1): compile: true: needs a C++ compiler: 'no-such-compiler' is not found" in found


def test_a_file_in_the_way_of_the_run_folder(folder: Path) -> None:
    (folder / "runs").write_text("no folder")
    [[finding], _] = disks.folder(_config(folder), World(0, 1, 0, torch.device("cpu")), 1000.0, 1000.0)
    assert (finding.level, finding.seen) == ("failure", f"rank 0: {folder}/runs: Not a directory")


def _another_version(here: World) -> list[list[str]]:
    with mock.patch.object(machines, "__version__", "0.0.9" if here.rank else "0.1.0"):
        return _rows(machines.versions(here))


def test_another_version_on_one_rank() -> None:
    for rows in ranks.run(_another_version, 2):
        [[check, level, found, cure]] = rows
        assert (check, level) == ("versions", "failure")
        assert "simclr_dist: 0.1.0 on" in found
        assert "0.0.9 on" in found
        assert "(rank 1)" in found
        assert "constraints.txt" in cure


def _another_clock(here: World) -> list[list[str]]:
    real = machines.time.time
    with mock.patch.object(machines.time, "time", side_effect=lambda: real() + 90 * here.rank):
        return _rows(machines.clock(here))


def test_a_clock_that_is_wrong() -> None:
    for rows in ranks.run(_another_clock, 2):
        assert rows[0][1] == "warning"
        assert "(rank 1) is 90." in rows[0][2]
        assert "NTP" in rows[0][3]


def _closed_port(here: World) -> list[list[str]]:
    """Each rank names a port on which nobody listens."""
    real = machines.all_gather_objects

    def closed(value: Any) -> list[Any]:
        return [(host, 1) for host, _ in real(value)] if isinstance(value, tuple) else real(value)

    with mock.patch.object(machines, "all_gather_objects", closed):
        return _rows(machines._ports(here))


def test_a_port_that_is_closed() -> None:
    for rows in ranks.run(_closed_port, 2):
        assert [level for _, level, _, _ in rows] == ["failure"] * 2
        assert "cannot reach" in rows[0][2]
        assert "open the ports" in rows[0][3]


def _unknown_name(here: World) -> list[list[str]]:
    with mock.patch.object(socket, "gethostname", return_value=f"no-such-host-{here.rank}.invalid"):
        return _rows(machines._names(here))


def test_a_name_that_nobody_knows() -> None:
    for rows in ranks.run(_unknown_name, 2):
        assert {level for _, level, _, _ in rows} == {"warning"}
        assert any("no-such-host-0.invalid does not know no-such-host-1.invalid" in found for _, _, found, _ in rows)


def _shards(here: World, config: Config, other: str) -> list[list[str]]:
    """Rank 1 finds its shards elsewhere."""
    if here.rank and other:
        config = dataclasses.replace(config, data=DataConfig(shards=other))
    return _rows(disks.shards(config, here))


def test_shards_that_are_not_whole_everywhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = _config(folder)
    there = tmp_path_factory.mktemp("node2")
    subprocess.run(["cp", "-r", str(folder / "shards"), str(there)], check=True)
    for rows in ranks.run(_shards, 2, config, str(there / "shards")):
        assert rows[0][1] == "ok", rows
    manifest = load_manifest(there / "shards")
    tars = [there / "shards" / name for name in manifest.shards]
    for shard, offset in zip(manifest.shard, manifest.offset, strict=True):  # a flipped bit in each image of this node
        with tars[shard].open("r+b") as tar:
            tar.seek(int(offset) + 20)
            flipped = tar.read(1)[0] ^ 1
            tar.seek(int(offset) + 20)
            tar.write(bytes([flipped]))
    for rows in ranks.run(_shards, 2, config, str(there / "shards")):
        assert rows[0][1] == "failure", rows
        assert "sha256" in rows[0][2]
        assert "(rank 1)" in rows[0][2]
    tars[0].unlink()
    for rows in ranks.run(_shards, 2, config, str(there / "shards")):
        assert rows[0][1] == "failure"
        assert tars[0].name in rows[0][2]


def test_a_batch_that_the_shards_cannot_fill_is_not_blamed_on_them(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Said once for all ranks; shards that are not whole are said first."""
    config, images = _config(folder), len(load_manifest(folder / "shards").key)
    there = tmp_path_factory.mktemp("node2") / "shards"
    for batch, found in (
        (2 * images, f"global_batch_size: {2 * images} is larger than the {images} images of"),
        (7, "global_batch_size: 7 is not divided by 2 processes x 1 micro_batches; 6 would be"),
    ):
        for rows in ranks.run(_shards, 2, dataclasses.replace(config, global_batch_size=batch), ""):
            [[_, level, said, cured]] = rows
            assert level == "failure"
            assert said.startswith(found)
            assert cured == "nothing is wrong with the shards: change that setting"
    for rows in ranks.run(_shards, 2, dataclasses.replace(config, global_batch_size=2 * images), str(there)):
        assert "copy them anew" in rows[0][3]


def test_what_is_seldom_meant_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_dist.config.together.has_bfloat16", lambda: False)
    one = World(0, 1, 0, torch.device("cpu"))
    assert [level for _, level, _, _ in _shards(one, _config(folder), "")] == ["ok"]
    config = dataclasses.replace(_config(folder), global_batch_size=205, views=ViewsConfig(preset="small", image_size=32))
    rows = _shards(one, config, "")
    assert [level for _, level, _, _ in rows] == ["ok", "warning", "warning"]
    assert "a step takes 100 % of the 205 images" in rows[1][2]
    assert "views.image_size: 32: is more than the images have: the median's short side is 18 pixels" in rows[2][2]
    [_, (_, level, line, _)] = _shards(one, dataclasses.replace(_config(folder), precision="bf16"), "")
    assert (level, line.split(": this")[0]) == ("warning", "precision: bf16")


def test_what_train_refuses_of_the_folder_is_a_failure_and_another_length_a_warning(folder: Path) -> None:
    one, config = World(0, 1, 0, torch.device("cpu")), dataclasses.replace(_config(folder), steps=40)
    run, sizes = Path(config.run_folder), (1000.0, 1000.0)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(write_yaml(config.to_dict()))
    (run / "checkpoints/step-00000010.json").write_text("{}")
    [[finding], _] = disks.folder(config, one, *sizes)
    assert finding.level == "ok"
    [[finding], _] = disks.folder(dataclasses.replace(config, steps=20), one, *sizes)
    assert finding.level == "warning"
    rates = [0.3 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * 10 / total)) for total in (40, 20)]
    line = (
        f"steps: 20: 20 steps and not 40 as before, so the learning rate goes from {rates[0]:.4g} to {rates[1]:.4g} at step 10"
    )
    assert finding.seen == line
    for change, line in (({"seed": 1}, r"run_folder: .*holds another run \(seed: 0 -> 1\)"), ({"steps": 20}, "its files need")):
        big = sizes if "seed" in change else (2.0**60, 2.0**60)
        findings = disks._as_train_says(dataclasses.replace(config, **change), 1, *big)
        assert [finding.level for finding in findings] == ["failure"]
        assert re.search(line, findings[0].seen)


def _folder(here: World, config: Config, other: str) -> list[list[str]]:
    if here.rank and other:
        config = dataclasses.replace(config, run_folder=other)
    with mock.patch.object(disks, "_VISIBLE_SECONDS", 0.3):
        return _rows(disks.folder(config, here, 1e6, 1e6)[0])


def test_a_run_folder_that_is_not_shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("node2")
    for rows in ranks.run(_folder, 2, _config(folder), str(elsewhere / "run")):
        assert rows[0][1] == "failure"
        assert "(rank 1): does not see what rank 0 wrote in" in rows[0][2]
        assert "share" in rows[0][3]
    assert not list(folder.glob(".check-*"))


def test_a_run_folder_that_cannot_be_written() -> None:
    config = Config(run_folder="/proc/run", global_batch_size=8, steps=1, data=DataConfig(shards="none"))
    for rows in ranks.run(_folder, 2, config, ""):
        assert rows[0][1] == "failure"
        assert rows[0][2].startswith("rank 0: /proc: ")


@pytest.mark.parametrize(("mib", "level"), [(1, "failure"), (4, "warning"), (64, "ok")])
def test_shared_memory_that_is_too_small(mib: int, level: str) -> None:
    """On one CPU rank with 2 workers a step takes 2.3 MiB, and the workers are at most 4 portions ahead of two steps."""
    config = Config(global_batch_size=8, device="cpu")
    assert cut(config, 1).portion_bytes / 2**20 == pytest.approx(2.3, abs=0.01)
    with mock.patch("simclr_dist.preflight.shared_memory.shared_memory", return_value=(mib * 2**20, mib * 2**20)):
        (finding,) = run_checks(config, World(0, 1, 0, torch.device("cpu")), ["memory"])[0]
    assert finding.level == level
    assert "data.workers: 1 x 2 workers share up to 13.8 MiB" in finding.seen
    assert ("docker run --shm-size" in finding.cure) == (level != "ok")


def test_the_table() -> None:
    findings = [Finding("clock", "warning", "late", "NTP"), Finding("folder", "failure", "not shared", "share it")]
    assert table(findings).splitlines()[1:3] == ["                    cure: NTP", "failure  folder     not shared"]
    assert table(findings).endswith("2 checks: 1 failed, 1 with a warning")
    assert failed(findings)
    assert not failed(findings[:1])


@pytest.mark.slow
def test_the_command(folder: Path) -> None:
    """Under the launcher, with two ranks: 0 when all is well, 1 when something is not."""
    training_runs.write_config(folder, folder / "shards")
    program = [sys.executable, "-m", "simclr_dist", "check", "config.yaml", "--processes", "2"]
    environment = {**os.environ, "PATH": "/nonexistent"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the distributed gradient is one process's" in done.stdout
    assert done.stdout.rstrip().endswith("11 checks: 0 failed, 0 with a warning")
    next((folder / "shards").glob("*.tar")).write_bytes(b"")
    done = subprocess.run(
        [*program, "--only", "shards"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "2 checks: 2 failed" in done.stdout, "one of each rank"
