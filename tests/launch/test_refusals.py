"""What is refused once ranks run: one line, with the code of its error, and no report of torchrun's."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import training_runs as runs
from simclr_dist.cli.main import main
from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.launch import torchrun as launcher

# A rank that fails as the text after its number says; rank 0 otherwise waits for the others.
RANKS = """
import os, time
from simclr_dist.cli.exits import exit_code
from simclr_dist.system import signals
signals.die_with(os.getppid())
from simclr_dist.system.errors import DataError, RankError, SaveError, DivergedError
def work():
    if os.environ["RANK"] in os.environ["FAILS"]:
        raise {}
    time.sleep(120)
raise SystemExit(exit_code(work))
"""


def ended(folder: Path, command: Sequence[str], **variables: str) -> tuple[int, list[str]]:
    """The exit code of a command and what it has said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=110)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_a_shorter_length_than_the_run_has_is_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("something was started"))
    path = runs.write_config(Path(), runs.make_shards(tmp_path, images=48))
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text(write_yaml(load_config(path).to_dict()))
    Path("run/checkpoints/step-00000190.json").write_text("{}")
    assert main(["train", str(path), "--processes", "2", "--steps", "null", "--epochs", "20"]) == 2
    line = (
        "simclr-dist: epochs: 20, or 40 steps: the run in run has done 190 already; ask for more, or name another run_folder\n"
    )
    assert capsys.readouterr().err == line


def test_more_ranks_than_gpus_are_refused_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    path = runs.write_config(Path(), runs.make_shards(tmp_path, images=30))
    assert main(["train", str(path), "--processes", "3", "--device", "cuda"]) == 2
    line = "simclr-dist: --processes: 3 ranks need a GPU each, and this machine has 2; or set device: cpu\n"
    assert capsys.readouterr().err == line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "fails", "code", "line"),
    [
        ('DataError("a.tar: torn")', "01", 2, "a.tar: torn"),
        ('RankError("device: no GPU")', "1", 2, "device: no GPU"),
        ('PermissionError(13, "Permission denied", "a.tar")', "1", 1, "a.tar: Permission denied"),
        ('DivergedError("step 3")', "01", 3, "diverged: step 3"),
    ],
)
def test_ranks_that_refuse_end_all_with_one_line(tmp_path: Path, error: str, fails: str, code: int, line: str) -> None:
    """Also where one rank alone has seen it, and the others would wait for it."""
    (tmp_path / "refusing.py").write_text(RANKS.format(error))
    start = "import sys; from simclr_dist.launch.torchrun import torchrun; sys.exit(torchrun(2, ['refusing.py']))"
    assert ended(tmp_path, [sys.executable, "-c", start], FAILS=fails) == (code, [f"simclr-dist: {line}"])


@pytest.mark.slow
def test_under_a_torchrun_that_was_typed_its_report_is_short_and_names_the_reason(tmp_path: Path) -> None:
    """It reports all ranks that fail, and what it has to end. So one rank fails, and it has nothing to end."""
    (tmp_path / "refusing.py").write_text(RANKS.format('DataError("a.tar: torn")'))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "refusing.py"]
    code, lines = ended(tmp_path, torchrun, FAILS="0123")
    assert code == 1
    assert lines[0] == "simclr-dist: a.tar: torn"
    report = "\n".join(lines[1:])
    assert "SIGTERM" not in report
    assert "<NO_OTHER_FAILURES>" in report
    assert lines[-2] == "  traceback : a.tar: torn"
    assert len(lines) < 45, "with a part for each rank it would be longer"


@pytest.mark.parametrize(
    ("given", "more", "code"),
    [
        ("0,1,2,3,4,5,6,7", [], 1),
        ("0,1,2,3,4,5,6,7", ["--processes", "8"], 1),
        ("0,1,2,3,4,5,6,7", ["--processes", "16"], 2),  # never given
        ("MIG-1,MIG-2", ["--processes", "8"], 2),  # of which CUDA takes one
        ("", ["--processes", "8"], 2),
        (None, ["--processes", "8"], 2),
    ],
)
def test_a_gpu_that_slurm_gave_and_is_not_there_is_a_crash(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str | None,
    more: list[str],
    code: int,
) -> None:
    """Seven ranks in the place of eight would not divide the batch, and that would be refused for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    path = runs.write_config(Path(), runs.make_shards(tmp_path, images=30))
    assert main(["train", str(path), "--device", "auto", "--global_batch_size", "16", *more]) == code
    line = "simclr-dist: device: 'auto': 8 ranks need a GPU each; of the 8 that SLURM gave, 7 are here\n"
    assert (capsys.readouterr().err == line) == (code == 1)
