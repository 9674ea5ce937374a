"""The demo's last lines are commands that this shell finds; and it touches no files of others."""

import sys
from functools import partial
from pathlib import Path

import pytest

from simclr_dist.data.manifest import load_manifest
from simclr_dist.preflight.demo import run as demo
from simclr_dist.preflight.demo.images import write_demo_images
from simclr_dist.preflight.demo.run import typed
from simclr_dist.system.errors import DataError


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


def test_the_demo_removes_no_images_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DATA", tmp_path)
    monkeypatch.setattr(demo, "write_demo_images", partial(write_demo_images, train=20, test=10))
    mine = [tmp_path / "images" / "mine.jpg", tmp_path / "test" / "mine.jpg"]
    for path in mine:
        path.parent.mkdir()
        path.write_text("a picture")
    with pytest.raises(DataError, match=r"test: exists and is not empty; name a new folder$"):
        demo.prepare_images()
    assert [path.read_text() for path in mine] == ["a picture"] * 2
    assert len(load_manifest(tmp_path / "train")) == 20
    mine.pop().unlink()
    demo.prepare_images()
    assert len(load_manifest(tmp_path / "test")) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "test", "train"]
    assert mine[0].exists()
