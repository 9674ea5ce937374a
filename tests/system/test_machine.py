"""What a machine has, and what a container or a user may have of it."""

import os
import resource
from pathlib import Path

import pytest

from simclr_dist.system import machine


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (77, 77))
    memory, processes = machine.memory_bytes(), machine.most_processes()
    assert memory > 2**20
    assert processes == int(Path("/proc/sys/kernel/pid_max").read_text()), "no limit of a user binds root"
    for name in ("memory.max", "pids.max"):
        (tmp_path / name).write_text("max\n")
    assert (machine.memory_bytes(), machine.most_processes()) == (memory, processes)
    for name in ("memory.max", "pids.max"):
        (tmp_path / name).write_text("1000\n")
    assert (machine.memory_bytes(), machine.most_processes()) == (1000, 1000)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert machine.most_processes() == 77
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert machine.most_processes() == 1000


@pytest.mark.parametrize(
    ("said", "able"),
    [
        ("model name\t: an older one\nflags\t\t: fpu sse4_2 avx2 avx512f\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("cpu\t\t: POWER9\n", True),
        (None, True),
    ],
)
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, able: bool) -> None:
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.has_bfloat16() is able
