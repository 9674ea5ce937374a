"""How much a run loses on a real two-node SLURM when it is preempted, runs into its time limit, is requeued, or loses a node.

    python benchmarks/faults_slurm.py [--rows preemption time-limit requeue node array] [--times 10]
    python benchmarks/faults_slurm.py --photos 20000 [--times 2]

Starts its own cluster on this machine (root, slurm-wlm, munge and iproute2 are needed) and trains the real trainer on it, with
steps of 0.2 s and more, a checkpoint every 10 steps. Prints a Markdown row for each fault. The last column compares the last
checkpoint with that of a run that nobody disturbed: parameters, buffers, momentum and counters, bit for bit.

With --photos it converts so many photos (500 x 375, 84 KB each) instead, by `submit shard` on one node of two cores: by one
task, by two, and by two of which one is killed in the middle. A task has one core; the job that writes the tars has as many as
there are tasks. The seconds are those from the command to the end of the last job. The ways take turns, there and back.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from PIL import Image

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


def make_photos(folder: Path, photos: int) -> None:
    """JPEGs of 16 pictures with some noise; a comment in each makes its bytes different."""
    random = np.random.default_rng(0)
    contents = []
    for _ in range(16):
        small, file = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)), io.BytesIO()
        noisy = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)) + random.normal(0, 12, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    for number in range(photos):
        path, content = folder / f"class{number % 20:02d}" / f"{number:07d}.jpg", contents[number % 16]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[:2] + b"\xff\xfe\0\x09%07d" % number + content[2:])


def convert(cluster: Cluster, folder: Path, tasks: int, *, kill: bool) -> tuple[float, str, int]:
    """Convert folder/photos. Returns the seconds, a digest of all files, and how many whole pieces were made again."""
    for name, cores in (("part", 1), ("finish", tasks)):
        (folder / f"{name}.yaml").write_text(f"gpus_per_node: 0\ncpus_per_task: {cores}\n")
    words = ["submit", "shard", "photos", "out", "--parts", str(tasks)]
    words += ["--profile", "part.yaml", "--finish-profile", "finish.yaml"]
    begin = time.monotonic()
    cluster.login(sys.executable, "-m", "simclr_dist", *words, cwd=folder)
    record = json.loads((folder / "out.jobs" / "submission.json").read_text())
    units, before = folder / "out.partial" / "units", {}
    if kill:
        pieces = len(list((folder / "photos").rglob("*.jpg"))) // 128 // tasks
        cluster.until(lambda: len(list(units.glob("*[02468].arrow"))) >= pieces // 2, "part 1 has done a half", 600)
        before = {path: path.stat().st_mtime_ns for path in units.glob("*.arrow")}
        [rank] = cluster.network.pids("n1", "-m simclr_dist shard photos out --part 1/")
        os.kill(rank, signal.SIGKILL)
        cluster.until(lambda: cluster.state(f"{record['job_id']}_1") == "COMPLETED", "part 1 is done", 1200)
    again = sum(path.stat().st_mtime_ns != when for path, when in before.items())
    end = cluster.wait(record["eval_job_id"], "COMPLETED", "FAILED", "CANCELLED", seconds=2400)
    seconds = time.monotonic() - begin
    assert end == "COMPLETED", end
    restarts = [cluster.show(f"{record['job_id']}_{part}")["Restarts"] for part in range(1, tasks + 1)]
    assert restarts == [str(int(kill)), "0"][:tasks], restarts
    digest = hashlib.sha256()
    for path in sorted((folder / "out").rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    for name in ("out", "out.jobs"):
        shutil.rmtree(folder / name)
    return seconds, digest.hexdigest(), again


def measure_conversion(photos: int, times: int) -> None:
    """Print the table of --photos."""
    ways = {"one task": (1, False), "two tasks": (2, False), "two tasks, one killed at its half": (2, True)}
    done: dict[str, list[tuple[float, str, int]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name, Cluster(nodes=1) as cluster:
        make_photos(Path(name) / "photos", photos)
        for turn in range(times):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                tasks, kill = ways[way]
                done[way].append(convert(cluster, Path(name), tasks, kill=kill))
                print(f"{way}: {done[way][-1]}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print("| way | seconds (each) | of one task's, in its turn | whole pieces made again | bytes |\n|---|---|---|---|---|")
    for way, results in done.items():
        seconds = [result[0] for result in results]
        shares = [mine / one[0] for mine, one in zip(seconds, done["one task"], strict=True)]
        same = "the same" if {result[1] for result in results} == {done["one task"][0][1]} else "DIFFERENT"
        columns = (", ".join(f"{value:{form}}" for value in values) for values, form in ((seconds, ".1f"), (shares, ".2f")))
        print(f"| {way} | {' | '.join(columns)} | {sum(result[2] for result in results)} | {same} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--times", type=int, help="(default: 10 preemptions, 3 of each other)")
    parser.add_argument("--photos", type=int, metavar="N", help="convert N photos, instead of these rows")
    told = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"{reason}\n")
    if told.photos:
        measure_conversion(told.photos, told.times or 2)
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = training_runs.make_shards(Path(folder))
        undisturbed = alone(Path(folder) / "alone", shards, STEPS)
        print(HEADER, flush=True)
        for name in told.rows:
            print(measure(name, told.times or (10 if name == "preemption" else 3), shards, undisturbed), flush=True)


if __name__ == "__main__":
    main()
