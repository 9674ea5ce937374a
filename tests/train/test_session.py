"""`simclr_dist.train(config)`: from a script, under an interrupt, and when the caller is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import simclr_dist
import training_runs
from simclr_dist.config.load import config_of, load_config
from simclr_dist.config.settings import Config, OptimConfig
from simclr_dist.run.status import End, end_of, read_status
from simclr_dist.system import errors
from simclr_dist.train import session

# No `if __name__`, and a torch of its own beside it: our processes import neither.
SCRIPT = """
import os, sys, threading
import simclr_dist
os.environ |= {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}  # left behind by something else
print("begins", flush=True)
try:
    run = simclr_dist.train("config.yaml", {"steps": int(sys.argv[1])}, say=lambda line: print("|", line, flush=True))
except KeyboardInterrupt:
    sys.exit("interrupted, and it is ours to go on")
print(run.state, run.step, run.encoder, sorted(run.metrics)[:2])
print(simclr_dist.load_encoder(run.encoder).card["step"])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.make_shards(tmp_path_factory.mktemp("images"), images=60)


@pytest.fixture
def here(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    training_runs.write_config(tmp_path, shards)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(folder: Path, steps: int, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "script.py", str(steps)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_script_trains_is_interrupted_and_goes_on(here: Path) -> None:
    """A terminal interrupts the script's whole group; Jupyter does the same to a kernel's."""
    with started(here, 3000, {"STEP_PAUSE": "0.05"}) as script:
        training_runs.until(lambda: training_runs.steps_done(here / "run") > 1 or script.poll() is not None)
        script.send_signal(signal.SIGINT)
        out, err = script.communicate(timeout=60)
    assert err == "interrupted, and it is ours to go on\n"
    assert script.returncode == 1
    assert out.startswith("begins\n| "), out
    assert "| simclr-dist: stopped by SIGTERM: everything is saved, and the same command goes on\n" in out
    assert read_status(here / "run")["state"] == "preempted"
    done = training_runs.steps_done(here / "run")
    with started(here, done + 2) as script:
        out, err = script.communicate(timeout=60)
    assert (script.returncode, err) == (0, ""), out + err
    lines = out.splitlines()
    assert any(f"resumed at step {done}" in line for line in lines)
    encoder = f"run/encoders/step-{done + 2:08d}.safetensors"
    assert lines[-2] == f"done {done + 2} {encoder} ['data/bad_samples', 'embedding/alignment']"
    assert lines[-1] == str(done + 2)
    assert [event["steps_lost"] for event in training_runs.events(here / "run", "start")] == [0, 0]


@pytest.mark.slow
def test_a_caller_that_is_killed_leaves_a_paused_run(here: Path) -> None:
    """And no file elsewhere."""
    (here / "tmp").mkdir()
    with started(here, 3000, {"STEP_PAUSE": "0.05", "TMPDIR": str(here / "tmp")}) as script:
        training_runs.until(lambda: training_runs.steps_done(here / "run") > 1 or script.poll() is not None)
        script.kill()
        script.communicate(timeout=60)
    training_runs.until(lambda: read_status(here / "run")["state"] == "preempted")
    training_runs.until(lambda: not list((here / "tmp").iterdir()))
    assert [event["why"] for event in training_runs.events(here / "run", "stop")] == ["SIGTERM"]


def test_errors_are_the_librarys(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the config, before a process starts; and those that the command finds, by its note."""
    lines: list[str] = []
    with pytest.raises(errors.ConfigError, match=r"^config.yaml with overrides: loss.temperature: -1.0 must be above 0$"):
        simclr_dist.train("config.yaml", {"loss.temperature": -1.0}, say=lines.append)
    assert not lines
    with pytest.raises(errors.DataError, match=r"^nowhere: ") as refused:
        simclr_dist.train("config.yaml", {"data.shards": "nowhere"}, say=lines.append)
    assert lines == [f"simclr-dist: {refused.value}"]
    (here / "run").mkdir()
    (here / "run" / "mine.txt").touch()
    with pytest.raises(errors.ConfigError, match=r"^run_folder: 'run' exists and is not a run folder; name another$"):
        simclr_dist.train(load_config("config.yaml"), say=lines.append)
    with pytest.raises(errors.ConfigError, match=r"^--processes: "):
        simclr_dist.train("config.yaml", {"run_folder": "new", "device": "cuda"}, processes=24, say=lines.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(errors.ConfigError, match=r"^train: starts ranks itself; call it in one process"):
        simclr_dist.train("config.yaml", say=lines.append)


@pytest.mark.slow
def test_an_error_of_the_caller_stops_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP_PAUSE", "0.05")

    def say(line: str) -> None:
        if line.startswith("step 2/"):
            raise OSError("the notebook's page has gone")

    with pytest.raises(OSError, match="page has gone"):
        simclr_dist.train("config.yaml", {"steps": 3000}, say=say)
    assert read_status(here / "run")["state"] == "preempted"


@pytest.mark.parametrize(
    ("code", "end", "kind"),
    [
        (2, end_of(errors.DataError("why")), errors.DataError),
        (2, end_of(errors.TakenOverError("why")), errors.TakenOverError),
        (2, End("failed", 2), errors.UserError),
        (2, End("failed", 2, error="reason_of"), errors.UserError),
        (3, End("failed", 3), errors.DivergedError),
        (75, End("failed", 75), errors.StoppedError),
        (1, End("failed", 1), errors.CrashedError),
        (-9, End("crashed", -9), errors.CrashedError),
    ],
)
def test_each_exit_code_is_an_error(code: int, end: End, kind: type[Exception]) -> None:
    error = session._error(code, end, "why")
    assert (type(error), str(error)) == (kind, "why")


def test_the_function_and_the_room_have_one_name() -> None:
    """Whatever was imported before."""
    code = "import simclr_dist{}; from simclr_dist import train; assert callable(train); assert callable(simclr_dist.train)"
    code += (
        "; import inspect; assert 'overrides' in inspect.signature(simclr_dist.train).parameters; import simclr_dist.train.loop"
    )
    for before in ("", ".train", ".train.profiling"):
        subprocess.run([sys.executable, "-c", code.format(before)], check=True)


SETTINGS: dict[str, Any] = {"run_folder": "r", "global_batch_size": 8, "steps": 3, "data": {"shards": "s"}}


def test_a_config_a_mapping_and_a_file_are_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{run_folder: r, global_batch_size: 8, steps: 3, data: {shards: s}, optim: {base_lr: 0.1}}"
    )
    expected = load_config(tmp_path / "c.yaml")
    assert config_of(tmp_path / "c.yaml", {}) == expected
    assert config_of(SETTINGS | {"optim.base_lr": 0.1}, {}) == expected
    assert config_of({**SETTINGS, "run_folder": Path("r")}, {"optim": {"base_lr": 0.1}}) == expected
    assert config_of(expected, {}) == expected
    assert config_of(expected, {"optim.base_lr": 1}).optim.base_lr == 1.0
    (tmp_path / "part.yaml").write_text("{run_folder: r, global_batch_size: 8, steps: 3, optim: {base_lr: 0.1}}")
    assert config_of(tmp_path / "part.yaml", {"data.shards": "s"}) == expected, (
        "which is whole with overrides, as on a command line"
    )


@pytest.mark.parametrize(
    ("config", "overrides", "line"),
    [
        ({"loss.temprature": 1}, {}, "config: loss.temprature: unknown key; did you mean 'loss.temperature'?"),
        ({}, {"optim.lr": 1}, "overrides: optim.lr: unknown key; did you mean 'optim.base_lr'?"),
        ({}, {"steps": "3"}, "overrides: steps: '3' is not a whole number"),
        ({}, {3: 4}, "overrides: 3: unknown key"),
        ({"data.shards": ""}, {}, "config: data.shards: '' is empty; name a folder that `simclr-dist shard` wrote"),
        ({"data": 3}, {}, "config: data: expected settings below it, found 3"),
    ],
)
def test_what_is_refused(config: dict[str, Any], overrides: dict[Any, Any], line: str) -> None:
    with pytest.raises(errors.ConfigError) as refused:
        config_of(SETTINGS | config, overrides)
    assert str(refused.value) == line


def test_a_config_made_in_python_is_checked() -> None:
    with pytest.raises(errors.ConfigError, match=r"^config: optim.base_lr: 'high' is not a number$"):
        config_of(Config(run_folder="r", optim=OptimConfig(base_lr="high")), {})  # type: ignore[arg-type]  # on purpose


def test_a_file_does_not_allow_itself_commands(tmp_path: Path) -> None:
    data = "{shards: 'pipe:cat x.tar', allow_pipe: true, reader: stream, samples: 9}"
    (tmp_path / "c.yaml").write_text(f"{{run_folder: r, global_batch_size: 8, steps: 3, data: {data}}}")
    with pytest.raises(errors.ConfigError, match="no file may allow itself"):
        config_of(tmp_path / "c.yaml", {})
    for allowed in ({"data.allow_pipe": True}, {"data": {"allow_pipe": True}}):
        assert config_of(tmp_path / "c.yaml", allowed).data.allow_pipe
