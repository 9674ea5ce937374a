"""A sweep on a real SLURM: one array, of which one task is requeued, and each evaluation behind its own training."""

import json
from pathlib import Path

import pytest

import training_runs
from slurm.cluster import Cluster
from slurm.training import Run

NAMES = ("base_lr=1.0", "base_lr=3.0")


@pytest.mark.parametrize("cluster", [{"kill_wait": 15}], indirect=True)
def test_a_sweep_is_sent_requeued_cancelled_and_sent_again(cluster: Cluster, tmp_path: Path) -> None:
    """The requeue of one task leaves the other alone; so does the cancelling of one run."""
    shards = training_runs.make_shards(tmp_path / "images")
    sweep = Run(cluster, tmp_path, shards, run_folder=str(tmp_path / "sweep"), steps=40, checkpoint={"every": 10})
    sweep.profile(nodes=1)
    words = ["submit", "config.yaml", "--profile", "profile.yaml", "--sweep", "optim.base_lr=1.0,3.0"]
    words += ["--eval", "--train", str(shards), "--test", str(shards)]
    try:
        said = sweep.command(*words)
        runs = [tmp_path / "sweep" / name for name in NAMES]
        jobs = [json.loads((run / "submission.json").read_text())["job_id"] for run in runs]
        assert [job.partition("_")[2] for job in jobs] == ["0", "1"], said
        cluster.until(lambda: all(training_runs.steps_done(run) > 2 for run in runs), "both train", 120)
        cluster.login("scontrol", "requeue", jobs[0])
        sweep.command("submit", "cancel", str(runs[1]))
        cluster.until(lambda: len(training_runs.events(runs[0], "start")) == 2, "the first has begun again", 120)
        assert cluster.wait(jobs[1], "CANCELLED", "COMPLETED", seconds=60) == "CANCELLED"
        cluster.until((runs[0] / "eval" / "step-00000040.json").exists, "the first is evaluated", 180)
        starts = [training_runs.events(run, "start") for run in runs]
        assert [len(of_run) for of_run in starts] == [2, 1], "a requeue of one task is not one of the array"
        assert [start["steps_lost"] for start in starts[0]] == [0, 0]
        assert {
            event["job"] for run, job in zip(runs, jobs, strict=True) for event in training_runs.events(run, "start")
        } == set(jobs)
        assert "step 1/40" in (runs[0] / "slurm" / f"{jobs[0]}_0_log.out").read_text(), "the run's own log"
        said = sweep.command(*words)  # what is left is one run
        assert f"{NAMES[0]}: is done" in said
        again = json.loads((runs[1] / "submission.json").read_text())["job_id"]
        assert again.endswith("_0")
        assert cluster.wait(again, "COMPLETED", "FAILED", "CANCELLED", seconds=180) == "COMPLETED"
        table = [line.split()[:3] for line in sweep.command("runs", str(tmp_path / "sweep")).splitlines()]
        assert table[1:3] == [[name, "done", "40/40"] for name in NAMES]
    except AssertionError as error:
        logs = "".join(
            f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted((tmp_path / "sweep").glob("**/slurm/*_log.*"))
        )
        raise AssertionError(f"{error}\n{logs}\n{cluster.login('squeue', check=False).stdout}") from error
    finally:
        cluster.cancel_all()
