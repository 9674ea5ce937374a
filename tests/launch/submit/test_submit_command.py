"""`simclr-dist submit` by its command line, against stand-ins for SLURM's programs, and for real with --local."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from submitit.helpers import DelayedSubmission
from submitit.local.local import LocalJobEnvironment

from simclr_dist.cli import submit as submit_command
from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import read_yaml
from simclr_dist.launch.slurm.job import rank_variables
from simclr_dist.run.claim import claim_run, heartbeat
from simclr_dist.run.status import read_ledger, read_status, record_event, record_start, write_status
from stand_ins import SBATCH, Command, StandIns, refused

EVAL = ("--eval", "--train", "shards", "--test", "shards")
PROFILED = ("config.yaml", "--profile", "profile.yaml", "--profile-steps")
CLI = [sys.executable, "-m", "simclr_dist", "submit"]


def submitted(command: Command, *more: str) -> None:
    code, out, err = command("config.yaml", "--profile", "profile.yaml", *more)
    assert (code, err) == (0, ""), err
    assert out.startswith("job 10")


def events(run: Path) -> list[str]:
    return [entry["event"] for entry in read_ledger(run)]


def test_what_needs_no_torch_is_quick(here: Path, no_slurm: StandIns) -> None:
    """Help, mistakes and the dry run, without importing torch; --help also without submitit and pyarrow."""
    code = (
        "import sys, simclr_dist.cli.main as cli\n"
        "def run(*a):\n"
        "    try: return cli.main(['submit', *a])\n"
        "    except SystemExit as e: return e.code\n"
        "assert run('--help') == 0\n"
        "assert not {'torch', 'submitit', 'pyarrow', 'numpy'} & set(sys.modules), 'help'\n"
        "assert run('config.yaml') == 2\n"
        "assert run('config.yaml', '--profile', 'profile.yaml', '--nonsense', '1') == 2\n"
        "assert run('config.yaml', '--profile', 'profile.yaml', '--dry-run') == 0\n"
        "assert run('status', 'run') == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began < 20


def test_submit_and_what_it_says(here: Path, slurm: StandIns, command: Command) -> None:
    code, out, err = command("config.yaml", "--steps", "2", "--profile", "profile.yaml", *EVAL, "--log.every=7")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"job 100: {here / 'run'}, 2 x 2 ranks",
        "job 101: its evaluation, once job 100 is done",
        f"next: simclr-dist submit status {shlex.quote(str(here / 'run'))}",
    ]
    stored = load_config(here / "run/slurm/config.yaml")
    assert (stored.steps, stored.log.every) == (2, 7)
    script = (slurm.folder / "101.sh").read_text()
    assert "--nodes=1\n" in script
    assert "--ntasks-per-node=1\n" in script


def test_dry_run_shows_script_and_config_and_leaves_nothing(here: Path, no_slurm: StandIns, command: Command) -> None:
    code, out, err = command("config.yaml", "--profile", "profile.yaml", "--dry-run", *EVAL, "--steps", "2")
    assert (code, err) == (0, "")
    assert out.count("#!/bin/bash\n") == 2
    assert "#SBATCH --dependency=afterok:TRAINING_JOB\n" in out
    training, evaluation = (
        shlex.quote(f"{here}/run/slurm/config.yaml"),
        f"{shlex.quote(f'{here}/run')} --train shards --test shards",
    )
    assert f"# ---- training; each rank runs: python -m simclr_dist.train {training}\n" in out
    assert f"# ---- evaluation; each rank runs: python -m simclr_dist.evaluate --watch {evaluation}\n" in out
    title, _, config = out.rpartition("# ---- ")[2].partition("\n")
    assert title == f"{here}/run/slurm/config.yaml"
    assert read_yaml(config, "shown").items() >= {"run_folder": f"{here}/run", "steps": 2}.items()
    assert sorted(path.name for path in here.iterdir()) == ["config.yaml", "profile.yaml", "shards"]


def test_an_evaluation_may_have_validation_images_and_shares(here: Path, slurm: StandIns, command: Command) -> None:
    """In the dry run, in the job, and in that of a resumed run; a mistake is told before the queue."""
    more = ("--val", "shards", "--labels", "0.1/1")
    words = "--train shards --val shards --test shards --labels 0.1/1"
    code, out, err = command("config.yaml", "--profile", "profile.yaml", "--dry-run", *EVAL, *more)
    assert (code, err) == (0, "")
    assert f"python -m simclr_dist.evaluate --watch {shlex.quote(f'{here}/run')} {words}\n" in out
    for wrong, line in {
        ("--val", "nowhere"): "nowhere: no such folder of shards",
        ("--val", ""): "has no manifest.parquet",
        ("--labels", "0.1/0.1"): "labels: 0.1/0.1 must be one share or more, each once",
        ("--labels", "2"): "labels: (2.0,) must be above 0 and at most 1",
        ("--labels", "few"): "argument --labels: invalid /-separated value: 'few'",
    }.items():
        assert line in refused(command("config.yaml", "--profile", "profile.yaml", *EVAL, *wrong))
    assert "--val: has no effect without --eval" in refused(command("config.yaml", "--profile", "profile.yaml", *more))
    assert not (here / "run").exists()
    submitted(command, *EVAL, *more)
    assert asked(here, 101)[3:] == words.split()
    assert command("cancel", "run")[0] == 0
    assert command("resume", "run", "--labels", "0.5")[0] == 0
    assert asked(here, 103)[3:] == words.replace("0.1/1", "0.5").split()


@pytest.mark.parametrize(
    ("profile", "evaluation"),
    [
        (
            "{gpus_per_node: 8, memory_gb: 0, cpus_per_task: 12, extra: {exclusive: true, nodelist: 'n[1-4]', nice: 5}}",
            {"gpus-per-node=1", "cpus-per-task=12", "nice=5"},
        ),
        ("{gpus_per_node: 4, memory_gb: 512}", {"gpus-per-node=1", "mem=131072M"}),
        (
            "{gpus_per_node: 0, tasks_per_node: 8, extra: {gres: 'nvme:2,gpu:a100:8', gpus: 'a100:16', wckey: mine}}",
            {"gres=nvme:2,gpu:a100:1", "gpus=a100:1", "wckey=mine"},
        ),
        ("{gpus_per_node: 0, tasks_per_node: 8, extra: {gres: gpu:8, gpus: 16}}", {"gres=gpu:1", "gpus=1"}),
    ],
)
def test_an_evaluation_asks_for_a_ranks_share(
    here: Path, no_slurm: StandIns, command: Command, profile: str, evaluation: set[str]
) -> None:
    (here / "mine.yaml").write_text(profile)
    options = ["--profile", "mine.yaml", "--global_batch_size", "16", "--device", "auto", "--dry-run"]
    code, out, err = command("config.yaml", *options, *EVAL)
    assert (code, err) == (0, "")
    lines = {
        line.removeprefix("#SBATCH --") for line in out.partition("# ---- evaluation")[2].splitlines() if "#SBATCH" in line
    }
    ours = ("chdir", "dependency", "error", "job-name", "kill-on", "open-mode", "output", "requeue", "signal", "time")
    assert {line for line in lines if not line.startswith(ours)} == {"nodes=1", "ntasks-per-node=1", *evaluation}


def test_steps_are_profiled(here: Path, slurm: StandIns, command: Command) -> None:
    """In the job, in that of a resumed run where it is asked for again, and in the dry run."""
    options = ["--profile", "2:4", "--profile-rank", "all"]
    code, out, err = command(*PROFILED, "2:4", "--profile-rank", "all", "--dry-run", *EVAL)
    assert (code, err) == (0, "")
    assert f"\n# ---- profiled, into {here}/run/profile\n{' '.join(options)}\n" in out
    submitted(command, "--profile-steps", "2:4", "--profile-rank", "all", *EVAL)
    assert asked(here, 100) == ["simclr_dist.train", str(here / "run/slurm/config.yaml"), *options]
    assert "--profile" not in asked(here, 101)
    assert command("cancel", "run")[0] == 0
    assert command("resume", "run", "--profile-steps", "1")[0] == 0
    assert asked(here, 102)[2:] == ["--profile", "1", "--profile-rank", "0"]
    assert command("cancel", "run")[0] == 0
    assert command("resume", "run")[0] == 0
    assert len(asked(here, 104)) == 2, "it is no setting of the run"


def asked(here: Path, job: int) -> list[str]:
    """What the tasks of a job start."""
    command: list[str] = DelayedSubmission.load(here / f"run/slurm/{job}_submitted.pkl").function.command
    return command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: simclr-dist submit CONFIG --profile FILE"),
        (["config.yaml"], "--profile: is missing"),
        (["config.yaml", "--profile", "nowhere.yaml"], "nowhere.yaml: cannot read the profile: No such file"),
        (["nowhere.yaml", "--profile", "profile.yaml"], "nowhere.yaml: cannot read the config: No such file"),
        (["config.yaml", "--profile", "profile.yaml", "--stepps", "2"], "command line: stepps: unknown key; did you mean"),
        (["config.yaml", "--profile", "profile.yaml", "more"], "command line: 'more': expected --key value"),
        (["config.yaml", "--profile", "profile.yaml", "--eval", "--train", "x"], "--eval: --test is missing"),
        (["config.yaml", "--profile", "profile.yaml", "--test", "x"], "--test: has no effect without --eval"),
        (["config.yaml", "--profile", "profile.yaml", "--dry-run", "--local"], "--dry-run: contradicts --local"),
        (["config.yaml", "--profile", "profile.yaml", "-f"], "--follow: has no effect on submit"),
        (["config.yaml", "--profile", "profile.yaml"], "SLURM is not here: no sbatch on PATH"),
        (["config.yaml", "--profile", "setup.yaml"], "setup.yaml: setup: 'touch x' is a shell command; if you trust it, add"),
        (["config.yaml", "--profile", "3"], "--profile: '3': names what is asked of SLURM; steps go to --profile-steps"),
        (["config.yaml", "--local", "--profile", "2:3"], "--profile: '2:3': names what is asked of SLURM"),
        ([*PROFILED, "0"], "--profile-steps: '0' is neither a number of steps"),
        ([*PROFILED, "9:12"], "--profile-steps: '9:12': the job has steps 1 to 3: none to profile"),
        ([*PROFILED, "2", "--profile-rank", "4"], "--profile-rank: there is no rank 4 of 4"),
        ([*PROFILED, "2", "--profile-rank", "x"], "--profile-rank: 'x' is neither the number of a rank nor `all`"),
        (["config.yaml", "--profile", "profile.yaml", "--profile-rank", "1"], "--profile-rank goes with --profile-steps"),
        (["cancel", "run", "--profile-steps", "2"], "--profile-steps: has no effect on cancel"),
        (["status"], "submit status: which run?"),
        (["resume", "--steps", "2", "run"], "submit resume: which run?"),
        (["status", "run"], "no job was submitted for this folder"),
        (["logs", "run"], "no job was submitted for this folder"),
        (["cancel", "run"], "no job was submitted for this folder"),
        (["resume", "run"], "no job was submitted for this folder"),
        (["status", "run", "--steps", "2"], "unrecognized arguments: --steps 2"),
        (["status", "run", "--follow"], "--follow: has no effect on status"),
        (["resume", "run", "--local"], "--local: has no effect on resume"),
        (["cancel", "run", "--profile", "x"], "--profile: has no effect on cancel"),
    ],
)
def test_mistakes_are_one_line(here: Path, no_slurm: StandIns, command: Command, arguments: list[str], message: str) -> None:
    (here / "setup.yaml").write_text("{gpus_per_node: 0, setup: [touch x]}")
    assert message in refused(command(*arguments))
    assert not (here / "run").exists()


@pytest.mark.parametrize("action", ["status", "cancel"])
def test_a_folder_with_a_job_but_no_slurm(here: Path, slurm: StandIns, command: Command, action: str) -> None:
    submitted(command)
    for program in slurm.bin.iterdir():
        program.unlink()
    assert "SLURM is not here: no squeue on PATH" in refused(command(action, "run"))


def test_shell_commands_of_a_config_need_a_word(here: Path, slurm: StandIns, command: Command) -> None:
    """It goes to the job, which reads a file; and a resumed run needs it anew, for its folder's files too."""
    data = "{shards: 'pipe:cat shards/shard-{000000..000003}.tar', reader: stream, samples: 24, workers: 0, allow_pipe: true}"
    text = (here / "config.yaml").read_text().replace("{shards: shards, workers: 0}", data)
    (here / "config.yaml").write_text(text)
    why = "data.allow_pipe: true lets data.shards run shell commands"
    assert f"config.yaml: {why}" in refused(command("config.yaml", "--profile", "profile.yaml"))
    assert not (here / "run").exists()
    (here / "config.yaml").write_text(text.replace(", allow_pipe: true", ""))
    submitted(command, "--data.allow_pipe", "true")
    assert asked(here, 100) == ["simclr_dist.train", str(here / "run/slurm/config.yaml"), "--data.allow_pipe", "true"]
    claim = claim_run(here / "run")
    claim.beat(1)
    claim.release()
    write_status(here / "run", "running", None)
    shutil.copy(here / "run/slurm/config.yaml", here / "run")
    assert "  step        1 of 3 (33.3 %)\n" in command("status", "run")[1]
    assert command("cancel", "run")[0] == 0
    assert f"run/slurm/config.yaml: {why}" in refused(command("resume", "run"))
    assert command("resume", "run", "--data.allow_pipe=true")[0] == 0
    assert asked(here, 101)[2:] == ["--data.allow_pipe", "true"]


@pytest.mark.parametrize(
    "what", ["environment: {PATH: /mine}", "container: /x.sif, container_runtime: pyxis", "extra: {bb: x}"]
)
def test_what_may_run_a_program_needs_a_word_each_time(here: Path, slurm: StandIns, command: Command, what: str) -> None:
    (here / "mine.yaml").write_text(f"{{gpus_per_node: 0, {what}}}")
    typed = ("config.yaml", "--profile", "mine.yaml")
    for more in ((), ("--dry-run",), EVAL):
        assert "; if you trust it, add --allow-setup" in refused(command(*typed, *more))
    other = (*EVAL, "--eval-profile", "mine.yaml")
    assert "mine.yaml: " in refused(command("config.yaml", "--profile", "profile.yaml", *other))
    assert not (here / "run").exists()
    assert command(*typed, *EVAL, "--allow-setup")[0] == 0
    assert command("cancel", "run")[0] == 0
    assert "submission.json: profile: " in refused(command("resume", "run"))
    assert command("resume", "run", "--allow-setup")[0] == 0


def test_local_takes_no_variables_that_run_programs(
    here: Path, no_slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves out needs no word."""
    monkeypatch.setattr("simclr_dist.launch.slurm.local.run_here", lambda submission: 0)
    profile = "gpus_per_node: 0\nsetup: [date]\ncontainer: /x.sif\ncontainer_runtime: pyxis\nextra: {bb: x}\n"
    (here / "mine.yaml").write_text(profile)
    assert command("config.yaml", "--local", "--profile", "mine.yaml")[0] == 0
    (here / "mine.yaml").write_text(profile + "environment: {LD_PRELOAD: mine.so}\n")
    line = "simclr-dist: mine.yaml: environment.LD_PRELOAD: 'mine.so' is for a variable that may run a program"
    code, _, err = command("config.yaml", "--local", "--profile", "mine.yaml")
    assert (code, err.splitlines()[-1]) == (2, f"{line}; if you trust it, add --allow-setup")
    assert command("config.yaml", "--local", "--profile", "mine.yaml", "--allow-setup")[0] == 0


def test_set_up_lines_need_a_word(here: Path, slurm: StandIns, command: Command) -> None:
    (here / "setup.yaml").write_text("{gpus_per_node: 0, setup: [module load x]}")
    code, _, err = command("config.yaml", "--profile", "setup.yaml", "--allow-setup")
    assert code == 0, err
    assert "\nmodule load x\n" in (slurm.folder / "100.sh").read_text()
    slurm.state(100, "FAILED|None|n1|1:00")
    assert "add --allow-setup" in refused(command("resume", "run"))  # the record is a file too
    assert command("resume", "run", "--allow-setup")[0] == 0


def test_its_own_profile_for_the_evaluation(here: Path, slurm: StandIns, command: Command) -> None:
    (here / "eval.yaml").write_text("{partition: small, gpus_per_node: 0, memory_gb: 2}")
    submitted(command, *EVAL, "--eval-profile", "eval.yaml")
    assert "--partition=small\n" in (slurm.folder / "101.sh").read_text()
    assert "--partition=main\n" in (slurm.folder / "100.sh").read_text()


def test_status(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL, "--steps", "40")
    slurm.state(100, "PENDING|Resources||0:00")
    slurm.state(101, "PENDING|Dependency||0:00")
    code, out, err = command("status", "run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        str(here / "run"),
        "  job         100: PENDING (Resources) 0:00, says squeue",
        "  evaluation  101: PENDING (Dependency) 0:00, says squeue",
    ]
    assert lines[3].endswith(" submitted kind=train job=100 cluster=main")
    assert lines[5:7] == ["  state       waiting: SLURM job 100", "  step        0 of 40 (0.0 %)"]
    assert lines[-1].endswith(f"submit logs -f {shlex.quote(str(here / 'run'))}")

    run = here / "run"
    claim = claim_run(run)
    for step, done in ((0, 20), (18, 24)):
        record_start(claim, step, 4, 40)
        claim.beat(done)
        record_event(run, "requeued", kind="train", job="100", why="SIGTERM", crash=False, saved=done)
    claim.release()
    write_status(run, "preempted", 75, reason="SIGTERM")
    (run / "metrics.jsonl").write_text('{"step": 23, "loss/nt_xent": 1.25}\n{"step": 24, "loss/nt')
    slurm.state(100, "RUNNING|None|n[1-2]|0:12")
    lines = command("status", "run")[1].splitlines()
    assert lines[1] == "  job         100: RUNNING on n[1-2] 0:12, says squeue"
    assert lines[3] == "  requeued    2 x: SIGTERM"
    assert "requeued kind=train job=100 why=SIGTERM" in lines[3 + 5]
    card = {line[2:13].strip(): line[14:] for line in lines[3 + 6 :]}
    assert card["state"] == "waiting: SLURM job 100"
    assert card["step"] == "24 of 40 (60.0 %)"
    assert card["loss"] == "1.2500 (chance 0.00), partner nearest 0 %, at step 23"
    assert card["starts"].startswith("2, 2 steps lost between them")
    assert "; last heard of 0 s ago" in card["last start"]


def test_status_when_the_controller_is_away(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    for name in ("squeue", "scontrol", "sacct"):
        slurm.write(name, "#!/bin/sh\n/bin/sleep 30\n")
    began = time.monotonic()
    code, out, _ = command("status", "run")
    assert code == 0
    assert time.monotonic() - began < 25
    assert "  job         100: UNKNOWN (squeue: no answer in 1.5 s; scontrol: no answer in 0.8 s; sacct:" in out


def test_an_epochs_run_knows_its_total_once_it_has_started(here: Path, slurm: StandIns, command: Command) -> None:
    """And needs no data for it, which may be on another machine."""
    submitted(command, "--steps", "null", "--epochs", "2")
    assert "  step  " not in command("status", here / "run")[1]
    (here / "shards").rename(here / "moved")
    claim = claim_run(here / "run")
    record_start(claim, 0, 1, 6)
    claim.beat(3)
    assert "  step        3 of 6 (50.0 %)\n" in command("status", here / "run")[1]
    claim.release()


def test_logs(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    code, out, err = command("logs", "run")
    assert (code, out) == (0, "")
    assert err == "job 100 has written nothing: RUNNING on n[1-2] 0:07, says squeue\n"
    (here / "run/slurm/100_0_log.out").write_text("out\n")
    (here / "run/slurm/100_0_log.err").write_text("err\n")
    (here / "run/slurm/101_0_log.out").write_text("evaluated\n")
    slurm.write("squeue", "#!/bin/sh\n/bin/sleep 30\n")  # not asked
    assert command("logs", "run") == (0, "out\n", "err\n")
    assert command("logs", "run", "--eval") == (0, "evaluated\n", "")


def test_logs_of_an_evaluation_that_was_not_asked_for(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    assert "no evaluation was submitted" in refused(command("logs", "run", "--eval"))


def test_logs_are_followed_to_the_end(here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(command)
    monkeypatch.setattr(submit_command, "_FOLLOW_SECONDS", 0.3)
    log = here / "run/slurm/100_0_log.out"
    log.write_bytes(b"half of " + "é".encode()[:1])
    # The job writes its last line at the moment at which it ends.
    ends = f'if [ -f {{folder}}/end ]; then echo "the last line" >> "{log}"; echo "COMPLETED||n1|0:09"; exit; fi\n'
    slurm.write("squeue", f"#!/bin/sh\n{ends}echo 'RUNNING|None|n1|0:07'\n")

    def write() -> None:
        time.sleep(0.8)
        with log.open("ab") as file:
            file.write("é".encode()[1:] + b" letter\n")
        (slurm.folder / "end").touch()

    writer = threading.Thread(target=write)
    writer.start()
    answer = command("logs", "-f", "run")
    writer.join()
    assert answer == (0, "half of é letter\nthe last line\n", "")


def test_cancel(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    code, out, err = command("cancel", "run")
    assert (code, err) == (0, "")
    assert out.startswith("cancelled: job 100 and 101; `simclr-dist submit resume ")
    assert (slurm.folder / "cancelled").read_text() == "100 101\n"
    assert (here / "run/cancelled").exists()
    assert events(here / "run")[-1] == "cancelled"
    code, out, _ = command("cancel", "run")
    assert code == 0
    assert out.splitlines() == [f"job {job} has ended already: CANCELLED on n[1-2] 0:09, says squeue" for job in (100, 101)]
    assert (slurm.folder / "cancelled").read_text() == "100 101\n"


def test_cancel_marks_the_run_first(here: Path, slurm: StandIns, command: Command) -> None:
    """A job that is being stopped at this moment looks for the mark before it starts itself again."""
    submitted(command)
    slurm.write("scancel", f'#!/bin/sh\n[ -f "{here}/run/cancelled" ] && echo yes > {{folder}}/marked\n')
    assert command("cancel", "run")[0] == 0
    assert (slurm.folder / "marked").exists()


def test_a_cancel_that_fails_leaves_no_mark(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    slurm.write("scancel", "#!/bin/sh\necho 'scancel: error: denied' >&2\nexit 1\n")
    assert "not cancelled: scancel: denied" in refused(command("cancel", "run"))
    assert not (here / "run/cancelled").exists()
    assert "cancelled" not in events(here / "run")


def test_resume(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL, "--log.every", "7")
    assert "its job 100 is RUNNING" in refused(command("resume", "run"))
    command("cancel", "run")
    (here / "config.yaml").unlink()
    (here / "profile.yaml").unlink()
    os.chdir("/")
    run = here / "run"
    code, out, err = command("resume", run, "--steps", "9")
    assert (code, err) == (0, "")
    assert out.startswith(f"job 102: {run}, 2 x 2 ranks\njob 103: its evaluation, once job 102 is done\n")
    assert not (run / "cancelled").exists()
    stored = load_config(run / "slurm/config.yaml")
    assert (stored.steps, stored.log.every, stored.data.shards) == (9, 7, "shards")
    before, after = (slurm.folder / "100.sh").read_text(), (slurm.folder / "102.sh").read_text()
    assert before == after
    record = json.loads((run / "submission.json").read_text())
    assert (record["job_id"], record["eval_job_id"], record["working_directory"]) == ("102", "103", str(here))
    assert record["config"] == "config.yaml"
    assert record["overrides"] == ["--log.every", "7", "--steps", "9"]


def test_resume_with_another_profile(here: Path, slurm: StandIns, command: Command) -> None:
    """Other machines, the same global batch: allowed where it divides."""
    submitted(command, *EVAL)
    command("cancel", "run")
    (here / "small.yaml").write_text("{partition: small, gpus_per_node: 0}")
    assert command("resume", "run", "--profile", "small.yaml")[0] == 0
    assert "--partition=small\n" in (slurm.folder / "102.sh").read_text()
    assert "--partition=small\n" in (slurm.folder / "103.sh").read_text()
    command("cancel", "run")
    (here / "odd.yaml").write_text("{partition: small, gpus_per_node: 0, tasks_per_node: 3}")
    assert "8 is not divided by 3 processes" in refused(command("resume", "run", "--profile", "odd.yaml"))
    assert command("resume", "run", "--test", "shards", "--dry-run")[0] == 0
    assert "nowhere" in refused(command("resume", "run", "--test", "nowhere"))


def test_a_run_folder_that_was_moved(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    command("cancel", "run")
    (here / "run").rename(here / "moved")
    assert command("resume", "moved")[0] == 0
    assert load_config(here / "moved/slurm/config.yaml").run_folder == str(here / "moved")
    assert not (here / "run").exists()


def test_a_moved_run_is_cancelled_and_a_copy_is_not(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command, *EVAL)
    (here / "run").rename(here / "moved")
    shutil.copytree(here / "moved", here / "copy", symlinks=True)
    which = f"not cancelled: job 100 and 101 was submitted for '{here}/run'"
    said = refused(command("cancel", "copy"))
    assert f"{which}; which is not here; if this is that folder, moved, `scancel 100 101` does it" in said.replace('"', "'")
    (here / "moved").rename(here / "run")
    said = refused(command("cancel", "copy"))
    assert f"; cancel it there: `simclr-dist submit cancel {shlex.quote(str(here / 'run'))}`" in said
    assert not (slurm.folder / "cancelled").exists()
    assert not (here / "copy/cancelled").exists()
    assert "; it was submitted for " in command("status", "copy")[1]
    assert "its job 100 is RUNNING" in refused(command("resume", "run"))
    assert command("resume", "copy")[0] == 0, "its own job"
    assert json.loads((here / "copy/submission.json").read_text())["job_id"] == "102"
    assert command("cancel", "copy")[0] == 0
    assert (slurm.folder / "cancelled").read_text() == "102 103\n"
    (here / "run").rename(here / "moved")
    assert command("cancel", "moved")[0] == 0
    assert (slurm.folder / "cancelled").read_text() == "102 103\n100 101\n"


@pytest.mark.parametrize("action", ["status", "logs", "cancel", "resume"])
@pytest.mark.parametrize("key", ["job_id", "eval_job_id"])
def test_a_job_s_number_is_a_number(here: Path, slurm: StandIns, command: Command, action: str, key: str) -> None:
    submitted(command, *EVAL)
    path = here / "run/submission.json"
    for value in ("--user=me", "100 101", "../100", 100, ["100"], ""):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        line = refused(command(action, "run"))
        assert "submission.json: " in line
        assert f"{key}: {value!r}" in line
    assert not (slurm.folder / "cancelled").exists()


def test_no_pickle_waits_for_a_job_in_a_folder_from_elsewhere(here: Path, slurm: StandIns, command: Command) -> None:
    """A task takes what lies there under its number, and a job may begin before ours is in its place."""
    submitted(command)
    command("cancel", "run")
    for number in (101, 102):
        (here / f"run/slurm/{number}_submitted.pkl").write_bytes(b"not ours")
    slurm.write("sbatch", f'#!/bin/sh\n/bin/ls "{here}/run/slurm" > {{folder}}/listed\n' + SBATCH.removeprefix("#!/bin/sh\n"))
    assert command("resume", "run")[0] == 0
    listed = (slurm.folder / "listed").read_text()
    assert "_submitted.pkl" not in listed
    assert asked(here, 101)[0] == "simclr_dist.train"


CONTROL = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e"
ESCAPED = r"\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e"


def test_no_control_character_reaches_the_terminal(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    run = here / "run"
    for name, stream in (("out", 1), ("err", 2)):
        (run / f"slurm/100_0_log.{name}").write_bytes(f"{CONTROL}: {name}\n\té\n".encode())
        assert command("logs", "run")[stream] == f"{ESCAPED}: {name}\n\té\n"
    record_event(run, f"stop{CONTROL}", why=f"{CONTROL}\nforged", **{f"key{CONTROL}": 1})
    record_event(run, "requeued", kind="train", job="100", why=CONTROL, crash=False, saved=0)
    record_event(run, "gave_up", kind="train", job="100", why=f"{CONTROL}\nforged")
    lines = command("status", "run")[1].splitlines()
    assert lines[2] == f"  requeued    1 x: {ESCAPED}"
    assert lines[4].endswith(rf" stop{ESCAPED} why={ESCAPED}\nforged key{ESCAPED}=1")
    assert lines[7] == rf"  state       given up: {ESCAPED}\nforged"
    assert len(lines) == 10


def test_a_resumed_run_stays_where_it_is(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    command("cancel", "run")
    assert "a run that is resumed stays where it is" in refused(command("resume", "run", "--run_folder", "other"))


def test_a_working_directory_that_is_gone(here: Path, slurm: StandIns, command: Command) -> None:
    submitted(command)
    command("cancel", "run")
    (here / "run").rename(here.parent / "kept")
    os.chdir("/")
    here.rename(here.parent / "elsewhere")
    assert "working_directory: " in refused(command("resume", here.parent / "kept"))


def test_a_config_with_the_name_of_an_action(here: Path, slurm: StandIns, command: Command) -> None:
    (here / "config.yaml").rename(here / "status")
    assert command("./status", "--profile", "profile.yaml")[0] == 0


def local(here: Path, *more: str) -> "subprocess.Popen[str]":
    """`submit --local` in a session of its own, as a terminal gives it."""
    return subprocess.Popen(
        [*CLI, "config.yaml", "--local", *more],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def nobody_left(session: int) -> bool:
    """No process of the session lives (zombies of others do not count)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return False
    return True


def test_ranks_of_a_job_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SUBMITIT_LOCAL_JOB_ID", "7"), ("SUBMITIT_LOCAL_NTASKS", "4"), ("SUBMITIT_LOCAL_JOB_NUM_NODES", "2")):
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("simclr_dist.system.machine.cores", lambda: 16)
    assert rank_variables(LocalJobEnvironment())["OMP_NUM_THREADS"] == "8"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert rank_variables(LocalJobEnvironment())["OMP_NUM_THREADS"] == "3", "what the job was given"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "OMP_NUM_THREADS" not in rank_variables(LocalJobEnvironment()), "the user's own"


@pytest.mark.slow
def test_local_runs_the_same_job_here_and_profiles_its_steps(here: Path) -> None:
    process = local(here, "--profile", "profile.yaml", "--profile-steps", "2:4", "--profile-rank", "1")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "1 micro-batch x 2 ranks x 4" in out
    assert "done: 3 steps" in out
    assert "simclr-dist: --local leaves out nodes: 2\n" in err
    assert read_status(here / "run")["state"] == "done"
    assert not (here / "run/submission.json").exists()
    found = sorted(path.name for path in (here / "run/profile").iterdir())
    assert found == ["step-00000002-rank-1.trace.json.gz", "step-00000002-rank-1.txt"]
    assert "steps 2 to 3: milliseconds a step" in (here / "run/profile" / found[1]).read_text()
    assert nobody_left(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the command", "everybody"])
def test_a_stop_of_a_local_job_saves_and_exits_75(here: Path, whom: str) -> None:
    """SIGTERM to the command alone, and Ctrl-C, which a terminal sends to all."""
    process = local(here, "--steps", "100000", "--log.every", "1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    if whom == "everybody":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    assert "Traceback" not in err  # of submitit's controller, which would kill the tasks a second after Ctrl-C
    status = read_status(here / "run")
    assert status["state"] == "preempted"
    saved = [int(path.stem.removeprefix("step-")) for path in (here / "run/checkpoints").glob("step-*.pt")]
    assert max(saved) == heartbeat(here / "run")["step"] >= 5
    assert nobody_left(process.pid)


@pytest.mark.slow
def test_a_local_job_that_fails_has_its_own_code(here: Path) -> None:
    """A mistake that only the ranks can see."""
    for shard in (here / "shards").glob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    process = local(here)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 2, (out, err)
    assert read_status(here / "run")["state"] == "failed"
    assert nobody_left(process.pid)


def test_help_names_every_option(here: Path, no_slurm: StandIns, command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    options: set[Any] = {word for word in out.split() if word.startswith("--")}
    expected = {
        "--profile",
        "--dry-run",
        "--local",
        "--eval",
        "--train",
        "--val",
        "--test",
        "--labels",
        "--eval-profile",
        "--allow-setup",
        "--profile-steps",
        "--profile-rank",
        "--follow",
    }
    assert expected <= options


def test_a_profiles_gpus_count_on_the_cluster_alone(
    here: Path, no_slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "gpus.yaml").write_text("gpus_per_node: 2")
    code, _, err = command("config.yaml", "--profile", "gpus.yaml", "--dry-run")
    assert (code, err.count("\n")) == (2, 1)
    assert "device: 'cpu' contradicts the profile's gpus_per_node: 2" in err
    monkeypatch.setattr("simclr_dist.launch.slurm.local.run_here", lambda submission: submission.profile.tasks)
    assert command("config.yaml", "--local", "--profile", "gpus.yaml")[0] == 2, "ranks"
    assert command("config.yaml", "--local", "--device", "cuda")[0] == 1, "rank"
