"""`simclr-dist submit` from Python: for a script that submits many runs, or finds out what to ask of SLURM.

    python launch/submit.py CONFIG RUN_FOLDER --nodes 2 --gpus 8 --partition main --hours 12

To be copied and changed. `simclr-dist submit status`, logs, cancel and resume know the run by its folder.
"""

import argparse
from pathlib import Path

from simclr_dist.launch.slurm.profile import profile_from_dict
from simclr_dist.launch.slurm.submission import check_device, prepare, submit
from simclr_dist.system.errors import UserError


def main() -> None:
    """Submit one job and print its number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="a node; 0 for CPUs")
    parser.add_argument("--tasks", type=int, help="ranks a node (default: one a GPU)")
    parser.add_argument("--cpus", type=int, default=8, help="a rank")
    parser.add_argument("--partition", default="main")
    parser.add_argument("--hours", type=float, default=12)
    options = parser.parse_args()
    keys = {  # those of launch/profiles; None leaves a key to SLURM
        "nodes": options.nodes,
        "gpus_per_node": options.gpus,
        "tasks_per_node": options.tasks,
        "cpus_per_task": options.cpus,
        "partition": options.partition,
        "time": int(60 * options.hours),  # minutes
    }
    try:
        profile = profile_from_dict(keys, "command line")
        submission = prepare(options.config, ["--run_folder", str(options.run)], profile)
        check_device(submission)
        (job,) = submit(submission)
    except UserError as error:
        parser.error(str(error))
    print(f"job {job}: {submission.run}")


if __name__ == "__main__":
    main()
