"""Cores that a process may use, by real affinities and quotas; threads that sleep while they wait, as libgomp itself says."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import training_runs as runs
from simclr_dist.cli.main import main
from simclr_dist.system import machine
from simclr_dist.system.machine import cores, threads_a_rank

COUNTS = """
import torch
from simclr_dist.method.distributed import process_group
from simclr_dist.system.machine import cores
with process_group("cpu"):
    print(cores(), torch.get_num_threads())
"""


def without_our_threads() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@pytest.fixture(params=["affinity", "quota"])
def bounded(request: pytest.FixtureRequest) -> Iterator[Callable[[], object]]:
    """What a child calls to be left with one core."""
    if request.param == "affinity":
        yield lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return
    root = Path("/sys/fs/cgroup")
    first = (root / "cpu" / "cgroup.procs").exists()  # version 1
    group = root / ("cpu" if first else "") / f"simclr_dist_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    quota, one_core = ("cpu.cfs_quota_us", "100000") if first else ("cpu.max", "100000 100000")
    try:
        if not (group / quota).exists():
            pytest.skip("no quota can be set here: the control group has no cpu controller")
        (group / quota).write_text(one_core)
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def test_a_bounded_process_has_as_many_threads_as_it_may_use_cores(bounded: Callable[[], object]) -> None:
    program = [sys.executable, "-c", COUNTS]
    done = subprocess.run(
        program, env=without_our_threads(), preexec_fn=bounded, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "1 1\n", done.stderr


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/a/b", {"cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),  # a group's parent binds it
        ("0::/a/b", {"cpu.max": "50000 100000"}, 1),  # as a container sees its own group, under a path of the host
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "6400000 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": ""}, 8),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("4:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_each_kind_of_quota(
    group: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text(group + "\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(machine, "_MINE", tmp_path / "mine")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores() == expected
    assert [threads_a_rank(ranks) for ranks in (1, 2, 16)] == [expected, max(1, expected // 2), 1]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["simclr_dist", "train", "config.yaml", "--processes", "2"], marks=pytest.mark.slow),
        ["simclr_dist.train", "config.yaml", "--data.shards", "elsewhere"],
        ["simclr_dist", "eval", "config.yaml", "--train", "shards", "--test", "shards"],
    ],
)
def test_threads_that_wait_do_not_spin(command: list[str], tmp_path: Path) -> None:
    runs.write_config(tmp_path, runs.make_shards(tmp_path, images=30), steps=3)
    environment = {**without_our_threads(), "OMP_DISPLAY_ENV": "VERBOSE"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    settings = [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert settings
    assert set(settings) == {"GOMP_SPINCOUNT = '1000'"}, done.stderr


def test_a_users_own_policy_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ  # which would count more


def test_a_users_own_spin_count_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    assert main(["--version"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "300000"
