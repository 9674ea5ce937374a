"""Saves against kill -9 and power failure: at any moment there is a checkpoint on disk, and what was saved stays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from faults import killed_saves, traced
from simclr_dist.run.checkpoint import load_newest, save, saved_steps

KILLS = int(os.environ.get("SIMCLR_DIST_KILLS", "15"))  # of the save loop

SAVE = """
import sys
from pathlib import Path
import torch
from simclr_dist.run.checkpoint import save
save(Path(sys.argv[1]), 2, {"step": 2, "weight": torch.zeros(500_000)}, keep_last=1)
"""


@pytest.mark.slow
def test_killed_at_any_moment_nothing_saved_is_lost(tmp_path: Path) -> None:
    """In a process of its own, which must have no threads."""
    command = [sys.executable, killed_saves.__file__, str(tmp_path / "checkpoints"), str(KILLS), "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ("kills", "unloadable", "lost")} == {"kills": KILLS, "unloadable": 0, "lost": 0}
    assert found["saves"] > KILLS / 5, "hardly a save was finished, so hardly one could be lost"
    assert found["cut_off"] > KILLS / 10, "hardly a kill came while one was written"


@pytest.mark.slow
def test_system_calls_come_in_the_order_that_survives_a_power_failure(tmp_path: Path) -> None:
    """A kill does not show it, since the kernel still writes what it has."""
    if reason := traced.why_not():
        pytest.skip(reason)
    folder = tmp_path / "checkpoints"
    save(folder, 1, {})
    calls = traced.disk_calls([sys.executable, "-c", SAVE, str(folder)], folder, tmp_path / "trace")
    assert [tuple(re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"TEMPORARY(\1)", word) for word in call) for call in calls] == [
        ("write", "TEMPORARY(step-00000002.pt)"),
        ("fsync", "TEMPORARY(step-00000002.pt)"),
        ("rename", "TEMPORARY(step-00000002.pt)", "step-00000002.pt"),
        ("fsync", "checkpoints"),
        ("write", "TEMPORARY(step-00000002.json)"),
        ("fsync", "TEMPORARY(step-00000002.json)"),
        ("rename", "TEMPORARY(step-00000002.json)", "step-00000002.json"),
        ("fsync", "checkpoints"),
        ("unlink", "step-00000001.json"),
        ("unlink", "step-00000001.pt"),
    ]
    assert saved_steps(folder) == [2]
    assert load_newest(folder, report=pytest.fail) is not None


def test_a_trace_is_read() -> None:
    log = """\
7 write(3</run/a.tmp>, ""..., 4096) = 4096
7 write(3</run/a.tmp>, ""..., 10) = 10
7 fsync(3</run/a.tmp> <unfinished ...>
8 write(1</tmp/log>, ""..., 3) = 3
8 unlink("/run/b") = -1 ENOENT (No such file or directory)
7 <... fsync resumed>)             = 0
7 rename("/run/a.tmp", "/run/a") = 0
7 fsync(4</run>)                    = 0
7 fsync(4</running>)                = 0
7 unlinkat(AT_FDCWD, "/run/old", 0) = 0
7 --- SIGCHLD {si_signo=SIGCHLD} ---
7 +++ exited with 0 +++
"""
    assert traced.parse(log, Path("/run")) == [
        ("write", "a.tmp"),
        ("fsync", "a.tmp"),
        ("rename", "a.tmp", "a"),
        ("fsync", "run"),
        ("unlinkat", "old"),
    ]
