"""Damaged files of a conversion: each kind of damage to each file ends well, or in one line and exit code 2."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults.damage import DAMAGES, damage
from simclr_dist.cli.main import main

COMMAND = ["shard", "images", "shards", "--processes", "1"]
BINARY = ("truncated", "empty", "zeros", "garbage", "list", "folder", "dangling")
NUMBERS = ("huge", "future", "negative", "nan")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that is done, with one image left out; and one of which the only part is done."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "images").mkdir()
    for k in range(3):
        Image.fromarray(np.full((18, 18, 3), k, np.uint8)).save(folder / "images" / f"{k}.png")
    (folder / "images/bad.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(COMMAND) == 0
        assert main([*COMMAND[:2], "parts", "--part", "1/1", *COMMAND[3:]]) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(template / "shards", tmp_path / "shards")
    shutil.copytree(template / "parts.partial", tmp_path / "parts.partial")
    (tmp_path / "images").symlink_to(template / "images")
    monkeypatch.chdir(tmp_path)


def answer(capfd: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    capfd.readouterr()
    code = main(command)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert code in (0, 2), error
    assert code == 0 or error.count("\n") == 1, error
    return code, error


@pytest.mark.parametrize("kind", DAMAGES[:-1])
@pytest.mark.parametrize("name", ["conversion.json", "rejected.jsonl"])
def test_of_a_finished_conversion(capfd: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    before = Path("shards", name).read_bytes()
    damage(Path("shards", name), kind)
    code, error = answer(capfd, *COMMAND)
    # Without its end the only line is taken for one that a kill has cut short; a link to nothing is no file.
    lost = name == "rejected.jsonl" and kind in ("truncated", "empty", "zeros", "dangling", *NUMBERS)
    assert lost or code == 2
    assert code == 0 or name in error or "exists and is not empty" in error
    assert kind in ("folder", "dangling") or Path("shards", name).read_bytes() != before or kind in NUMBERS, "left as it is"


@pytest.mark.parametrize("kind", BINARY)
def test_of_a_manifest(capfd: pytest.CaptureFixture[str], kind: str) -> None:
    damage(Path("shards/manifest.parquet"), kind)
    code, error = answer(capfd, *COMMAND)
    assert code == 2
    assert "manifest.parquet" in error


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("settings.json", kind) for kind in DAMAGES if kind != "unreadable"),
        *(("units/000000.arrow", kind) for kind in BINARY),
    ],
)
def test_of_an_unfinished_conversion(capfd: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    damage(Path("parts.partial", name), kind)
    code, error = answer(capfd, *COMMAND[:2], "parts", "--finish", *COMMAND[3:])
    assert code == 0 or "parts" in error
