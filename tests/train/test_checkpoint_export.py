"""An encoder out of a checkpoint is the one that its run would have exported; a stopped run says how it is had."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import training_runs as runs
from simclr_dist.cli.main import main
from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.names import encoder_path
from terminal import INTERRUPT, terminal

PROGRAM = Path(sys.executable).with_name("simclr-dist")
NAME = "step-00000003"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/: 6 steps, of which each has a checkpoint, and steps 3 and 6 an encoder."""
    folder = tmp_path_factory.mktemp("trained")
    every = {"every": 1, "export_every": 3, "keep_last": 6}
    runs.write_config(folder, runs.make_shards(folder), checkpoint=every, model={"encoder": "resnet10", "projector_depth": 3})
    runs.train(folder, 1)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["export", *words]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["export", *words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error.removeprefix("simclr-dist: ").rstrip()


def test_it_is_the_runs_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the last byte, with card and projector; a run's step 3 whose encoder is gone, and a checkpoint that is named."""
    out = written(capsys, f"run/checkpoints/{NAME}.pt", "mine.safetensors")
    assert out.splitlines()[0] == "written: mine.safetensors"
    for suffix in (".json", ".projector", ".safetensors"):
        assert Path(f"mine{suffix}").read_bytes() == (here / "run/encoders" / f"{NAME}{suffix}").read_bytes(), suffix
    assert load_encoder("mine.safetensors").card["images"] == 205
    assert written(capsys, f"run/checkpoints/{NAME}.pt", "mine.safetensors").startswith("there already: mine.safetensors\n")
    assert refused(capsys, "run", "mine.safetensors") == (
        "export: 'mine.safetensors' is there already, with other content; name a new file"
    )
    written(capsys, "mine.safetensors", "new/theirs.safetensors")
    assert Path("new/theirs.safetensors").read_bytes() == Path("mine.safetensors").read_bytes()
    Path("file").touch()
    assert "file/theirs.safetensors: cannot be written: " in refused(capsys, "mine.safetensors", "file/theirs.safetensors")


def test_a_run_is_its_last_step_on_disk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest encoder, or a newer checkpoint, whose encoder goes to the others."""
    assert written(capsys, "run", "last.safetensors").startswith("written: last.safetensors\n")
    assert Path("last.projector").read_bytes() == (here / "run/encoders/step-00000006.projector").read_bytes()
    assert re.match(r"there already: run/encoders/step-00000006.safetensors\n\nNext:\n", written(capsys, "run"))
    whole = Path("last.safetensors").read_bytes()
    for path in (here / "run/encoders").glob("step-00000006*"):
        path.unlink()
    written(capsys, "run", "folder/")
    assert json.loads(Path("folder/model.json").read_text())["step"] == 6
    written(capsys, "run")
    assert encoder_path("run", 6).read_bytes() == whole
    assert main(["embed", "run", "run", "x.parquet"]) == 2, "what to embed is no source; the encoder was found"
    assert "run/encoders" not in capsys.readouterr().err


def test_an_older_checkpoint_does_not_know_the_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewritten(here, lambda state: state.pop("images"))
    written(capsys, str(path), "mine.safetensors")
    card = load_encoder("mine.safetensors").card
    assert "images" not in card
    assert card["data_digest"] is None


def rewritten(here: Path, change: object) -> Path:
    """A checkpoint of another content, with its seal."""
    from simclr_dist.run.checkpoint import save

    state = runs.checkpoint(here / "run", 3)
    assert callable(change)
    change(state)
    (here / "other").mkdir()
    return save(here / "other", 3, state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["model"].popitem(), "does not fit its own settings (Error(s) in loading state_dict"),
        (lambda state: state.pop("init"), "does not fit its own settings (init: is missing)"),
        (lambda state: state.update(images={"images": "many", "data_digest": None}), "does not fit its own settings (images"),
        (lambda state: state["config"].update(model={"encoder": "x"}), "does not fit its own settings ('x')"),
        (lambda state: state.update(step=4), "holds step 4, not that of its name"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself(
    here: Path, capsys: pytest.CaptureFixture[str], change: object, said: str
) -> None:
    path = rewritten(here, change)
    line = refused(capsys, str(path), "mine.safetensors")
    assert line.startswith(f"{path}: ")
    assert said in line
    assert not Path("mine.safetensors").exists()


def test_a_damaged_one_and_what_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "run/checkpoints" / f"{NAME}.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(capsys, str(path), "mine.safetensors").endswith(
        "damaged checkpoint: its bytes are not those that were written"
    )
    torch.save({}, "other.pt")
    assert refused(capsys, "other.pt", "mine.safetensors") == "other.pt: damaged checkpoint: it has no seal"
    (here / "empty" / "checkpoints").mkdir(parents=True)
    assert "the run empty has none yet" in refused(capsys, "empty")


@pytest.mark.slow
def test_train_ends_with_what_comes_next(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, whose one line tells how far it is; what is typed as it stands goes on to the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / name).symlink_to(trained / "shards")
    runs.write_config(tmp_path, Path("data/train"), steps=300, run_folder="runs/mine", checkpoint={"every": 100})
    with terminal([PROGRAM, "train", "config.yaml"], tmp_path) as shell:
        line = r"\rtraining: \d+ of 300 steps  loss \d\.\d{4} \(chance 3\.85\)  partner nearest \d+ %  \d+ img/s  0:..:.. left"
        shell.wait_for(line)
        shell.press(INTERRUPT)
        assert shell.close() == 75
    assert "everything is saved, and the same command goes on\n\nNext:\n" in shell.shown
    again, export = next_commands(shell.shown)
    assert export.startswith("export runs/mine  # an encoder of step ")
    with terminal([PROGRAM, *shlex.split(again)], tmp_path) as shell:
        assert shell.close() == 0
    (measure,) = next_commands(shell.shown)
    assert measure == "eval runs/mine/encoders/step-00000300.safetensors --train data/train --test data/test"


@pytest.mark.slow
def test_status_of_a_run_that_works_and_is_killed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write_config(tmp_path, trained / "shards", steps=100_000)
    run = tmp_path / "run"
    with runs.started(tmp_path, 1) as ranks:
        ranks.until(lambda: runs.last_step(run) >= 1)
        assert main(["status", str(run)]) == 0
        shown = capsys.readouterr().out
        assert "  state       running\n" in shown
        assert f"process {ranks.pid(0)} on " in shown
        assert " of 100000 (0.0 %), " in shown
        ranks.kill()
    assert main(["status", str(run)]) == 0
    assert "  state       killed: ended without a word; the same command goes on\n" in capsys.readouterr().out


def next_commands(shown: str) -> list[str]:
    lines = shown.rpartition("\nNext:\n")[2].splitlines()
    return [line.partition("simclr-dist ")[2] for line in lines if line.strip()]
