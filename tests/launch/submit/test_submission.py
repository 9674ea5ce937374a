"""What is submitted: the batch script, the object in it, the stored config and record; and what is refused before."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from simclr_dist.config.load import load_config
from simclr_dist.launch.slurm.batch import Evaluation, Submission, dry_run, script
from simclr_dist.launch.slurm.job import Job
from simclr_dist.launch.slurm.profile import Profile, load_profile
from simclr_dist.launch.slurm.submission import check_device, prepare, read_record, store_config, submit
from simclr_dist.run.status import read_ledger
from simclr_dist.system.errors import ConfigError, DataError
from stand_ins import StandIns

ONE = Profile(gpus_per_node=0)
BIGGER = ["--global_batch_size", "16", "--device", "auto"]  # for GPUs


def prepared(here: Path, *overrides: str, evaluation: bool = False, **changes: object) -> Submission:
    profile = dataclasses.replace(load_profile(here / "profile.yaml"), **changes)  # type: ignore[arg-type]
    follows = Evaluation("shards", "shards", dataclasses.replace(profile, nodes=1, tasks_per_node=1)) if evaluation else None
    return prepare("config.yaml", overrides, profile, evaluation=follows)


def test_the_dry_run_shows_what_is_submitted(here: Path, slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything that a profile can say, on a machine without SLURM, and then with it.
    everything = {
        "account": "me",
        "qos": "high",
        "memory_gb": 1.5,
        "constraint": "a&[b|c]",
        "exclude": "n[3-4]",
        "reservation": "it's",
        "setup": ("module load x",),
        "mail_user": "me@x.org",
        "mail_type": "END",
        "extra": {"exclusive": True, "nice": "5"},
    }
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nowhere")
    submission = prepared(here, "--steps", "2", evaluation=True, **everything)
    shown = dry_run(submission)
    training = script(submission, "train")
    assert not (here / "run").exists()

    monkeypatch.setenv("PATH", path)
    assert submit(submission) == ["100", "101"]
    assert (slurm.folder / "100.sh").read_text() == training
    assert (slurm.folder / "101.sh").read_text() == script(submission, "eval", after="100")
    for job in ("100", "101"):
        assert (slurm.folder / f"{job}.sh").read_text() == (here / f"run/slurm/{job}_submission.sh").read_text()
        assert (slurm.folder / f"{job}.sh").read_text().rstrip().replace("afterok:100", "afterok:TRAINING_JOB") in shown
    assert (here / "run/slurm/config.yaml").read_text() in shown

    options = [line.removeprefix("#SBATCH --") for line in training.splitlines() if line.startswith("#SBATCH")]
    run = here / "run"
    assert options == [
        "account=me",
        f"chdir={shlex.quote(str(here))}",
        "constraint='a&[b|c]'",
        "cpus-per-task=3",
        f"error={shlex.quote(f'{run}/slurm/%j_0_log.err')}",
        "exclude='n[3-4]'",
        "exclusive",
        "job-name=run",
        "mail-type=END",
        "mail-user=me@x.org",
        "mem=1536M",
        "nice=5",
        "nodes=2",
        "ntasks-per-node=2",
        "open-mode=append",
        f"output={shlex.quote(f'{run}/slurm/%j_0_log.out')}",
        "partition=main",
        "qos=high",
        "requeue",
        """reservation='it'"'"'s'""",
        "signal=USR2@120",
        "time=60",
    ]
    evaluation = (slurm.folder / "101.sh").read_text()
    for line in ("dependency=afterok:100", "kill-on-invalid-dep=yes", "nodes=1", "ntasks-per-node=1", "job-name=run-eval"):
        assert f"#SBATCH --{line}\n" in evaluation


def test_gpus(here: Path) -> None:
    text = script(prepared(here, *BIGGER, gpus_per_node=4, tasks_per_node=None), "train")
    assert "#SBATCH --gpus-per-node=4\n#SBATCH" in text
    assert "#SBATCH --ntasks-per-node=4\n" in text


def test_the_script_runs_with_all_quotes_in_place(here: Path, slurm: StandIns) -> None:
    """bash on the real script; srun notes its words, its environment and its folder, and ends as the ranks would."""
    submit(prepared(here, setup=("export FROM_SETUP=yes NCCL_DEBUG=overruled",)))
    slurm.write(
        "srun",
        '#!/bin/sh\nfor word in "$@"; do echo "$word"; done > {folder}/words\n/usr/bin/env -0 > {folder}/env\nexit $CODE\n',
    )
    for code in (0, 2):
        environment = {"PATH": str(slurm.bin), "CODE": str(code), "SLURM_JOB_ID": "100"}
        ended = subprocess.run(
            ["/bin/bash", slurm.folder / "100.sh"], env=environment, cwd=here, capture_output=True, text=True
        )
        assert ended.returncode == code, ended.stderr
    folder = f"{here}/run/slurm"
    assert (slurm.folder / "words").read_text().splitlines() == [
        "--unbuffered",
        "--output",
        f"{folder}/%j_%t_log.out",
        "--error",
        f"{folder}/%j_%t_log.err",
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        "--cpus-per-task=3",
        sys.executable,
        "-u",
        "-m",
        "submitit.core._submit",
        folder,
    ]
    variables = dict(line.split("=", 1) for line in (slurm.folder / "env").read_text().split("\0") if line)
    assert variables["NCCL_DEBUG"] == "it's $HOME"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["FROM_SETUP"] == "yes"
    assert variables["PYTHONSAFEPATH"] == "1"


def test_the_batch_script_ends_with_the_rescue(here: Path) -> None:
    submission = prepared(here, evaluation=True, max_restarts=7)
    run = shlex.quote(str(here / "run"))
    rescue = f"exec {shlex.quote(sys.executable)} -m simclr_dist.launch.slurm.rescue"
    end = f"code=$?\n{rescue} --kind train --max-restarts 7 {run} $code"
    assert script(submission, "train").endswith(end)
    assert "\nexec" not in script(submission, "train").removesuffix(end)
    assert script(submission, "eval", after="1").endswith(f"{rescue} --kind eval --max-restarts 7 {run} $code")


def test_the_object_that_the_tasks_run(here: Path, slurm: StandIns) -> None:
    submit(prepared(here, evaluation=True, max_restarts=5))
    folder = here / "run/slurm"
    training, evaluation = (DelayedSubmission.load(folder / f"{job}_submitted.pkl") for job in (100, 101))
    assert training.function == Job(
        "train", str(here / "run"), ["simclr_dist.train", str(folder / "config.yaml")], str(here), max_restarts=5
    )
    watch = ["simclr_dist.evaluate", "--watch", str(here / "run"), "--train", "shards", "--test", "shards"]
    assert evaluation.function == Job("eval", str(here / "run"), watch, str(here), max_restarts=5)
    assert training._timeout_min == 60
    assert training._timeout_countdown > 100_000  # submitit counts every start of a short time limit


def test_the_config_is_stored_as_it_was(here: Path, slurm: StandIns) -> None:
    submit(prepared(here, "--steps", "2", "--log.every=7"))
    (here / "config.yaml").unlink()
    stored = load_config(here / "run/slurm/config.yaml")
    assert (stored.steps, stored.log.every) == (2, 7)
    assert stored.run_folder == str(here / "run")
    assert stored.data.shards == "shards"  # relative to the working directory, into which the job goes
    assert read_record(here / "run")["working_directory"] == str(here)


def test_the_record(here: Path, slurm: StandIns) -> None:
    submission = prepared(here, "--steps", "2", evaluation=True)
    submit(submission)
    record = json.loads((here / "run/submission.json").read_text())
    assert record["job_id"] == "100"
    assert record["eval_job_id"] == "101"
    assert record["config"] == "config.yaml"
    assert record["overrides"] == ["--steps", "2"]
    assert record["profile"]["nodes"] == 2
    assert {key: record["evaluation"][key] for key in ("train", "test")} == {"train": "shards", "test": "shards"}
    assert record["evaluation"]["profile"]["nodes"] == 1
    events = [(entry["event"], entry["kind"], entry["job"]) for entry in read_ledger(here / "run")]
    assert events == [("submitted", "train", "100"), ("submitted", "eval", "101")]


def test_a_cancelled_run_may_go_on(here: Path, slurm: StandIns) -> None:
    (here / "run").mkdir()
    (here / "run/cancelled").touch()
    submit(prepared(here))
    assert not (here / "run/cancelled").exists()


def test_apptainer(here: Path) -> None:
    changes = {"container": "/images/a b.sif", "container_runtime": "apptainer", "container_mounts": ("/data:/d", "/x")}
    line = next(line for line in script(prepared(here, **changes), "train").splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    start = words.index("apptainer")
    assert words[start:] == [
        *("apptainer", "exec", f"--pwd={here}", f"--bind={here}", f"--bind={here}/run", "--bind=/data:/d", "--bind=/x"),
        *(
            "/images/a b.sif",
            "python3",
            "-u",
            "-m",
            "submitit.core._submit",
            f"{here}/run/slurm",
        ),
    ]
    on_gpus = prepared(here, *BIGGER, gpus_per_node=2, container_python="/opt/py", **changes)
    assert " apptainer exec --nv " in script(on_gpus, "train")
    assert " /opt/py -u -m submitit" in script(on_gpus, "train")


def test_pyxis(here: Path) -> None:
    changes = {"container": "reg#me/x:1", "container_runtime": "pyxis", "container_mounts": ("/data:/d", "/x")}
    text = script(prepared(here, **changes), "train")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))
    mounts = f"{here}:{here},{here}/run:{here}/run,/data:/d,/x:/x"
    start = words.index("--container-image=reg#me/x:1")
    assert words[start:] == [
        *("--container-image=reg#me/x:1", f"--container-mounts={mounts}", f"--container-workdir={here}"),
        *("python3", "-u", "-m", "submitit.core._submit", f"{here}/run/slurm"),
    ]
    assert (
        f"exec {shlex.quote(sys.executable)} -m simclr_dist.launch.slurm.rescue" in text
    )  # outside: the image has no scontrol


def test_variables_that_overrule_the_script_are_kept_from_sbatch(
    here: Path, slurm: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {
        "SBATCH_PARTITION": "expensive",  # the profile names another
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_ACCOUNT": "me",  # the profile leaves it out
        "SLURM_CONF": "/etc/slurm.conf",
        "OTHER": "x",
    }
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    submit(prepared(here))
    assert dict(os.environ) == before
    seen = (slurm.folder / "100.env").read_text().split("\0")
    assert {line.split("=")[0] for line in seen} & set(ours) == {"SBATCH_ACCOUNT", "SLURM_CONF", "OTHER"}
    # From inside a job: its own variables would bind the new one's srun.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    submit(prepared(here, "--run_folder", "other"))
    seen = (slurm.folder / "101.env").read_text().split("\0")
    assert {line.split("=")[0] for line in seen if line.startswith("SLURM_")} == {"SLURM_CONF"}


def test_refused_while_a_job_lives(here: Path, slurm: StandIns) -> None:
    submit(prepared(here, evaluation=True))
    with pytest.raises(ConfigError, match=r"its job 100 is RUNNING on n\[1-2\] 0:07, says squeue; wait for its end, or `"):
        submit(prepared(here))
    slurm.state(100, "COMPLETED|None|n1|1:00")
    slurm.state(101, "PENDING|Priority||0:00")
    with pytest.raises(ConfigError, match=r"its job 101 is PENDING \(Priority\) 0:00, says squeue"):
        submit(prepared(here))
    slurm.state(101, "CANCELLED|DependencyNeverSatisfied||0:00")
    slurm.forget(100)
    assert submit(prepared(here)) == ["102"]


def test_refused_while_nobody_knows(here: Path, slurm: StandIns) -> None:
    submit(prepared(here))
    slurm.write("squeue", "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"cannot find out whether its job 100 has ended \(squeue: Unable to contact"):
        submit(prepared(here))


def test_without_slurm(here: Path, no_slurm: StandIns) -> None:
    with pytest.raises(ConfigError, match="SLURM is not here: no sbatch on PATH"):
        submit(prepared(here))
    assert not (here / "run").exists()


REFUSES = "#!/bin/sh\necho 'sbatch: error: bad partition' >&2\necho 'sbatch: error: Batch job submission failed' >&2\nexit 1\n"


@pytest.mark.parametrize("answer", [REFUSES, "#!/bin/sh\necho hello\n"])
def test_what_sbatch_refuses_leaves_nothing(here: Path, slurm: StandIns, answer: str) -> None:
    slurm.write("sbatch", answer)
    with pytest.raises(ConfigError, match="SLURM refused the job: ") as refused:
        submit(prepared(here, "--run_folder", "deep/down"))
    assert "\n" not in str(refused.value)
    if answer == REFUSES:
        assert str(refused.value) == "SLURM refused the job: bad partition; Batch job submission failed"
    assert sorted(path.name for path in here.iterdir()) == ["config.yaml", "profile.yaml", "shards"]


def test_a_refused_second_submission_leaves_the_first_as_it_was(here: Path, slurm: StandIns) -> None:
    submit(prepared(here))
    slurm.state(100, "FAILED|NonZeroExitCode|n1|1:00")

    def kept() -> dict[Path, bytes]:  # the pickles of jobs that have ended go: nobody is to find others in their place
        return {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file() and path.suffix != ".pkl"}

    before = kept()
    slurm.write("sbatch", REFUSES)
    with pytest.raises(ConfigError):
        submit(prepared(here, "--steps", "2"))
    assert kept() == before


def test_a_refused_evaluation_says_what_stands(here: Path, slurm: StandIns) -> None:
    accepts = (slurm.bin / "sbatch").read_text().removeprefix("#!/bin/sh\n")
    refuses = "if /bin/grep -q dependency \"$1\"; then echo 'no' >&2; exit 1; fi\n"
    (slurm.bin / "sbatch").write_text(f"#!/bin/sh\n{refuses}{accepts}")
    with pytest.raises(ConfigError, match="the evaluation: SLURM refused the job: no; the training is submitted, as job 100"):
        submit(prepared(here, evaluation=True))
    record = read_record(here / "run")
    assert (record["job_id"], record["eval_job_id"]) == ("100", None)
    assert record["evaluation"]["train"] == "shards"  # `resume` asks for it again
    names = {path.name for path in (here / "run/slurm").iterdir() if not path.is_symlink()}
    assert names == {"config.yaml", "100_submission.sh", "100_submitted.pkl"}


def test_launch_submit_does_the_same_from_python(here: Path, slurm: StandIns) -> None:
    command = [sys.executable, Path(__file__).parents[3] / "launch/submit.py", "config.yaml", "run"]
    options = ["--nodes", "2", "--gpus", "0", "--tasks", "2", "--cpus", "3", "--hours", "1.5"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"job 100: {here / 'run'}\n"), ended.stderr
    same = Profile(partition="main", nodes=2, gpus_per_node=0, tasks_per_node=2, cpus_per_task=3, time="90")
    assert (slurm.folder / "100.sh").read_text() == script(prepare("config.yaml", [], same), "train")
    ended = subprocess.run([*command, "--nodes", "3"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is not divided by 24 processes" in ended.stderr


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["--stepps", "3"], {}, "command line: stepps: unknown key"),
        (["--run_folder", "50%j"], {}, "SLURM would fill in what follows the %"),
        (["--run_folder", "a\\b"], {}, "must be one line of text without backslashes"),
        (["--run_folder", "a\nb"], {}, "must be one line of text"),
        ([], {"nodes": 3, "tasks_per_node": 1}, "global_batch_size: 8 is not divided by 3 processes x 1 micro_batches"),
        (["--global_batch_size", "32"], {}, "32 is larger than the 24 images"),
        (["--run_folder", "shards"], {}, "run_folder: .* exists and is not a run folder"),
        (
            ["--run_folder", "a:b"],
            {"container": "/x", "container_runtime": "apptainer"},
            "a container mounts none with a comma or colon",
        ),
    ],
)
def test_refused_before_the_queue(here: Path, overrides: list[str], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        prepared(here, *overrides, **changes)
    assert "\n" not in str(refused.value)


def test_missing_data_is_refused(here: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        prepared(here, "--data.shards", "nowhere")
    with pytest.raises(DataError, match="nowhere"):
        prepare("config.yaml", [], ONE, evaluation=Evaluation("shards", "nowhere", ONE))


def test_fewer_steps_than_done_are_refused(here: Path) -> None:
    (here / "run/checkpoints").mkdir(parents=True)
    (here / "run/config.yaml").write_text((here / "config.yaml").read_text())
    (here / "run/checkpoints/step-00000009.json").touch()
    with pytest.raises(ConfigError, match=r"^steps: 3: the run in .* has done 9 already; ask for more"):
        prepared(here)
    prepared(here, "--steps", "9")


def test_a_read_only_run_folder_is_one_line(here: Path, slurm: StandIns) -> None:
    (here / "run").mkdir()
    (here / "run/slurm").touch()  # also root cannot make a folder of it
    with pytest.raises(ConfigError, match="cannot be written"):
        submit(prepared(here))


def test_a_damaged_record_is_one_line(here: Path) -> None:
    (here / "run").mkdir()
    with pytest.raises(ConfigError, match="no job was submitted for this folder"):
        read_record(here / "run")
    (here / "run/submission.json").write_text("{")
    with pytest.raises(DataError, match=r"submission.json: is damaged"):
        read_record(here / "run")


@pytest.mark.parametrize(("device", "gpus", "batch"), [("cpu", 2, "16"), ("cuda", 0, "8")])
def test_gpus_that_would_stand_idle_or_be_missed(here: Path, device: str, gpus: int, batch: str) -> None:
    with pytest.raises(ConfigError, match=rf"^device: '{device}' contradicts the profile's gpus_per_node: {gpus}; change one"):
        check_device(prepared(here, "--global_batch_size", batch, "--device", device, gpus_per_node=gpus))


def test_a_run_that_is_done_needs_no_job(here: Path, slurm: StandIns) -> None:
    def made(*names: str) -> None:
        for name in names:
            path = here / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")

    store_config(prepared(here))
    (here / "run/config.yaml").write_text((here / "run/slurm/config.yaml").read_text())
    made("checkpoints/step-00000003.json")
    assert submit(prepared(here)) == ["100"], "its encoder is missing"
    slurm.state(100, "COMPLETED|None|n1|1:00")
    made("encoders/step-00000003.safetensors")
    dry_run(prepared(here))
    with pytest.raises(ConfigError, match=r"^steps: .*run has done all of its 3; nothing is left for a job"):
        submit(prepared(here))
    assert submit(prepared(here, evaluation=True)) == ["101", "102"]
