"""`simclr-dist train --sweep`: runs one after another, gone on with, and compared; by real processes."""

import signal
from pathlib import Path

import pytest

import training_runs
from forkserver import Command, completed
from simclr_dist.cli.main import main
from simclr_dist.config.load import config_from_dict
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import End, read_status, record_end, record_start

NAMES = ("base_lr=0.1", "base_lr=0.3")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.make_shards(tmp_path_factory.mktemp("images"), images=60)


@pytest.fixture
def here(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    training_runs.write_config(tmp_path, shards, run_folder="sweep", steps=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(run: Path, state: str, code: int, shards: Path) -> None:
    settings = training_runs.SETTINGS | {"data": training_runs.SETTINGS["data"] | {"shards": str(shards)}, "steps": 2}
    claim = open_run(
        config_from_dict({**settings, "run_folder": str(run), "optim": {**settings["optim"], "base_lr": 0.1}}, ""), {}
    )
    record_start(claim, 0, 1)
    record_end(run, claim.generation, End(state, code, "loss is nan"))
    claim.release()


@pytest.mark.slow
def test_one_after_another_stopped_and_gone_on_with(here: Path) -> None:
    words = ["train", "config.yaml", "--sweep", "optim.base_lr=0.1,0.3", "--max-restarts", "0"]
    with Command(main, [*words, "--steps", "3000"], here, {"STEP_PAUSE": "0.05"}) as sweep:
        training_runs.until(lambda: training_runs.steps_done(here / "sweep" / NAMES[0]) > 1 or sweep.poll() is not None)
        training_runs.os.kill(sweep.pid, signal.SIGTERM)
        out, err = sweep.communicate(60)
    assert sweep.returncode == 75, err
    assert "run 1 of 2: base_lr=0.1\n" in out
    assert not (here / "sweep" / NAMES[1]).exists(), "a stop is one of the whole sweep"
    steps = training_runs.steps_done(here / "sweep" / NAMES[0]) + 1
    done = completed(main, [*words, "--steps", str(steps)], here)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {steps - 1}" in done.stdout
    table = done.stdout.split("\nrun  ")[1].splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [[name, "done", f"{steps}/{steps}"] for name in NAMES]
    again = completed(main, [*words, "--steps", str(steps)], here)
    assert again.stdout.splitlines()[:2] == [f"{name}: is done" for name in NAMES]
    assert again.returncode == 0
    assert "run 1 of" not in again.stdout


def test_what_is_left_and_what_is_not(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(here / "sweep" / NAMES[0], "diverged", 3, shards)
    words = ["train", "config.yaml", "--sweep", "optim.base_lr=0.1,0.3", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    why = "has diverged (loss is nan), and would again; remove its folder to start it anew"
    assert said == f"{NAMES[0]}: {why}\nsweep/{NAMES[1]}\n"
    assert not (here / "sweep" / NAMES[1]).exists()


@pytest.mark.parametrize("state", ["done", "diverged"])
def test_a_run_of_other_settings_is_refused(here: Path, shards: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    """And not passed over: its folder has the name of values that it shares."""
    ended(here / "sweep" / NAMES[0], state, {"done": 0, "diverged": 3}[state], shards)
    words = ["train", "config.yaml", "--sweep", "optim.base_lr=0.1", "--dry-run"]
    assert main([*words, "--loss.temperature", "0.3"]) == 2
    line = f"--sweep: {NAMES[0]}: run_folder: 'sweep/{NAMES[0]}' holds another run (loss.temperature: 0.2 -> 0.3); name another"
    assert capsys.readouterr().err.startswith(f"simclr-dist: {line}")
    assert main(words) == 0
    assert capsys.readouterr().out.count("\n") == 1, "nothing is left to be listed"


def test_a_failed_run_is_started_again(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(here / "sweep" / NAMES[0], "failed", 2, shards)
    assert main(["train", "config.yaml", "--sweep", "optim.base_lr=0.1", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"sweep/{NAMES[0]}\n"
    assert read_status(here / "sweep" / NAMES[0])["state"] == "failed"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--sweep", "global_batch_size=24,100"],
            "--sweep: global_batch_size=100: global_batch_size: 100 is larger than the 60 ",
        ),
        (["--sweep", "seed=1", "--nnodes", "2"], "--sweep: goes with one machine; for several, `simclr-dist submit --sweep`"),
        (["--dry-run"], "--dry-run: goes with --sweep, whose runs it lists;"),
        (["--sweep", "sed=1"], "--sweep: sed=1: command line: sed: unknown key; did you mean 'seed'?"),
    ],
)
def test_what_is_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main(["train", "config.yaml", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err[: len(line) + 13]) == ("", f"simclr-dist: {line}")
    assert not (here / "sweep").exists()


def test_a_runs_folder_is_no_sweeps(here: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(here / "sweep", "failed", 2, shards)
    assert main(["train", "config.yaml", "--sweep", "seed=1"]) == 2
    line = "run_folder: 'sweep' holds a run, and a sweep's runs have folders in its own; name another"
    assert capsys.readouterr().err == f"simclr-dist: {line}\n"
