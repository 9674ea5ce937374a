"""A path that is no encoder: the answer names one that is there, or says how there comes to be one."""

from pathlib import Path

import pytest

from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.names import check_is_file, encoder_path, encoders, newest_encoder, result_path, run_of_result
from simclr_dist.system.errors import DataError


def refused(path: str) -> str:
    with pytest.raises(DataError) as caught:
        load_encoder(path)
    line = str(caught.value)
    with pytest.raises(DataError) as again:
        check_is_file(path)
    assert str(again.value) == line
    assert "\n" not in line
    return line


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("a config of one's own makes no run of its folder")
    return tmp_path


@pytest.mark.parametrize("asked", ["runs/mine", "runs/mine/encoders", "runs/mine/encoders/step-00000001.safetensors"])
def test_a_run_with_encoders(here: Path, asked: str) -> None:
    (here / "runs/mine/encoders").mkdir(parents=True)
    for name in ("step-00000400.safetensors", "step-00001000.safetensors", "step-00001000.projector", ".step-00002000.tmp"):
        (here / "runs/mine/encoders" / name).touch()
    what = "no such file" if asked.endswith(".safetensors") else "a folder, not an encoder"
    assert refused(asked) == f"{asked}: {what}; the newest of this run is runs/mine/encoders/step-00001000.safetensors"


@pytest.mark.parametrize("asked", ["run", "run/encoders/x.safetensors"])
def test_a_run_without_one_yet(here: Path, asked: str) -> None:
    (here / "run" / "checkpoints").mkdir(parents=True)
    line = refused(asked)
    assert "the run run has none yet" in line
    assert "checkpoint.export_every" in line
    assert "`simclr-dist eval --watch run`" in line


@pytest.mark.parametrize("asked", ["runs/nope/encoders/x.safetensors", "x.safetensors", "photos"])
def test_nothing_of_a_run(here: Path, asked: str) -> None:
    (here / "photos").mkdir()
    what = "a folder, not an encoder" if asked == "photos" else "no such file"
    assert refused(asked) == f"{asked}: {what}; name an encoder of a run, RUN/encoders/step-XXXXXXXX.safetensors"


def test_a_file_is_taken(here: Path) -> None:
    (here / "e.safetensors").touch()
    check_is_file("e.safetensors")


def test_a_runs_encoders_and_results_are_found_by_their_names() -> None:
    paths = [encoder_path("runs/mine", step) for step in (900, 1000, 20_000)]
    paths[0].parent.mkdir(parents=True)
    assert newest_encoder("runs/mine") is None
    for path in reversed(paths):
        path.touch()
        path.with_suffix(".json").touch()
    assert encoders("runs/mine") == paths
    assert newest_encoder("runs/mine") == paths[-1]
    assert result_path(paths[0]) == Path("runs/mine/eval/step-00000900.json")
    assert run_of_result(result_path(paths[0])) == Path("runs/mine").absolute()
    assert run_of_result(Path("elsewhere/eval/step-00000900.json")) is None
