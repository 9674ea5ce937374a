"""W&B, MLflow and Trackio beside TensorBoard: the same numbers, each step once, and no harm from a logger that is ill."""

import configparser
import importlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import training_runs as runs
from simclr_dist.cli.main import main as simclr_dist
from simclr_dist.cli.train import main
from simclr_dist.config.settings import Config
from simclr_dist.config.together import LOGGERS
from simclr_dist.run import loggers
from simclr_dist.run.folder import read_metrics
from simclr_dist.system import files

# What stands for a logger's package: it writes down what it is told, and does what ILL says before it.
STAND_IN = """
import json, os, sys, time
def note(*words):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(words) + chr(10))
def ill(where):
    if os.environ.get("ILL") == f"fails {where}":
        raise RuntimeError(f"no room in {where}")
    while os.environ.get("ILL") == f"hangs {where}":
        time.sleep(1)
class Run:
    def log(self, values, step):
        ill("log")
        note("log", step, values)
    def finish(self):
        ill("finish")
        note("finish")
def init(name, resume, config, **_):
    ill("init")
    variables = {key: os.environ.get(key) for key in ("WANDB_MODE", "DO_NOT_TRACK", "TRACKIO_DIR")}
    note("init", name, resume, config["run_folder"], variables)
    return Run()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is Trackio, and writes here."""
    package = tmp_path / "packages" / "trackio.py"
    package.parent.mkdir()
    package.write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    return tmp_path / "notes"


def heard(notes: Path, kind: str) -> list[Any]:
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return [words[1:] for words in lines if words[0] == kind]


def config(shards: Path, name: str = "trackio", steps: int = 10) -> str:
    return str(runs.write_config(Path(), shards, steps=steps, log={"every": 1, "tensorboard": False, name: True}))


def go_back_to_step_5() -> None:
    """As after a kill: the last checkpoint is that of step 5, and what came after it has been logged."""
    for path in [*Path("run/checkpoints").glob("*10*"), *Path("run/encoders").iterdir()]:
        path.unlink()


def test_the_same_numbers_and_each_step_once(shards: Path, notes: Path) -> None:
    path = config(shards)
    assert main([path]) == 0
    go_back_to_step_5()
    assert main([path, "--steps", "12"]) == 0
    logged = heard(notes, "log")
    assert [step for step, _ in logged] == list(range(1, 13))
    lines = {int(line["step"]): line for line in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())}
    for step, values in (logged[0], logged[-1]):
        assert values == {k: v for k, v in lines[step].items() if k not in ("step", "timing")} | lines[step]["timing"]
    (first, _, folder, environment), (second, resume, _, _) = heard(notes, "init")
    assert (first, resume, folder) == (second, "allow", "run")
    assert environment == {"WANDB_MODE": "offline", "DO_NOT_TRACK": "1", "TRACKIO_DIR": str(Path("run/trackio").resolve())}
    assert len(heard(notes, "finish")) == 2


def test_a_killed_run(shards: Path, notes: Path) -> None:
    """The logger's process outlives it to say the rest. Steps that are taken again are not said again."""
    config(shards, steps=200)
    environment = {name: os.environ[name] for name in ("NOTES", "PYTHONPATH")}
    with runs.started(Path(), 1, environment=environment) as ranks:
        ranks.until(lambda: runs.last_step(Path("run")) >= 8)
        ranks.kill()
    runs.until(lambda: len(heard(notes, "finish")) == 1)
    killed = runs.last_step(Path("run"))
    assert [step for step, _ in heard(notes, "log")] == list(range(1, killed + 1))
    assert killed > 8 or killed % 5, "there is something to take again"
    assert main([config(shards, steps=killed + 3), "--checkpoint.every", "4"]) == 0
    assert [step for step, _ in heard(notes, "log")] == list(range(1, killed + 4))


def test_one_that_hangs_ends_soon_after_a_killed_training(shards: Path, notes: Path, tmp_path: Path) -> None:
    """Else it would be there for ever, and hold up the logger of the next start."""
    (tmp_path / "packages" / "sitecustomize.py").write_text(
        "import signal\nreal = signal.alarm\nsignal.alarm = lambda _: real(1)"
    )
    config(shards, steps=200)
    environment = {"NOTES": os.environ["NOTES"], "PYTHONPATH": os.environ["PYTHONPATH"], "ILL": "hangs log"}
    with runs.started(Path(), 1, environment=environment) as ranks:
        ranks.until(lambda: heard(notes, "init"))
        ranks.kill()
    with Path("run/loggers/trackio.log").open("rb") as log:
        runs.until(lambda: files.lock(log.fileno()))


def test_a_damaged_line_is_left_out(shards: Path, notes: Path) -> None:
    """As what stands there once a later start has cut the file, or a disk has failed."""
    path = config(shards)
    assert main([path]) == 0
    Path("run/loggers/trackio.json").unlink()
    lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text("".join([*lines[:3], lines[3][50:], "null\n", *lines[4:]]))
    follower = loggers.Follower("trackio", Path("run"), pytest.fail)
    loggers.end_all([follower])
    assert [step for step, _ in heard(notes, "log")[10:]] == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_the_environment_may_say_otherwise(shards: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("TRACKIO_DIR", "/elsewhere")
    assert main([config(shards, steps=3)]) == 0
    assert heard(notes, "init")[0][3] == {"WANDB_MODE": "online", "DO_NOT_TRACK": "1", "TRACKIO_DIR": "/elsewhere"}


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_fails_or_hangs_costs_a_warning(
    where: str, shards: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And what was missed is sent by the next start, for which nothing is left to train."""
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 2.0)
    path = config(shards)
    for ill, words in (("fails", "exit code 1 (RuntimeError: no room in"), ("hangs", "did not end within 2 s")):
        monkeypatch.setenv("ILL", f"{ill} {where}")
        began = time.monotonic()
        monkeypatch.setattr(loggers, "CLOSE_SECONDS", 60.0 if ill == "fails" else 2.0)
        assert main([path, "--run_folder", ill]) == 0
        warnings = [line for line in capfd.readouterr().out.splitlines() if "WARNING" in line]
        assert len(warnings) == 1, warnings
        assert words in warnings[0]
        assert f"{ill}/loggers/trackio.log; training goes on" in warnings[0]
        assert time.monotonic() - began < 60
        assert len(read_metrics(Path(ill))) == 10
        monkeypatch.delenv("ILL")
        monkeypatch.setattr(loggers, "CLOSE_SECONDS", 60.0)
        assert main([path, "--run_folder", ill]) == 0
        assert [step for step, _ in heard(notes, "log")] == list(range(1, 11))
        notes.unlink()


def test_one_that_does_not_read_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Path) -> None:
    (tmp_path / "packages" / "sitecustomize.py").write_text(
        "import time\nif 'trackio' in __import__('sys').orig_argv: time.sleep(600)"
    )
    follower = loggers.Follower("trackio", tmp_path, print)
    for _ in range(1 << 17):  # twice what a pipe holds
        follower.poke()
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    loggers.end_all([follower])


def test_all_are_told_of_the_end_before_one_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Path) -> None:
    """Their times do not add up. Here the first ends only when the second has."""
    (tmp_path / "packages" / "sitecustomize.py").write_text("""
import os, sys, time
if "wandb" in sys.orig_argv:
    while b"q" not in os.read(0, 9):
        pass
    open(os.environ["NOTES"], "w").close()
while "trackio" in sys.orig_argv and not os.path.exists(os.environ["NOTES"]):
    time.sleep(0.1)
if "simclr_dist.run.loggers" in sys.orig_argv:
    os._exit(0)
""")
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 60.0)
    warnings: list[str] = []
    loggers.end_all([loggers.Follower(name, tmp_path, warnings.append) for name in ("trackio", "wandb")])
    assert not warnings


def test_runs_that_begin_at_once_share_mlflows_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that it is not there, and one makes it."""
    pytest.importorskip("mlflow")
    from mlflow.exceptions import MlflowException

    client = Mock()
    client.get_experiment_by_name.side_effect = [None, Mock(experiment_id="7")]
    client.create_experiment.side_effect = MlflowException("already exists")
    monkeypatch.setattr("mlflow.tracking.MlflowClient", lambda: client)
    loggers.OPENERS["mlflow"](tmp_path, Config(), "")
    assert client.create_run.call_args.args == ("7",)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_one_line(
    name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any rank starts. The folder that an earlier run of it has made here is not taken for the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / name).mkdir()
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr(
        importlib.machinery.PathFinder,
        "find_spec",
        lambda of, path=None, target=None: find(of, [str(tmp_path)] if of == name else path, target),
    )
    monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    assert simclr_dist(["train", config(shards, name)]) == 2
    line = f"log.{name}: True: the package {name} is not installed; pip install '{LOGGERS[name][0]}'"
    assert line in capsys.readouterr().err
    assert not Path("run").exists()


def test_the_extras_are_what_the_line_says() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    for name, needed in LOGGERS.items():
        assert tuple(setup["options.extras_require"][name].split()) == needed


def of_wandb(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Read the history out of its files: a header of 7 bytes, then LevelDB's records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        content, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            whole += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record, whole = Record.FromString(whole), b""
                if record.WhichOneof("record_type") == "history":
                    items = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
                    yield record.history.step.num, items


def of_mlflow(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    with sqlite3.connect(run / "mlflow.db") as database:
        assert [row[0] for row in database.execute("select status from runs")] == ["FINISHED"]
        assert dict(database.execute("select key, value from params"))["loss.temperature"] == "0.2"
        rows = list(database.execute("select step, key, value from metrics order by step"))
    for step in dict.fromkeys(row[0] for row in rows):
        yield step, {key: value for at, key, value in rows if at == step}


def of_trackio(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    with sqlite3.connect(run / "trackio" / "simclr_dist.db") as database:
        for step, text in database.execute("select step, metrics from metrics order by id"):
            yield step, json.loads(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_by_the_real_package(name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from its checkpoint is one run there, each step once, with TensorBoard's names and numbers."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs pip install {name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 120.0)
    path = config(shards, name)
    assert main([path]) == 0
    go_back_to_step_5()
    assert main([path, "--steps", "12"]) == 0
    logged = list({"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}[name](Path("run")))
    assert [step for step, _ in logged] == list(range(1, 13))
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    wanted = {key: value for key, value in {**line, **line["timing"]}.items() if key not in ("step", "timing")}
    assert {key: value for key, value in logged[-1][1].items() if not key.startswith("_")} == pytest.approx(wanted)
