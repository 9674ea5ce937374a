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
