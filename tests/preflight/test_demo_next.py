"""The demo's last lines are commands that this shell finds."""

import sys
from pathlib import Path

import pytest

from simclr_dist.preflight.demo.run import typed


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of an installation with a Python and a program, in a folder that is not the current one."""
    folder = tmp_path / "a clone" / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "simclr-dist"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_a_program_on_path_is_named(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(beside))
    assert typed("simclr-dist") == "simclr-dist"
    assert typed("tensorboard") == "tensorboard", "it is not there: nothing better is known"


def test_one_that_is_not_on_path_has_its_path(beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("PATH", str(other))
    assert typed("simclr-dist") == f"'{beside}/simclr-dist'"
    (other / "simclr-dist").touch(mode=0o755)
    assert typed("simclr-dist") == f"'{beside}/simclr-dist'", "PATH leads to another installation"
    monkeypatch.chdir(tmp_path / "a clone")
    assert typed("simclr-dist") == ".venv/bin/simclr-dist"
