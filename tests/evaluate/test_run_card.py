"""How a run stands: what its folder says, in words, and the command that goes on."""

import os
import shlex
import shutil
import time
from pathlib import Path

import pytest

from run_folders import BASE, begun, evaluated
from simclr_dist.cli.main import main, make_parser
from simclr_dist.config.load import config_from_dict, load_config
from simclr_dist.run import claim
from simclr_dist.run.commands import typed
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import record_event, record_start


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Shown:
    """`simclr-dist status WORDS`: the card's lines by their titles."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        assert main(["status", *map(str, words)]) == 0
        self.text, error = capsys.readouterr()
        assert error == ""
        first, *lines = self.text.splitlines()
        self.run, self.lines = first, {line[2:13].strip(): line[14:] for line in lines}

    @property
    def next(self) -> str:
        """The command, without the program; it is one that the command line knows."""
        command = self.lines["next"].rpartition(f"{typed('simclr-dist')} ")[2]
        make_parser().parse_known_args(shlex.split(command))
        return command


def test_a_finished_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once evaluated the encoder leaves; before, it is measured on the split that lies beside the training's shards."""
    run = begun(Path("runs/mine"), data={"shards": "data/train"})
    for folder in ("runs/mine/encoders", "data/train", "data/test"):
        Path(folder).mkdir(parents=True)
    (run / "encoders" / "step-00000040.safetensors").touch()
    (run / "checkpoints" / "step-00000040.pt").touch()
    shown = Shown(capsys, "runs/mine")
    assert shown.run == "runs/mine"
    assert shown.lines["state"] == "done"
    assert shown.lines["step"] == "40 of 40 (100.0 %), 125 images/s"
    assert shown.lines["loss"] == "1.0000 (chance 0.00), partner nearest 0 %, at step 40"
    assert shown.lines["starts"] == "1, 0 steps lost between them; 1 rank-hours"
    assert shown.lines["checkpoint"].startswith("runs/mine/checkpoints/step-00000040.pt, ")
    assert shown.lines["encoder"] == "runs/mine/encoders/step-00000040.safetensors, not evaluated"
    assert f"process {os.getpid()} on {os.uname().nodename}, since " in shown.lines["last start"]
    assert shown.next == "eval runs/mine/encoders/step-00000040.safetensors --train data/train --test data/test"
    assert "copy" not in shown.lines
    evaluated(run, 40, knn=62.5, linear=64.0)
    shown = Shown(capsys, "runs/mine")
    assert shown.lines["encoder"] == "runs/mine/encoders/step-00000040.safetensors, kNN 62.50 @40, linear 64.00 @40"
    assert shown.next == "export runs/mine/encoders/step-00000040.safetensors step-00000040-hub/"


@pytest.mark.parametrize(
    ("state", "word"), [("preempted", "paused"), ("failed", "failed"), ("crashed", "crashed"), ("diverged", "diverged")]
)
def test_a_run_that_ended_before(here: Path, capsys: pytest.CaptureFixture[str], state: str, word: str) -> None:
    """What to type goes on, from anywhere; an encoder can be had of what is saved. A diverged run begins anew, slower."""
    begun(Path("runs/mine"), steps=20, state=state, optim={"base_lr": 0.3})
    shown = Shown(capsys, "runs/mine")
    assert shown.lines["state"] == f"{word}: because"
    again = "train runs/mine/config.yaml --processes 2"
    if state == "diverged":
        assert shown.next == f"{again} --run_folder runs/mine-lower --optim.base_lr 0.1"
        assert "or" not in shown.lines
        (here / "runs" / "below").mkdir()
        os.chdir("runs/below")
        lower = f"cd {here} && {typed('simclr-dist', here)} {again} --run_folder runs/mine-lower --optim.base_lr 0.1"
        assert Shown(capsys, "../mine").lines["next"] == lower
        Path("../mine/submission.json").write_text("{}")
        assert Shown(capsys, "../mine").next == (
            "submit ../mine/config.yaml --profile FILE --run_folder runs/mine-lower --optim.base_lr 0.1"
        )
        return
    assert shown.next == again
    assert shown.lines["or"] == f"{typed('simclr-dist')} export runs/mine  # an encoder of step 20"
    (here / "elsewhere").mkdir()
    os.chdir("elsewhere")
    for typed_path in ("../runs/mine", here / "runs/mine"):
        assert Shown(capsys, typed_path).lines["next"] == f"cd {here} && {typed('simclr-dist', here)} {again}"


def test_the_command_is_allowed_what_no_file_may_allow(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"shards": "pipe:cat x.tar", "reader": "stream", "samples": 80, "allow_pipe": True}
    begun(Path("run"), steps=20, state="preempted", data=data)
    words = shlex.split(Shown(capsys, "run").next)
    assert words[-2:] == ["--data.allow_pipe", "true"]
    assert load_config(words[1], words[-2:]).data.allow_pipe


def test_a_copy_goes_on_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    begun(Path("run"), steps=20, state="preempted")
    shutil.copytree("run", "copy")
    shown = Shown(capsys, "copy")
    assert shown.lines["copy"] == "of 'run', which is elsewhere; or that folder, moved"
    assert shown.next == "train copy/config.yaml --processes 2 --run_folder copy"


def test_a_run_on_several_machines_goes_on_as_it_was_begun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each of them, by `train --nnodes`, or by torchrun if that has started it."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    begun(Path("ours"), steps=20, state="preempted")
    assert Shown(capsys, "ours").next == (
        "train ours/config.yaml --nnodes 2 --rdzv-endpoint HOST:PORT  # on each of its 2 machines"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    begun(Path("theirs"), steps=20, state="preempted")
    assert Shown(capsys, "theirs").lines["next"] == (
        f"{typed('torchrun')} --nnodes 2 --rdzv-endpoint HOST:PORT --rdzv-backend c10d --nproc-per-node 1 -m simclr_dist"
        " train theirs/config.yaml  # on each of its 2 machines"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    begun(Path("one"), steps=20, state="preempted")
    assert Shown(capsys, "one").next == "train one/config.yaml --processes 2"


def test_a_run_of_an_older_version_has_its_steps_from_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Its ledger does not say them, and its settings say epochs."""
    ledger = begun(Path("run"), steps=20, state="preempted", length={"steps": None, "epochs": 4.0}) / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(', "total": 40', ""))
    assert Shown(capsys, "run").lines["step"].startswith("20 of 40 (50.0 %)")


def at_work(run: Path, step: int) -> claim.Claim:
    held = open_run(config_from_dict({**BASE, "steps": None, "epochs": 2.0, "run_folder": str(run)}, "test"), {})
    record_start(held, 0, 2, 50)
    (run / "metrics.jsonl").write_text('{"step": 9, "loss/dcl": 2.5, "timing": {"speed/images_per_second": 4.0}}\n')
    held.beat(step)
    return held


def test_a_run_at_work_here_and_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life counts for two minutes where no lock reaches; a copy of it is not at work."""
    held = at_work(Path("run"), 10)
    shown = Shown(capsys, "run")
    assert shown.lines["state"] == "running"
    assert shown.lines["step"] == "10 of 50 (20.0 %), 4 images/s, 0:01:20 left"
    assert shown.lines["loss"].startswith("2.5000 ")
    assert shown.lines["last start"].endswith("last heard of 0 s ago")
    assert shown.lines["next"] == "tail -f run/train.log"
    with (Path("run") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "timing": {"speed/images_per_second": 0.0}}\n' * 3)
    assert "left" not in Shown(capsys, "run").lines["step"]
    held.release()
    assert Shown(capsys, "run").lines["state"] == "killed: ended without a word; the same command goes on"
    monkeypatch.setattr(claim, "_file_system", lambda _: "nfs4")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert Shown(capsys, "run").lines["state"] == "running"
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 600)
    shown = Shown(capsys, "run")
    assert shown.lines["state"].startswith("killed")
    assert shown.lines["last start"].endswith("last heard of 10 min ago")


def test_a_run_of_slurms(capsys: pytest.CaptureFixture[str]) -> None:
    """It waits, has been cancelled, or was given up: so says the ledger, and SLURM is not asked."""
    run = begun(Path("run"), steps=20, state="preempted")
    (run / "submission.json").write_text("{}")
    record_event(run, "requeued", kind="train", job="7", why="SIGTERM", crash=False, saved=20)
    shown = Shown(capsys, "run")
    assert shown.lines["state"] == "waiting: SLURM job 7"
    assert shown.next == "submit logs -f run"
    record_event(run, "gave_up", kind="train", job="7", why="4 crashes in a row at step 20")
    shown = Shown(capsys, "run")
    assert shown.lines["state"] == "given up: 4 crashes in a row at step 20"
    assert shown.next == "submit resume run"
    record_event(run, "cancelled", kind="train", jobs=["7"])
    shown = Shown(capsys, "run")
    assert shown.lines["state"] == "cancelled"
    assert shown.next == "submit resume run"


def test_several_runs_make_the_table_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    begun(Path("runs/one"))
    begun(Path("runs/two"), steps=20, state="failed")
    at_work(Path("runs/three"), 10).release()
    Path("runs/photos").mkdir()
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert main(["runs", "runs"]) == 0
    assert capsys.readouterr().out == out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["run", "state", "steps"]
    assert [line[:3] for line in lines[1:4]] == [
        ["one", "done", "40/40"],
        ["three", "killed", "10/50"],
        ["two", "failed", "20/40"],
    ]
    assert "two: failed: because" in out
    assert "runs/photos: passed over: no run folder, and none in it" in out


def test_what_is_no_run_and_what_is_damaged_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bad = begun(Path("bad"))
    (bad / "config.yaml").write_text("{")
    Path("photos").mkdir()
    for words, said in (
        ([], "runs: no such folder; name a run folder, or a folder of them"),
        (["photos"], "photos: passed over: no run folder, and none in it"),
        (["bad"], "bad: passed over: bad/config.yaml: "),
    ):
        assert main(["status", *words]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith(f"simclr-dist: {said}")
        assert error.count("\n") == 1


def test_lines_that_are_damaged_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(Path("run"))
    with (run / "ledger.jsonl").open("a") as file:
        file.write("[1]\n")
    assert "1 of its 3 lines are damaged" in Shown(capsys, "run").lines["damaged"]
    (run / "eval").mkdir()
    (run / "eval" / "step-00000040.json").write_text("[]")
    assert "eval/step-00000040.json" in Shown(capsys, "run").lines["damaged"]


def test_a_command_may_have_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    held = at_work(Path("my run"), 10)
    assert shlex.split(Shown(capsys, "my run").lines["next"]) == ["tail", "-f", "my run/train.log"]
    held.release()


def test_it_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = at_work(Path("runs/three"), 10)
    begun(Path("runs/two"), steps=20, state="failed")

    def all_files() -> dict[str, tuple[bytes, int]]:
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in here.rglob("*") if path.is_file()}

    before = all_files()
    Shown(capsys, "runs/three")
    Shown(capsys)
    assert all_files() == before
    held.release()
