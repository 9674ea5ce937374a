"""How much a run loses on a real two-node SLURM when it is preempted, runs into its time limit, is requeued, or loses a node.

    python benchmarks/faults_slurm.py [--rows preemption time-limit requeue node array] [--times 10]

Starts its own cluster on this machine (root, slurm-wlm, munge and iproute2 are needed) and trains the real trainer on it, with
steps of 0.2 s and more, a checkpoint every 10 steps. Prints a Markdown row for each fault. The last column compares the last
checkpoint with that of a run that nobody disturbed: parameters, buffers, momentum and counters, bit for bit.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import training_runs
from simclr_dist.run.claim import heartbeat
from simclr_dist.run.status import read_ledger
from slurm.cluster import Cluster, why_not
from slurm.training import STARTUP, Run, alone, assert_same, submit_array

STEPS = 400
HEADER = """| fault | times | steps lost (each) | seconds from signal to requeue (each) | job states seen | final state equal |
|---|---|---|---|---|---|"""


def preempt(run: Run) -> None:
    """An urgent job takes both nodes; grace 20 s."""
    run.cluster.login("sbatch", "-p", "urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", cwd=run.folder)


def requeue(run: Run) -> None:
    """An administrator requeues the job; SIGKILL follows after KillWait, 5 s."""
    run.cluster.login("scontrol", "requeue", str(run.job))


def one_rank(run: Run) -> None:
    """SIGTERM to one rank."""
    os.kill(run.ranks()[-1], signal.SIGTERM)


def kill_rank(run: Run) -> None:
    """kill -9 of one rank."""
    os.kill(run.ranks()[-1], signal.SIGKILL)


def lose(name: str) -> Callable[[Run], None]:
    """Power failure of a node, which comes back after a second."""

    def fault(run: Run) -> None:
        run.cluster.kill_node(name)
        time.sleep(1)
        run.cluster.boot_node(name)

    return fault


ROWS: dict[str, tuple[str, Callable[[Run], None] | None]] = {
    "preemption": ("preemption, grace 20 s", preempt),
    "time-limit": ("time limit of a minute, notice 30 s before", None),
    "requeue": ("`scontrol requeue`, KillWait 5 s", requeue),
    "one-rank": ("SIGTERM to one rank", one_rank),
    "kill-rank": ("kill -9 of a rank", kill_rank),
    "node": ("power failure of n2", lose("n2")),
    "array": ("preemption of the task that has its array's number; the other task trains on", None),
    "first-node": ("power failure of n1: rank 0, store, batch script", lose("n1")),
}


def measure(name: str, times: int, shards: Path, undisturbed: dict[str, Any]) -> str:
    """One row of the table."""
    title, fault = ROWS[name]
    if name == "array":
        return measure_array(title, times, shards, undisturbed)
    with tempfile.TemporaryDirectory() as folder, Cluster(grace=20, kill_wait=5) as cluster:
        run = Run(cluster, Path(folder), shards, steps=STEPS, checkpoint={"every": 10})
        run.profile(time="1" if fault is None else "00:30:00", stop_seconds=30)
        run.submit()
        delays: list[float] = []
        states: set[str] = set()
        for number in range(1, times + 1):
            run.started(number, seconds=240)
            run.reach(run.events("start")[-1]["step"] + 8)
            begin = time.time()
            if fault is not None:
                fault(run)
            while len(run.events("start")) <= number and run.step < STEPS:
                states.add(cluster.state(run.job))
                time.sleep(0.1)
            requeued = [entry["time"] for entry in run.events("requeued") if entry["time"] >= begin]
            asked = [entry["asked"] for entry in run.events("stop") if entry.get("asked", 0) >= begin]
            if requeued:  # else SLURM has done it; else from the signal that rank 0 heard, or from the fault
                delays.append(requeued[0] - (asked[0] if asked else begin))
        run.done(600)
        lost = [start["steps_lost"] for start in run.events("start")[1:]]
        try:
            assert_same(training_runs.checkpoint(run.run, STEPS), undisturbed)
            equal = "yes"
        except AssertionError:
            equal = "NO"
    seconds = ", ".join(f"{delay:.1f}" for delay in delays) or "SLURM's own"
    return f"| {title} | {times} | {', '.join(map(str, lost))} | {seconds} | {', '.join(sorted(states))} | {equal} |"


def measure_array(title: str, times: int, shards: Path, undisturbed: dict[str, Any]) -> str:
    """The row of an array of two trainings."""
    with tempfile.TemporaryDirectory() as name, Cluster(grace=20, kill_wait=5) as cluster:
        folder, states = Path(name), set()
        cluster.environment |= STARTUP
        training_runs.write_config(folder, shards, steps=STEPS, checkpoint={"every": 10})
        tasks, own = submit_array(cluster, folder, "--processes", "2")
        run, urgent = folder / f"run-{own}", ("-p", "urgent", "--exclusive", "--wrap", "sleep 1")

        def events(event: str) -> list[dict[str, Any]]:
            return [entry for entry in read_ledger(run) if entry["event"] == event]

        for number in range(1, times + 1):
            cluster.until(lambda: heartbeat(run)["step"] >= events("start")[-1]["step"] + 8, "it trains", 240)
            cluster.login("sbatch", f"--nodelist={cluster.show(tasks[own])['NodeList']}", *urgent, cwd=folder)
            while len(events("start")) <= number and heartbeat(run)["step"] < STEPS:
                states.add(cluster.state(tasks[own]))
                time.sleep(0.1)
        assert [cluster.wait(task, "COMPLETED", "FAILED", "CANCELLED", seconds=600) for task in tasks] == ["COMPLETED"] * 2
        restarts = [int(cluster.show(task)["Restarts"]) for task in tasks]
        assert restarts == [times * (number == own) for number in (0, 1)], restarts
        lost = [start["steps_lost"] for start in events("start")[1:]]
        seconds = [again["time"] - stop["asked"] for again, stop in zip(events("requeued"), events("stop"), strict=False)]
        for number in (0, 1):
            assert_same(training_runs.checkpoint(folder / f"run-{number}", STEPS), undisturbed)
    delays = ", ".join(f"{delay:.1f}" for delay in seconds)
    return f"| {title} | {times} | {', '.join(map(str, lost))} | {delays} | {', '.join(sorted(states))} | yes, of both |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--times", type=int, help="(default: 10 preemptions, 3 of each other)")
    told = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"{reason}\n")
    with tempfile.TemporaryDirectory() as folder:
        shards = training_runs.make_shards(Path(folder))
        undisturbed = alone(Path(folder) / "alone", shards, STEPS)
        print(HEADER, flush=True)
        for name in told.rows:
            print(measure(name, told.times or (10 if name == "preemption" else 3), shards, undisturbed), flush=True)


if __name__ == "__main__":
    main()
