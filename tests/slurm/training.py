"""A real training run on the test cluster: submitted by our own command, watched, hurt, and compared with one left alone."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import training_runs
from simclr_dist.run.claim import heartbeat
from simclr_dist.run.status import read_ledger
from slurm.cluster import Cluster

STARTUP = {"STEP_PAUSE": "0.3", "WITHOUT_COMPILER": "1"}  # see tests/startup
LAUNCH = Path(__file__).parents[2] / "launch"
PROFILE = """
partition: main
nodes: {nodes}
gpus_per_node: 0
tasks_per_node: 1
cpus_per_task: 2
time: {time}
stop_seconds: {stop_seconds}
memory_gb: 0
extra: {{exclusive: true}}
environment: {{GLOO_SOCKET_IFNAME: eth0, OMP_NUM_THREADS: "1"}}
"""


class Run:
    """A run folder on the cluster, and its jobs."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, **changes: Any) -> None:
        self.cluster = cluster
        self.folder = folder
        self.shards = shards
        self.run = folder / "run"
        cluster.environment |= STARTUP
        training_runs.write_config(folder, shards, **{"run_folder": str(self.run), **changes})
        self.profile()

    def profile(self, nodes: int = 2, time: str = "00:30:00", stop_seconds: int = 30) -> None:
        """Write the profile that the next submission reads."""
        (self.folder / "profile.yaml").write_text(PROFILE.format(nodes=nodes, time=time, stop_seconds=stop_seconds))

    def command(self, *arguments: str, check: bool = True) -> str:
        """`simclr-dist ARGUMENTS` on the login node; returns what it printed."""
        done = self.cluster.login(sys.executable, "-m", "simclr_dist", *arguments, cwd=self.folder, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *options: str) -> int:
        """Submit; returns the training job's number."""
        said = self.command("submit", "config.yaml", "--profile", "profile.yaml", *options)
        self.job = int(json.loads((self.run / "submission.json").read_text())["job_id"])
        assert str(self.job) in said
        return self.job

    @property
    def step(self) -> int:
        """Steps done, as the heartbeat says."""
        return int(heartbeat(self.run).get("step", 0))

    def events(self, event: str) -> list[dict[str, Any]]:
        """The ledger's entries of a kind."""
        return [entry for entry in read_ledger(self.run) if entry["event"] == event]

    def reach(self, step: int, *, start: int | None = None, seconds: float = 120.0) -> None:
        """Wait for a step, and (with `start`) for the ledger to hold so many starts."""

        def there() -> bool:
            assert self.cluster.state(self.job) not in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT"), self.logs()
            return self.step >= step and (start is None or len(self.events("start")) >= start)

        self._until(there, f"step {step}", seconds)

    def started(self, count: int, seconds: float = 120.0) -> None:
        """Wait until the run has been started so often, and has done a step since."""

        def there() -> bool:
            assert self.cluster.state(self.job) not in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT"), self.logs()
            starts = self.events("start")
            return len(starts) >= count and self.step > starts[-1]["step"]

        self._until(there, f"start {count}", seconds)

    def pending(self, since: float, seconds: float = 60.0) -> float:
        """Wait until the job waits for its next start; returns the seconds since `since` (time.time())."""
        self._until(lambda: self.cluster.state(self.job) in ("PENDING", "REQUEUED"), "the job is pending", seconds)
        return time.time() - since

    def done(self, seconds: float = 180.0) -> None:
        """Wait for the training job's good end."""
        state = self.cluster.wait(self.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert state == "COMPLETED", f"{state}\n{self.logs()}"

    def ranks(self) -> list[int]:
        """Process ids of the training ranks, by node name and as seen from outside."""
        return [pid for node in ("n1", "n2") for pid in self.cluster.network.pids(node, "-m simclr_dist.train")]

    def logs(self) -> str:
        """All that the jobs and the ledger say."""
        logs = "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.run.glob("slurm/*_log.*")))
        entries = "\n".join(json.dumps(entry) for entry in read_ledger(self.run))
        return f"{logs}\n{entries}"

    def assert_equal(self, alone: dict[str, Any], step: int) -> None:
        """The last checkpoint is, bit for bit, that of a run that nobody disturbed."""
        assert_same(training_runs.checkpoint(self.run, step), alone)

    def _until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}\n{self.logs()}"
            time.sleep(0.2)


def submit_array(cluster: Cluster, folder: Path, *arguments: str) -> tuple[list[str], int]:
    """Two trainings of `folder`/config.yaml as one array, into run-0 and run-1, a node each; returns once both train.

    Returns the names of its tasks, and which of them has the array's own number.
    """
    script = f"exec bash {LAUNCH}/train.sbatch config.yaml run-$SLURM_ARRAY_TASK_ID {' '.join(arguments)}"
    options = ("--array=0-1", "--nodes=1", "--exclusive", "--requeue", "--open-mode=append")
    array = cluster.sbatch(script, *options, "--export=ALL,OMP_NUM_THREADS=1,GLOO_SOCKET_IFNAME=eth0", cwd=folder)
    tasks = [f"{array}_{number}" for number in (0, 1)]
    cluster.until(lambda: all(heartbeat(folder / f"run-{k}").get("step", 0) > 3 for k in (0, 1)), "both train", 120)
    [own] = [number for number in (0, 1) if cluster.show(tasks[number])["JobId"] == str(array)]
    return tasks, own


def alone(folder: Path, shards: Path, steps: int, world_size: int = 2) -> dict[str, Any]:
    """The last checkpoint of a run on this machine that nobody disturbs."""
    training_runs.write_config(folder, shards, steps=steps, checkpoint={"every": 1000})
    with training_runs.started(folder, world_size) as ranks:
        codes = ranks.wait(900)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.output}"
    state = training_runs.checkpoint(folder / "run", steps)
    shutil.rmtree(folder / "run")
    return state


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Parameters, buffers, momentum and counters of two checkpoints."""
    assert one["step"] == other["step"]
    assert one["counters"] == other["counters"]
    for name, tensor in other["model"].items():
        assert torch.equal(one["model"][name], tensor), name
    momentum = other["optimizer"]["state"]
    assert one["optimizer"]["state"].keys() == momentum.keys()
    for number, state in momentum.items():
        for name, value in state.items():
            mine = one["optimizer"]["state"][number][name]
            assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, (number, name)
