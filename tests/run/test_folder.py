"""The run folder: entered by its own run and no other."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest

import simclr_dist
from simclr_dist.config.settings import Config, DataConfig, LogConfig, LossConfig
from simclr_dist.run.folder import check_run_folder, open_run, truncate_metrics
from simclr_dist.system.errors import ConfigError, TakenOverError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run_folder=str(tmp_path / "runs" / "x"), steps=10, data=DataConfig(shards="s"))


def test_a_new_folder_is_made_and_then_known(config: Config) -> None:
    run = Path(config.run_folder)
    assert not check_run_folder(config)
    assert not run.exists(), "looking changes nothing"
    open_run(config, {"torch": "2", "world_size": 2}).release()
    assert {path.name for path in run.iterdir()} - {"code"} == {"checkpoints", "config.yaml", "env.json", "heartbeat", "starts"}
    described = json.loads((run / "env.json").read_text())
    assert (described["torch"], described["world_size"]) == ("2", 2)
    assert described["packages"]["torch"] == importlib.metadata.version("torch")
    assert check_run_folder(config)
    open_run(config, {"torch": "3"}).release()
    assert json.loads((run / "env.json").read_text())["torch"] == "3"


def test_the_state_of_the_code_is_kept(config: Config) -> None:
    """Of a checkout: the revision, and the difference in a file of the run."""
    open_run(config, {}).release()
    code = json.loads((Path(config.run_folder) / "env.json").read_text())["code"]
    assert code["version"] == simclr_dist.__version__
    git = subprocess.run(
        ["git", "-C", Path(simclr_dist.__file__).parent, "rev-parse", "HEAD"], capture_output=True, check=False
    )
    if git.returncode == 0:
        assert code["revision"] == git.stdout.decode().strip()
    if code["diff"] is not None:
        assert (Path(config.run_folder) / code["diff"]).read_bytes().startswith(b"diff --git")


@pytest.mark.parametrize("name", ["config.yaml", "env.json"])
def test_a_start_that_is_taken_over_while_it_enters_writes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its machine is lost for a while in the middle of the file `name`."""
    run, real = Path(config.run_folder), os.fsync
    open_run(config, {"torch": "2"}).release()
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def slow(descriptor: int) -> None:
        if f".{name}." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            monkeypatch.setattr(os, "fsync", real)
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            open_run(dataclasses.replace(config, log=LogConfig(every=7)), {"torch": "3"}).release()
            before.update({path: (run / path).read_bytes() for path in ("config.yaml", "env.json")})
        real(descriptor)

    before: dict[str, bytes] = {}
    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(TakenOverError, match="taken over by"):
        open_run(config, {"torch": "4"})
    assert before == {path: (run / path).read_bytes() for path in before}
    assert len(before) == 2


def test_an_empty_folder_is_taken(config: Config) -> None:
    Path(config.run_folder).mkdir(parents=True)
    assert not check_run_folder(config)
    open_run(config, {}).release()
    assert check_run_folder(config)


@pytest.mark.parametrize("name", ["1e5", "no", "2024", "a b #c", "ä: [x]"])
def test_a_folder_of_any_name_is_known_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, run_folder=name)
    open_run(config, {}).release()
    assert check_run_folder(config)


def test_a_start_that_was_killed_can_be_repeated(config: Config) -> None:
    """Before config.yaml is in place the folder holds at most its temporary file."""
    run = Path(config.run_folder)
    run.mkdir(parents=True)
    (run / ".config.yaml.123.tmp").write_text("run_fol")
    assert not check_run_folder(config)
    open_run(config, {}).release()
    assert check_run_folder(config)


def test_config_yaml_comes_first(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            open_run(config, {}).release()
    open_run(config, {}).release()
    assert check_run_folder(config)


def test_what_may_change_does_and_is_written_down(config: Config) -> None:
    open_run(config, {}).release()
    longer = dataclasses.replace(
        config, steps=None, epochs=3.0, log=LogConfig(every=1), data=DataConfig(shards="elsewhere", workers=0)
    )
    assert check_run_folder(longer)
    open_run(longer, {}).release()
    assert check_run_folder(longer)
    assert "epochs: 3.0" in (Path(config.run_folder) / "config.yaml").read_text()


def test_another_run_is_refused_with_the_difference(config: Config) -> None:
    open_run(config, {}).release()
    before = (Path(config.run_folder) / "config.yaml").read_bytes()
    other = dataclasses.replace(config, seed=5, loss=LossConfig(temperature=0.5), steps=99)
    with pytest.raises(ConfigError) as caught:
        open_run(other, {"torch": "new"}).release()
    line = str(caught.value)
    assert "\n" not in line
    assert repr(config.run_folder) in line
    assert "(seed: 0 -> 5; loss.temperature: 0.1 -> 0.5)" in line
    assert "steps" not in line
    assert (Path(config.run_folder) / "config.yaml").read_bytes() == before
    assert "torch" not in json.loads((Path(config.run_folder) / "env.json").read_text())


@pytest.mark.parametrize("content", ["photo.jpg", ".hidden", "checkpoints/step-00000001.pt"])
def test_a_folder_of_something_else_is_refused(config: Config, content: str) -> None:
    path = Path(config.run_folder) / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is not a run folder; name another$"):  # never: remove it
        open_run(config, {}).release()
    assert path.read_text() == "mine"


def test_a_file_is_refused(config: Config) -> None:
    Path(config.run_folder).parent.mkdir()
    Path(config.run_folder).write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a run folder"):
        check_run_folder(config)


def test_a_damaged_config_yaml_is_refused(config: Config) -> None:
    open_run(config, {}).release()
    path = Path(config.run_folder) / "config.yaml"
    for text in ("seed: [", "seed: x\n", "sead: 1\n", ""):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
            check_run_folder(config)
        assert "\n" not in str(caught.value)


# metrics.jsonl


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (lines(10, 20, 30), 20, lines(10, 20)),
        (lines(10, 20, 30), 25, lines(10, 20)),
        (lines(10, 20, 30), 30, lines(10, 20, 30)),
        (lines(10, 20, 30), 0, ""),
        (lines(10, 20) + '{"step": 30, "lo', 30, lines(10, 20)),
        (lines(10, 20) + '{"step": 30, "lo', 10, lines(10)),
        (lines(10, 20)[:-1], 20, lines(10, 20)),
        ("", 5, ""),
    ],
)
def test_metrics_after_the_checkpoint_go(tmp_path: Path, before: str, step: int, after: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(before)
    truncate_metrics(tmp_path, step)
    assert (tmp_path / "metrics.jsonl").read_text() == after


def test_no_metrics_yet(tmp_path: Path) -> None:
    truncate_metrics(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
