"""A training run on the test network, started on each node by hand as a user would, watched and hurt."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import training_runs
from network.namespaces import Network, NodeProcess
from simclr_dist.run.folder import newest_step
from simclr_dist.run.status import read_ledger
from slurm.training import STARTUP

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun_multi.sh"
PORT = 29500
INTERVAL = 5  # steps between two checkpoints
TIMEOUT_SECONDS = 6.0  # how late a rank notices that another is cut off
NODES = ("n1", "n2")  # n1 hosts the rendezvous


class Recovery(NamedTuple):
    """What a fault has cost."""

    seconds: float  # from the fault to the first step after it
    steps_lost: int


class End(NamedTuple):
    """How the launchers of a run ended, by node, and how many seconds after what ended them."""

    codes: dict[str, int]
    seconds: dict[str, float]
    noticed: float  # until the run's status said so


class Run:
    """A run folder that the nodes share, and the launchers that work on it."""

    def __init__(self, network: Network, folder: Path, shards: Path, *, nnodes: str = "2", **changes: Any) -> None:
        self.network = network
        self.folder = folder
        self.nnodes = nnodes
        self.run = folder / "run"
        self.launchers: dict[str, NodeProcess] = {}
        settings = {"run_folder": str(self.run), "checkpoint": {"every": INTERVAL}, "timeout_minutes": TIMEOUT_SECONDS / 60}
        training_runs.write_config(folder, shards, **{**settings, **changes})

    def launch(self, *nodes: str, options: Sequence[str] = ()) -> None:
        """The same line on each of `nodes`."""
        variables = {"NNODES": self.nnodes, "RDZV": f"n1:{PORT}", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        variables["TMPDIR"] = str(self.folder)  # of launchers that are killed
        for node in nodes:
            command = (SCRIPT, "config.yaml", "--processes", "1", *options)
            environment = {**os.environ, **variables, **STARTUP}
            self.launchers[node] = self.network.run(node, *command, env=environment, cwd=self.folder, log=self._log(node))

    @property
    def step(self) -> int:
        """Steps done, as the heartbeat says."""
        return training_runs.steps_done(self.run)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The ledger's entries of a kind."""
        return training_runs.events(self.run, name)

    def started(self, count: int, seconds: float = 180.0) -> None:
        """Wait until the run has been started so often, and has done a step since."""

        def there() -> bool:
            starts = self.events("start")
            return len(starts) >= count and self.step > starts[-1]["step"]

        self.until(there, f"start {count}", seconds)

    def progress(self) -> None:
        """Wait until this start has saved, and gone on from there for two steps."""
        begun = self.events("start")[-1]["step"]
        self.until(lambda: newest_step(self.run) > begun and self.step >= newest_step(self.run) + 2, "progress", 120)

    def survive(self, fault: str, node: str) -> Recovery:
        """Do it, once there is something to lose, and wait for the run to go on.

        AssertionError unless it does so with at most the steps of one interval lost, and no restart counted as fruitless.
        """
        self.progress()
        starts, began = len(self.events("start")), time.monotonic()
        FAULTS[fault](self, node)
        self.started(starts + 1)
        seconds, lost = time.monotonic() - began, self.events("start")[-1]["steps_lost"]
        assert lost <= INTERVAL, self.logs()
        assert {entry["fruitless"] for entry in self.events("restart")} <= {0}, self.logs()
        return Recovery(seconds, lost)

    def stop(self, node: str) -> End:
        """SIGTERM to one launcher."""
        self.launchers[node].send_signal(signal.SIGTERM)
        return self.ended("preempted", 60)

    def cut_for_good(self, node: str, seconds: float) -> End:
        """Pull a cable, once there is something to lose, and wait for both launchers."""
        self.progress()
        self.network.cut(node)
        return self.ended("crashed", seconds)

    def ended(self, state: str, seconds: float = 120.0) -> End:
        """Wait for this state in status.json, and for all launchers; the time counts from now."""
        began = time.monotonic()
        self.until(lambda: training_runs.status(self.run)["state"] == state, state, seconds)
        noticed = time.monotonic() - began
        ends: dict[str, float] = {}

        def all_ended() -> bool:
            for node, process in self.launchers.items():
                if node not in ends and process.poll() is not None:
                    ends[node] = time.monotonic() - began
            return len(ends) == len(self.launchers)

        self.until(all_ended, "the launchers end", seconds)
        return End({node: int(process.returncode) for node, process in self.launchers.items()}, ends, noticed)

    def processes(self, node: str, containing: str) -> list[int]:
        """Process ids as seen from outside, by a text in the command line."""
        return self.network.pids(node, containing)

    def agents(self, node: str) -> list[int]:
        """torchrun."""
        return self.processes(node, "-m torch.distributed.run")

    def ranks(self, node: str) -> list[int]:
        """What torchrun has started."""
        return [pid for pid in self.processes(node, "-m simclr_dist.train") if pid not in self.agents(node)]

    def output(self, node: str) -> str:
        """All that the node's launchers have printed."""
        return self._log(node).read_text()

    def logs(self) -> str:
        """All that the launchers and the ledger say."""
        ledger_lines = "\n".join(json.dumps(entry) for entry in read_ledger(self.run))
        said = "".join(f"--- {node}\n{self.output(node)[-6000:]}" for node in NODES if self._log(node).exists())
        return f"{ledger_lines}\n{said}"

    def _log(self, node: str) -> Path:
        return self.folder / f"{node}.log"

    def until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}\n{self.logs()}"
            time.sleep(0.1)


def _kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _launcher(run: Run, node: str) -> None:
    """The user sees it, and types the line again."""
    _kill([run.launchers[node].command_pid])
    time.sleep(1)
    run.launch(node)


def _node(run: Run, node: str) -> None:
    """A power failure; the node comes back, and somebody types the line again."""
    run.network.kill(node)
    time.sleep(1)
    run.network.boot(node)
    run.launch(node)


def _cable(run: Run, node: str) -> None:
    """Pulled until both sides have noticed."""
    restarts = len(run.events("restart"))
    run.network.cut(node)
    run.until(lambda: len(run.events("restart")) >= restarts + 2, "both sides notice", 60)
    run.network.heal(node)


FAULTS: dict[str, Callable[[Run, str], None]] = {
    "rank": lambda run, node: _kill(run.ranks(node)),
    "agent": lambda run, node: _kill(run.agents(node)),
    "launcher": _launcher,
    "node": _node,
    "cable": _cable,
}
