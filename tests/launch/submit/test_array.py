"""A sweep as a job array: what is sent, what a task of it runs, and what is left when it is sent again."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from simclr_dist.config.load import load_config
from simclr_dist.encoder.names import encoder_path
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import End, read_ledger, record_end
from stand_ins import Command, StandIns, refused

SWEEP = ["config.yaml", "--profile", "profile.yaml", "--sweep", "optim.base_lr=0.1,0.3", "--run-folder", "sweep"]
NAMES = ("base_lr=0.1", "base_lr=0.3")


def alive(slurm: StandIns, *jobs: str) -> None:
    for job in jobs:
        (slurm.folder / f"{job}.state").write_text("PENDING|Resources||0:00\n")


def test_a_sweep_is_one_array_and_each_run_has_its_task(here: Path, slurm: StandIns, command: Command) -> None:
    code, out, err = command(*SWEEP)
    assert (code, err) == (0, "")
    sweep = here / "sweep"
    assert out.splitlines() == [
        *(f"job 100_{task}: {sweep / name}, 2 x 2 ranks" for task, name in enumerate(NAMES)),
        f"next: simclr-dist runs {shlex.quote(str(sweep))}; `scancel 100` would end all of them",
    ]
    script = (slurm.folder / "100.sh").read_text()
    assert script == (sweep / "slurm" / "100_submission.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --job-name=sweep\n" in script
    for task, name in enumerate(NAMES):
        run = sweep / name
        record = json.loads((run / "submission.json").read_text())
        assert (record["job_id"], record["eval_job_id"]) == (f"100_{task}", None)
        assert [(line["event"], line["job"]) for line in read_ledger(run)] == [("submitted", f"100_{task}")]
        job = DelayedSubmission.load(run / "slurm" / f"100_{task}_submitted.pkl").function
        assert (job.run, job.command[-1]) == (str(run), str(run / "slurm" / "config.yaml"))
        assert f"base_lr: {name[-3:]}\n" in (run / "slurm" / "config.yaml").read_text()
    assert sorted(path.name for path in (sweep / "slurm").iterdir()) == ["100_submission.sh"]


def test_a_task_runs_its_own_run_and_logs_there(here: Path, slurm: StandIns, command: Command) -> None:
    """bash on the real script, as SLURM starts it for task 1, whose own number is another than the array's."""
    assert command(*SWEEP)[0] == 0
    slurm.write("srun", '#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n/usr/bin/env > {folder}/env\nexit 2\n')
    slurm.write("bash", '#!/bin/sh\nexec /bin/bash "$@"\n')
    shown = (
        r" JobState=RUNNING Reason=None Dependency=(null)\n Requeue=1 Restarts=0 BatchFlag=1\n RunTime=00:01:00\n NodeList=n1 "
    )
    slurm.write("scontrol", f"#!/bin/sh\necho \"$@\" >> {{folder}}/asked\nprintf '{shown}\\n'\n")
    variables = {"JOB_ID": "101", "ARRAY_JOB_ID": "100", "ARRAY_TASK_ID": "1"}
    environment = {"PATH": str(slurm.bin), "PYTHONPATH": os.environ["PYTHONPATH"]}
    environment |= {f"SLURM_{name}": value for name, value in variables.items()}
    ended = subprocess.run(["/bin/bash", slurm.folder / "100.sh"], env=environment, cwd=here, capture_output=True, text=True)
    run = here / "sweep" / NAMES[1]
    errors = (run / "slurm" / "100_1_0_log.err").read_text()
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", ""), errors
    words = (run / "slurm" / "100_1_0_log.out").read_text().splitlines()
    assert f"{run}/slurm/%A_%a_%t_log.out" in words
    assert words[-1] == str(run / "slurm")
    assert "SIMCLR_DIST_ARRAY_TASK=101\n" in (slurm.folder / "env").read_text()
    assert "job 100_1: ends: " in errors
    assert (slurm.folder / "asked").read_text() == "show job 100_1\n", "the batch script asks after its own task"


def test_evaluations_follow_each_its_training(here: Path, slurm: StandIns, command: Command) -> None:
    code, out, err = command(*SWEEP, "--eval", "--train", "shards", "--test", "shards")
    assert (code, err) == (0, "")
    assert "; then job 101_1\n" in out
    script = (slurm.folder / "101.sh").read_text()
    assert "#SBATCH --dependency=aftercorr:100\n#SBATCH" in script
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    record = json.loads((here / "sweep" / NAMES[1] / "submission.json").read_text())
    assert (record["job_id"], record["eval_job_id"]) == ("100_1", "101_1")
    assert "--watch" in DelayedSubmission.load(here / "sweep" / NAMES[1] / "slurm" / "101_1_submitted.pkl").function.command


def test_sent_again_it_sends_what_is_left(here: Path, slurm: StandIns, command: Command) -> None:
    assert command(*SWEEP)[0] == 0
    alive(slurm, "100_0")
    code, out, err = command(*SWEEP)
    assert (code, err) == (0, "")
    first, second, _ = out.splitlines()
    assert first.startswith(f"{NAMES[0]}: left alone: run_folder: ")
    assert "its job 100_0 is PENDING" in first
    assert second.startswith("job 101_0: ")
    assert json.loads((here / "sweep" / NAMES[1] / "submission.json").read_text())["job_id"] == "101_0"
    alive(slurm, "101_0")
    code, out, err = command(*SWEEP)
    assert (code, err) == (0, "")
    table = [line.split()[:3] for line in out.splitlines()[2:5]]
    assert table == [["run", "state", "steps"], *([name, "waiting", "0/3"] for name in NAMES)]


def test_a_trained_sweep_can_be_evaluated(here: Path, slurm: StandIns, command: Command) -> None:
    """Its runs are done, and not evaluated: --eval is not passed over with them."""
    for name in NAMES:
        config = load_config("config.yaml", [f"--optim.base_lr={name[-3:]}", f"--run-folder={here / 'sweep' / name}"])
        claim = open_run(config, {})
        record_end(claim.run, claim.generation, End("done", 0))
        claim.release()
        encoder_path(claim.run, 3).parent.mkdir()
        encoder_path(claim.run, 3).touch()
    (claim.run / "eval").mkdir()
    (claim.run / "eval" / "step-00000003.json").touch()
    assert command(*SWEEP)[1].startswith(f"{NAMES[0]}: is done\n{NAMES[1]}: is done\nrun ")
    code, out, err = command(*SWEEP, "--eval", "--train", "shards", "--test", "shards")
    assert (code, err) == (0, "")
    assert out.startswith(f"{NAMES[1]}: is done\njob 100_0: {here / 'sweep' / NAMES[0]}, 2 x 2 ranks; then job 101_0\n")


def test_one_run_of_an_array_is_asked_after_and_cancelled(here: Path, slurm: StandIns, command: Command) -> None:
    assert command(*SWEEP)[0] == 0
    alive(slurm, "100_0", "100_1")
    run = here / "sweep" / NAMES[1]
    code, out, _ = command("status", run)
    assert (code, out.splitlines()[1]) == (0, "  job         100_1: PENDING (Resources) 0:00, says squeue")
    assert command("cancel", run)[0] == 0
    assert (slurm.folder / "cancelled").read_text() == "100_1\n"
    assert (run / "cancelled").read_text() == "100_1\n"


def test_a_refused_array_leaves_no_trace(here: Path, slurm: StandIns, command: Command) -> None:
    slurm.write("sbatch", "#!/bin/sh\necho 'sbatch: error: Invalid job array specification' >&2\nexit 1\n")
    assert "SLURM refused the job: Invalid job array specification" in refused(command(*SWEEP))
    assert not (here / "sweep").exists()


def test_a_refused_array_leaves_an_older_one_as_it_was(here: Path, slurm: StandIns, command: Command) -> None:
    assert command(*SWEEP)[0] == 0
    slurm.write("sbatch", "#!/bin/sh\nexit 1\n")
    before = {path: path.read_bytes() for path in (here / "sweep").rglob("*") if path.is_file()}
    refused(command(*SWEEP, "--log.every", "7", "--sweep", "seed=0,1"))
    refused(command(*SWEEP, "--log.every", "7"))
    assert {path: path.read_bytes() for path in (here / "sweep").rglob("*") if path.is_file()} == {
        path: content for path, content in before.items() if path.suffix != ".pkl"
    }


def test_a_dry_run_shows_all_and_writes_nothing(
    here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = command(*SWEEP, "--dry-run")
    assert (code, err) == (0, "")
    assert not (here / "sweep").exists()
    monkeypatch.setenv("PATH", str(slurm.bin))
    assert command(*SWEEP)[0] == 0
    assert (slurm.folder / "100.sh").read_text().rstrip() in out
    for name in NAMES:
        for file in ("train.sh", "config.yaml"):
            assert (here / "sweep" / name / "slurm" / file).read_text().rstrip() in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--local"], "--sweep: contradicts --local; `simclr-dist train --sweep` trains the runs here, one after another"),
        (["--sweep", "micro_batches=1,5"], "--sweep: optim.base_lr=0.1, micro_batches=5: config.yaml with the command line: "),
        (
            ["--sweep", "global_batch_size=8,10"],
            "--sweep: base_lr=0.1+global_batch_size=10: global_batch_size: 10 is not divided",
        ),
    ],
)
def test_all_runs_are_checked_before_one_is_sent(
    here: Path, slurm: StandIns, command: Command, words: list[str], line: str
) -> None:
    assert refused(command(*SWEEP, *words)).startswith(f"simclr-dist: {line}")
    assert not (here / "sweep").exists()
    assert not (slurm.folder / "100.sh").exists()
