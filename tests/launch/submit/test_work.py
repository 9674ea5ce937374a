"""Other verbs as jobs: what is sent, what its tasks run, what is left when it is sent again; and every mistake in one line."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from simclr_dist.convert.settings import ShardSettings
from simclr_dist.convert.shards import write_part, write_shards
from simclr_dist.launch.slurm.batch import script
from simclr_dist.launch.slurm.profile import Profile
from simclr_dist.launch.slurm.work import Work
from simclr_dist.run.status import outlook, read_ledger
from stand_ins import Command, StandIns, refused

SHARD = ["shard", "images", "out", "--profile", "cores.yaml"]
CORES = "{gpus_per_node: 0, cpus_per_task: 3}"
VALIDATED = ["--train", "shards", "--val", "shards", "--test", "shards"]


@pytest.fixture(autouse=True)
def images(here: Path, shards: Path) -> Path:
    """1,000 images, which are links to 24: 8 units of a conversion."""
    for number in range(1000):
        link = here / "images" / f"class{number % 2}" / f"{number:04d}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(shards.parent / "images" / f"class{number % 2}" / f"{number % 24}.png")
    (here / "cores.yaml").write_text(CORES)
    (here / "encoder.safetensors").touch()
    return here / "images"


def sent(here: Path, product: str, pickle: str) -> list[str]:
    """The words of the command that a job's tasks run."""
    words: list[str] = DelayedSubmission.load(here / f"{product}.jobs" / "slurm" / f"{pickle}_submitted.pkl").function.command
    return words


def ended(slurm: StandIns, *jobs: str, state: str = "COMPLETED") -> None:
    for job in jobs:
        (slurm.folder / f"{job}.state").write_text(f"{state}|None|n1|0:09\n")


def test_a_conversion_is_an_array_and_a_job_behind_it(here: Path, slurm: StandIns, command: Command) -> None:
    code, out, err = command(*SHARD, "--parts", "3", "--split", "0.8/0.2")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "job 100: part 1, 2, 3 of 3, 3 cores each",
        f"job 101: {here / 'out'}, 1 x 1 ranks, once job 100 is done",
        f"next: simclr-dist submit status {shlex.quote(str(here / 'out'))}",
    ]
    assert not (here / "out").exists()
    assert not (here / "out.partial").exists()
    script = (slurm.folder / "100.sh").read_text()
    assert "#SBATCH --array=1,2,3\n" in script
    assert "#SBATCH --job-name=out\n" in script
    assert "#SBATCH --requeue\n" in script
    assert "\nexport SIMCLR_DIST_ARRAY_TASK=$SLURM_JOB_ID\n" in script
    assert script.splitlines()[-1].startswith("exec ")
    behind = (slurm.folder / "101.sh").read_text()
    assert "#SBATCH --dependency=afterok:100\n" in behind
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in behind
    assert "ARRAY" not in behind
    words = ["simclr_dist", "shard", "images", "out", "--split", "0.8/0.2"]
    for part in (1, 2, 3):
        assert sent(here, "out", f"100_{part}") == [*words, "--part", f"{part}/3", "--processes", "3"]
    assert sent(here, "out", "101") == [*words, "--finish", "--processes", "3"]
    sent_jobs = [line["job"] for line in read_ledger(here / "out.jobs") if line["event"] == "submitted"]
    assert sent_jobs == ["100_1", "100_2", "100_3", "101"]
    assert outlook(here / "out.jobs").job is None, "nobody looks for a training there"


def test_sent_again_it_sends_what_is_left(here: Path, slurm: StandIns, command: Command, images: Path) -> None:
    assert command(*SHARD, "--parts", "3")[0] == 0
    ended(slurm, "100_1", "100_2")
    ended(slurm, "100_3", state="FAILED")
    line = f"simclr-dist: {str(here / 'out')!r}: its job 101 is RUNNING on n[1-2] 0:07, says squeue; wait for its end, or "
    assert refused(command(*SHARD, "--parts", "3")).startswith(line)
    ended(slurm, "101", state="CANCELLED")
    for part in (1, 2):
        write_part(images, here / "out", ShardSettings(), part, 3, processes=1)
    assert "parts 3, not 4" in refused(command(*SHARD, "--parts", "4"))
    code, out, err = command(*SHARD, "--parts", "3")
    assert (code, err) == (0, "")
    assert out.startswith("job 102: part 3 of 3, 3 cores each\n")
    assert "#SBATCH --array=3\n" in (slurm.folder / "102.sh").read_text()
    write_part(images, here / "out", ShardSettings(), 3, 3, processes=1)
    ended(slurm, "102_3", "103")
    code, out, err = command(*SHARD, "--parts", "3")
    assert (code, err, out.splitlines()[0]) == (0, "", f"job 104: {here / 'out'}, 1 x 1 ranks")
    assert "dependency" not in (slurm.folder / "104.sh").read_text()


def test_what_is_done_is_not_sent(here: Path, slurm: StandIns, command: Command, images: Path) -> None:
    write_shards(images, here / "out", processes=1)
    code, out, err = command(*SHARD, "--parts", "3")
    assert (code, err) == (0, "")
    assert out == "out: was done already, with the same settings from the same files; nothing is submitted\n"
    assert not (here / "out.jobs").exists()
    assert "exists and is not empty" in refused(command(*SHARD, "--parts", "3", "--seed", "1"))


def test_the_last_job_may_have_a_profile_of_its_own(here: Path, slurm: StandIns, command: Command) -> None:
    (here / "all.yaml").write_text("{gpus_per_node: 0, cpus_per_task: 16}")
    assert command(*SHARD, "--parts", "2", "--finish-profile", "all.yaml")[0] == 0
    assert "--cpus-per-task=3\n" in (slurm.folder / "100.sh").read_text()
    assert "--cpus-per-task=16\n" in (slurm.folder / "101.sh").read_text()
    assert sent(here, "out", "101")[-1] == "16"


def test_a_dry_run_shows_all_and_writes_nothing(
    here: Path, slurm: StandIns, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        code, out, err = command(*SHARD, "--parts", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert not list(here.glob("out*"))
    assert command(*SHARD, "--parts", "2")[0] == 0
    assert (slurm.folder / "100.sh").read_text().rstrip() in out
    assert (slurm.folder / "101.sh").read_text().rstrip().replace("afterok:100", "afterok:ARRAY") in out
    assert "# ---- each rank runs: python -m simclr_dist shard images out --part 2/2 --processes 3\n" in out


def test_features_and_a_result_are_a_job_of_many_ranks(here: Path, slurm: StandIns, command: Command) -> None:
    words = ["embed", "encoder.safetensors", "shards", "new/f.parquet", "--layer", "z"]
    code, out, err = command(*words, "--profile", "profile.yaml")
    assert (code, err) == (0, "")
    assert out.startswith(f"job 100: {here / 'new' / 'f.parquet'}, 2 x 2 ranks\n")
    script = (slurm.folder / "100.sh").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script
    assert "--array" not in script
    assert sent(here, "new/f.parquet", "100") == ["simclr_dist", *words]
    sets = ["--train", "shards", "--test", "shards"]
    assert command("eval", "encoder.safetensors", *sets, "--profile", "profile.yaml", "--k", "5")[0] == 0
    assert sent(here, "encoder.eval.json", "101") == ["simclr_dist", "eval", "encoder.safetensors", "--k", "5", *sets]
    for number, more in (
        (102, ["other.safetensors"]),
        (103, ["--rival", "resnet50=published.pth"]),
        (104, ["--labels", "0.5/1"]),
    ):
        (here / "other.safetensors").touch()
        (slurm.folder / f"{number - 1}.state").write_text("COMPLETED|None|n1|0:09\n")
        code, out, err = command("eval", "encoder.safetensors", *more, *sets, "--profile", "profile.yaml")
        assert (code, err) == (0, "")
        assert out.startswith(f"job {number}: {here / 'encoder.eval.rivals.json'}, 2 x 2 ranks\n")
        assert sent(here, "encoder.eval.rivals.json", f"{number}") == [
            "simclr_dist",
            "eval",
            "encoder.safetensors",
            *more,
            *sets,
        ]
    assert "none: no such file; " in refused(command("eval", "encoder.safetensors", "none", *sets, "--profile", "profile.yaml"))
    several = ["eval", "encoder.safetensors", "other.safetensors", *sets, "--layer", "z", "--profile", "profile.yaml"]
    assert "val: no such folder of shards" in refused(command(*several, "--val", "val"))


def test_status_logs_and_cancel_take_what_the_jobs_write(here: Path, slurm: StandIns, command: Command) -> None:
    assert command(*SHARD, "--parts", "2")[0] == 0
    ended(slurm, "100_1")
    (slurm.folder / "100_2.state").write_text("RUNNING|None|n2|0:07\n")
    (slurm.folder / "101.state").write_text("PENDING|Dependency||0:00\n")
    code, out, err = command("status", "out")
    assert (code, err) == (0, "")
    assert out.splitlines()[:4] == [
        str(here / "out.jobs"),
        "  part 1      100_1: COMPLETED on n1 0:09, says squeue",
        "  part 2      100_2: RUNNING on n2 0:07, says squeue",
        "  finish      101: PENDING (Dependency) 0:00, says squeue",
    ]
    for job, text in (("100_1", "one\n"), ("100_2", "two\n")):
        (here / "out.jobs" / "slurm" / f"{job}_0_log.out").write_text(text)
    assert command("logs", "out")[:2] == (0, "one\ntwo\n")
    assert "no evaluation was submitted" in refused(command("logs", "out", "--eval"))
    line = "submit resume: is for runs; the same `submit shard ...` again sends what is left\n"
    assert refused(command("resume", "out")) == f"simclr-dist: {line}"
    code, out, err = command("cancel", "out")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "cancelled: job 100_2 and 101; the same command sends what is left"
    assert (slurm.folder / "cancelled").read_text() == "100_2 101\n"
    assert (here / "out.jobs" / "cancelled").read_text() == "100_2 101\n", "none of them asks for another start"
    assert command(*SHARD, "--parts", "2")[0] == 0
    assert not (here / "out.jobs" / "cancelled").exists()


def test_what_sbatch_refuses(here: Path, slurm: StandIns, command: Command) -> None:
    no = "#!/bin/sh\necho 'sbatch: error: Invalid job array specification' >&2\nexit 1\n"
    once = '#!/bin/sh\nif [ -f {folder}/100.sh ]; then exec {bin}/no; fi\nexec {bin}/yes "$@"\n'
    (slurm.bin / "sbatch").rename(slurm.bin / "yes")
    slurm.write("no", no)
    slurm.write("sbatch", no)
    assert "SLURM refused the job: Invalid job array specification" in refused(command(*SHARD, "--parts", "2"))
    assert not list(here.glob("out*"))
    slurm.write("sbatch", once.replace("{bin}", str(slurm.bin)))
    line = refused(command(*SHARD, "--parts", "2"))
    assert "the job behind the parts: SLURM refused the job: Invalid" in line
    assert "they are submitted, as job 100: `simclr-dist submit cancel " in line
    assert json.loads((here / "out.jobs" / "submission.json").read_text())["eval_job_id"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["shard", "images", "out", "--parts", "2"], "--profile: is missing; "),
        (SHARD, "--parts: is missing; "),
        ([*SHARD, "--parts", "0"], "argument --parts: 0 is too small; the least is 1; see `simclr-dist submit --help`"),
        ([*SHARD[:2], *SHARD[3:], "--parts", "2"], "usage: simclr-dist submit shard SRC DST --parts N --profile FILE"),
        ([*SHARD, "--parts", "2", "--finish"], "--finish: has no effect with --parts"),
        ([*SHARD, "--parts", "2", "--index", "x"], "--index: has no effect with --parts"),
        ([*SHARD, "--parts", "2", "--local"], "--local: has no effect on shard; leave it out"),
        ([*SHARD, "--parts", "2", "--sead", "1"], "unrecognized arguments: --sead 1; see `simclr-dist shard --help`"),
        ([*SHARD, "--parts", "2", "--shard-size", "0"], "shard_size: 0 is too small; the least is 1"),
        (["shard", "none", "out", "--parts", "2", "--profile", "cores.yaml"], "none: no such folder of images"),
        (["shard", "images", "a%b", "--parts", "2", "--profile", "cores.yaml"], "what the jobs write: "),
        ([*SHARD[:3], "--parts", "2", "--profile", "profile.yaml"], "profile: nodes: 2, tasks_per_node: 2, gpus_per_node: 0: "),
        (["config.yaml", "--parts", "2"], "--parts: has no effect on submit; leave it out"),
        (["embed", "encoder.safetensors", "shards", "f.txt", "--profile", "cores.yaml"], "f.txt: the file of features"),
        (["embed", "none", "shards", "f.parquet", "--profile", "cores.yaml"], "none: no such file; "),
        (["embed", "encoder.safetensors", "--parts", "2"], "--parts: has no effect on embed; leave it out"),
        (["eval", "encoder.safetensors", "--profile", "cores.yaml"], "the following arguments are required: --train, --test; "),
        (["eval", "--watch", "run", "--train", "shards", "--test", "shards", "--profile", "cores.yaml"], "--watch: `"),
        (["eval", "encoder.safetensors", "--train", "x", "--test", "shards", "--profile", "cores.yaml"], "/"),
        (
            ["eval", "encoder.safetensors", *VALIDATED, "--protocols", "sgd", "--profile", "cores.yaml"],
            "val: shards: there is nothing to choose by it, as all is set; leave it out",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here: Path, slurm: StandIns, command: Command, words: list[str], line: str) -> None:
    assert refused(command(*words)).startswith(f"simclr-dist: {line}")
    assert not list(here.glob("*.jobs"))
    assert not (slurm.folder / "100.sh").exists()


def test_a_folder_in_the_way_is_named_before_the_queue(here: Path, slurm: StandIns, command: Command) -> None:
    (here / "out.partial").mkdir()
    (here / "out.partial" / "thesis.txt").touch()
    assert "thesis.txt: is in the way and was not made by simclr-dist" in refused(command(*SHARD, "--parts", "2"))
    (here / "out.partial" / "thesis.txt").rename(here / "out.partial" / "lock")  # all that a conversion killed at once leaves
    assert command(*SHARD, "--parts", "2")[0] == 0


def test_a_record_from_elsewhere_names_numbers_alone(here: Path, slurm: StandIns, command: Command) -> None:
    assert command(*SHARD, "--parts", "2")[0] == 0
    path = here / "out.jobs" / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["1 --user=me"]}))
    assert "tasks: ['1 --user=me'] are no numbers" in refused(command("cancel", "out"))


def test_a_container_sees_the_folder_of_what_is_written(tmp_path: Path) -> None:
    profile = Profile(gpus_per_node=0, container="/x.sif", container_runtime="apptainer")
    text = script(Work("embed", ["e", "s", "f"], tmp_path / "new" / "f", profile, tmp_path), "work")
    assert f"--bind={tmp_path / 'new'} " in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
