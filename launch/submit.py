"""submitit on one page: a training job that survives preemption and time limits. To be copied and changed.

    python launch/submit.py CONFIG RUN_FOLDER --nodes 2 --gpus 8 --partition main --hours 12

`simclr-dist submit` does the same with profiles, checks, an evaluation job, and status, logs, cancel and resume by run folder.
"""

import argparse
import shlex
import sys
from pathlib import Path

import submitit

from simclr_dist.launch.slurm.job import Job


def main() -> None:
    """Submit one job and say its number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="a node; 0 for CPUs")
    parser.add_argument("--tasks", type=int, help="ranks a node (default: one a GPU)")
    parser.add_argument("--cpus", type=int, default=8, help="a rank")
    parser.add_argument("--partition", default="main")
    parser.add_argument("--hours", type=float, default=12)
    told = parser.parse_args()
    run = told.run.resolve()

    # One task is one rank, of which the job object is the parent: it passes signals on, and asks for the requeue when the
    # ranks have saved. submitit's own way, checkpoint(), is called by one rank alone, and not at all on SIGTERM.
    job = Job(
        kind="train",
        run=str(run),
        command=["simclr_dist.train", str(Path(told.config).resolve()), "--run_folder", str(run)],
        working_directory=str(Path.cwd()),
    )
    rescue = f"{shlex.quote(sys.executable)} -m simclr_dist.launch.slurm.rescue {shlex.quote(str(run))}"
    executor = submitit.AutoExecutor(run / "slurm", cluster="slurm", slurm_max_num_timeout=1_000_000)
    executor.update_parameters(
        name=run.name,
        nodes=told.nodes,
        tasks_per_node=told.tasks or max(told.gpus, 1),
        cpus_per_task=told.cpus,
        timeout_min=int(60 * told.hours),
        slurm_partition=told.partition,
        slurm_signal_delay_s=120,  # SIGUSR2 so long before the time limit: a step and a checkpoint must fit
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_teardown=[f"exec {rescue} $?"],  # requeues for ranks that have died
        slurm_additional_parameters={"requeue": True, **({"gpus-per-node": told.gpus} if told.gpus else {})},
    )
    print(f"job {executor.submit(job).job_id}: {run}")


if __name__ == "__main__":
    main()
