"""Damaged files of a run: each kind of damage to each file ends well, or in one line and exit code 2; never in a traceback.

A start here is the real command line, and in the place of the ranks what rank 0 does to these files, without a model.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

import training_runs as runs
from faults.damage import DAMAGES, OF_A_PLACE, damage
from forkserver import completed
from simclr_dist.cli import train
from simclr_dist.cli.exits import exit_code
from simclr_dist.cli.main import main
from simclr_dist.config.load import load_config
from simclr_dist.data.manifest import load_manifest
from simclr_dist.evaluate.result.page import _charts
from simclr_dist.launch.slurm.logs import tails
from simclr_dist.launch.slurm.status import describe
from simclr_dist.launch.slurm.submission import read_record
from simclr_dist.run.claim import newest_start
from simclr_dist.run.folder import open_run, read_metrics, truncate_metrics
from simclr_dist.run.status import note_death, outlook, read_ledger, read_notes, read_status, record_start, recorded
from simclr_dist.system.errors import UserError

STEP = 4
NOBODY = 65534
# One of them for each reader; of ledger and metrics a line in the middle is damaged, and the file where it says so.
FILES = (
    *("config.yaml", "env.json", "heartbeat", "status.json", "ledger.jsonl", "metrics.jsonl", "starts/00000002.json"),
    *("ledger.jsonl as a whole", "metrics.jsonl as a whole"),
)
RECORD = {
    "job_id": "7", "eval_job_id": None, "config": "c.yaml", "overrides": [], "working_directory": "/", "time": 1.0,
    "profile": {}, "evaluation": None,
}  # fmt: skip


def start(*_: object, **__: object) -> int:
    """In the place of the ranks: what rank 0 does to the run's files, on its way to the end."""
    run = Path("run")
    note_death(run)

    def rank() -> int:
        claim = open_run(load_config("config.yaml"), {"data_digest": load_manifest("shards").identity})
        with recorded(run, claim):
            record_start(claim, STEP, 1)
            truncate_metrics(run, STEP)
            claim.beat(STEP)
        return 0

    return exit_code(rank)


def as_nobody(arguments: Sequence[str]) -> int:
    """A start without root's rights."""
    os.umask(0)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    train.torchrun = start  # type: ignore[assignment]
    return main(arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run after two starts; everybody may read and write it."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        runs.make_shards(folder, images=24)
        shutil.rmtree(folder / "images")
        (folder / "config.yaml").write_text(runs.write_config(folder / "c", Path("shards"), steps=STEP).read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for _ in range(2):
                assert start() == 0
            (folder / "run/metrics.jsonl").write_text("".join(metrics_line(step) for step in range(1, STEP + 1)))
            (folder / "run/submission.json").write_text(json.dumps(RECORD))
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | (0o777 if path.is_dir() else 0o666))
        yield folder


def metrics_line(step: int) -> str:
    return json.dumps({"step": step, "loss/nt_xent": 1 / step, "loss/chance": 2.0, "timing": {"speed/step_ms": 1.0}}) + "\n"


@pytest.fixture
def here(template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        shutil.copytree(template, name, dirs_exist_ok=True)
        monkeypatch.chdir(name)
        for described in ("code_state", "packages"):  # git, and all distributions: what is slow
            monkeypatch.setattr(f"simclr_dist.run.folder.{described}", lambda *_: {})
        monkeypatch.setattr(train, "torchrun", start)
        yield Path(name)
        for path in Path(name).rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)


def refusal(error: str) -> str:
    lines = [line for line in error.splitlines() if not line.startswith("WARNING: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("simclr-dist: "), error
    return lines[0]


def refused(name: str, kind: str) -> bool:
    """What a start cannot make anew, or cannot know to be free."""
    return name == "config.yaml" or kind in OF_A_PLACE


def assert_mended(run: Path, name: str) -> None:
    """A start has gone well over it."""
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    beat = json.loads((run / "heartbeat").read_text())
    assert (beat["generation"], beat["step"], beat["ended"]) == (newest_start(run), STEP, True)
    assert json.loads((run / "env.json").read_text())["data_digest"] == load_manifest("shards").identity
    assert [entry["event"] for entry in read_ledger(run)][-2:] == ["start", "stop"]
    steps = [line["step"] for line in read_metrics(run)]
    if "metrics" not in name:
        assert steps == list(range(1, STEP + 1))
    elif "whole" not in name:
        assert set(range(1, STEP + 1)) - set(steps) <= {3, 4}, "the line, and the next one when its end is gone"


@pytest.mark.parametrize("kind", DAMAGES[:-1])
@pytest.mark.parametrize("name", FILES)
def test_a_start_mends_or_refuses(here: Path, capfd: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    path = here / "run" / name.split()[0]
    before = path.read_bytes()
    damage(path, kind, whole="whole" in name)
    damaged = None if kind in OF_A_PLACE else path.read_bytes()
    capfd.readouterr()
    code = main(["train", "config.yaml"])
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error
    if refused(name, kind):
        assert code == 2, error
        assert path.name in refusal(error) or "holds another run" in error
        assert damaged is None or path.read_bytes() == damaged, "as it was"
    else:
        assert code == 0, error
        assert_mended(here / "run", name)
        if name == "metrics.jsonl" and damaged != before:
            copies = list(path.parent.glob("metrics.jsonl.damaged-*"))
            assert [copy.read_bytes() for copy in copies] in ([], [damaged])
            assert bool(copies) == ("damaged lines are left out" in error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("name", [name for name in FILES if "whole" not in name])
def test_what_a_user_may_not_read_is_refused(here: Path, name: str) -> None:
    damage(here / "run" / name, "unreadable")
    done = completed(as_nobody, ["train", "config.yaml"], here)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 2, done.stderr
    assert name in refusal(done.stderr)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "submission.json"])
def test_whoever_looks_gets_an_answer(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """`status`, `submit status`, `eval --watch` and the page of a result."""
    run = here / "run"
    damage(run / name.split()[0], kind, whole="whole" in name)
    monkeypatch.setattr("simclr_dist.launch.slurm.scheduler.states", lambda jobs: ["RUNNING" for _ in jobs])
    _charts({"protocols": {}, "encoder": {"step": STEP}}, run)
    if name == "submission.json" and kind not in (
        "unreadable",
        "huge",
        "future",
        "negative",
        "nan",
    ):  # it has no number but a time
        with pytest.raises(UserError, match=r"^[^\n]*submission.json[^\n]*$"):
            read_record(run)
    else:
        text = describe(run, read_record(run))
        assert "RUNNING" in text
        if name != "config.yaml":  # without it there is SLURM's word alone
            assert "  step        4 of 4 (100.0 %)" in text or name == "heartbeat"
            assert "  loss        0.2500 (chance " in text or "metrics" in name
    outlook(run)
    assert read_status(run)["state"] == "done" or ("ledger" in name and "whole" in name)
    if name == "ledger.jsonl" and kind in ("list", "types"):
        assert "  damaged     " in describe(run, RECORD)


@pytest.mark.parametrize("kind", ["garbage", "no text", "empty", *OF_A_PLACE])
def test_a_damaged_log_is_shown_or_refused(here: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    (here / "7_0_log.out").write_text("step 1\n")
    damage(here / "7_0_log.out", kind)
    with pytest.raises(UserError, match=r"7_0_log.out: cannot be read") if kind == "folder" else nullcontext():
        for log in tails(here, "7"):
            log.copy()


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind not in OF_A_PLACE])
def test_a_rank_s_damaged_note_is_no_note(tmp_path: Path, kind: str) -> None:
    (tmp_path / "note.0").write_text(json.dumps({"state": "failed", "code": 2, "why": "x", "lost": False}))
    (tmp_path / "note.1").write_text(json.dumps({"state": "failed", "code": 2, "why": "y"}))
    damage(tmp_path / "note.0", kind)
    assert read_notes(tmp_path / "note")[1].why == "y"


def test_a_clock_far_ahead_holds_nobody_up_for_ever(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk of several machines the last sign of life counts."""
    monkeypatch.setattr("simclr_dist.run.claim._file_system", lambda _: "nfs4")
    monkeypatch.setattr("simclr_dist.run.claim.STALE_SECONDS", 0.5)
    beat = json.loads((here / "run/heartbeat").read_text())
    (here / "run/heartbeat").write_text(json.dumps({**beat, "time": 9e10, "ended": False}))
    (here / "run/starts/00000002.json").write_text('{"host": "far"}')
    assert main(["train", "config.yaml"]) == 0


def test_a_refusal_is_said_once_by_the_parent(here: Path) -> None:
    """By the real launcher, which would start ranks again."""
    (here / "run/config.yaml").write_bytes(b"\xff\xfe\x00")
    command = [str(Path(os.sys.executable).with_name("simclr-dist")), "train", "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run/config.yaml" in refusal(done.stderr)
