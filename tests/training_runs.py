"""Tiny training runs for the tests: their images, their config, and `python -m simclr_dist.train` as real processes."""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from forkserver import CONTEXT
from ranks import free_port
from simclr_dist.cli.train import main
from simclr_dist.convert.shards import write_shards
from simclr_dist.launch.supervisor import children
from simclr_dist.preflight.demo.images import CLASSES, render
from simclr_dist.run.claim import heartbeat
from simclr_dist.run.status import read_ledger

SETTINGS: dict[str, Any] = {
    "run_folder": "run",
    "global_batch_size": 24,
    "steps": 6,
    "device": "cpu",
    "data": {"workers": 0, "window": 2},
    "views": {"preset": "small", "image_size": 16},
    "model": {"encoder": "resnet10", "stem": "small_stride2", "projector_hidden": 32, "projector_dim": 16},
    "loss": {"temperature": 0.2},
    "optim": {"name": "lars", "base_lr": 3.0, "warmup_steps": 2},
    "checkpoint": {"every": 5},
    "log": {"every": 1, "tensorboard": False},
}


def make_shards(folder: Path, *, images: int = 205, seed: int = 0) -> Path:
    """`folder`/shards: pictures of 18x18 pixels in shards of 40, so that the last one is smaller; 24 do not divide 205."""
    for k in range(images):
        path = folder / "images" / CLASSES[k % 3] / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(k % 3, np.random.default_rng((seed, k)), size=18)).save(path)
    write_shards(folder / "images", folder / "shards", shard_size=40, processes=1)
    return folder / "shards"


def write_config(folder: Path, shards: Path, **changes: Any) -> Path:
    """`folder`/config.yaml: SETTINGS with `changes`, which are dicts for sections."""
    settings = SETTINGS | {"data": SETTINGS["data"] | {"shards": str(shards)}}
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


class Ranks:
    """The processes of a run, one process group with all that they start in turn."""

    def __init__(self, processes: Sequence[BaseProcess], log: Path) -> None:
        self._processes = processes
        self._log = log

    @property
    def output(self) -> str:
        """What all ranks have printed."""
        return self._log.read_text()

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes by rank, once all have ended; None where one has not in this time."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while all ranks run; AssertionError, with what they have printed, when one ends before."""
        met = False

        def ended() -> bool:
            nonlocal met
            met = condition()  # asked once: what it has seen, a temporary file say, may be gone the next moment
            return met or self.wait(0) != [None] * len(self._processes)

        until(ended)
        assert met, f"exit codes {self.wait(0)}\n{self.output}"

    def pid(self, rank: int) -> int:
        """Process id of a rank."""
        return self._processes[rank].pid or 0

    def children(self, rank: int) -> list[int]:
        """Process ids of what a rank has started."""
        return children(self.pid(rank))

    def signal(self, number: int, rank: int | None = None) -> None:
        """Signal a rank; or everybody at once, with all that they have started."""
        with suppress(ProcessLookupError):
            if rank is None:
                os.killpg(self.pid(0), number)
            else:
                os.kill(self.pid(rank), number)

    def hold(self) -> None:
        """Stop everybody where they are, until SIGCONT; returns once the ranks stand still."""
        self.signal(signal.SIGSTOP)
        until(lambda: all(state_of(process.pid) in ("T", "Z", "") for process in self._processes))

    def kill(self) -> None:
        """kill -9 of everybody at once."""
        self.signal(signal.SIGKILL)
        for process in self._processes:
            process.join()


@contextmanager
def started(
    folder: Path,
    world_size: int,
    *arguments: str,
    hook: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """`python -m simclr_dist.train config.yaml ARGUMENTS` in `folder` on `world_size` ranks; nobody is left at the end.

    `hook` is called by every rank before it begins, to change what it will meet.
    """
    log = folder / "output"
    log.write_text("")
    processes: list[BaseProcess] = []
    port = free_port()
    try:
        for rank in range(world_size):
            group = processes[0].pid if rank else 0
            torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            variables = torchrun | dict(environment or {})
            process = CONTEXT.Process(target=_rank, args=(folder, variables, group, ["config.yaml", *arguments], hook))
            process.start()
            processes.append(process)
            until(lambda pid=process.pid, leader=group or process.pid: _group(pid) in (leader, None))
        yield Ranks(processes, log)
    finally:
        if processes:
            Ranks(processes, log).kill()


def train(folder: Path, world_size: int, *arguments: str) -> str:
    """A run from start to end, which must be good; returns what it printed."""
    with started(folder, world_size, *arguments) as ranks:
        codes = ranks.wait(600.0)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.output}"
        return ranks.output


def killed_after(folder: Path, world_size: int, step: int) -> None:
    """A run that is killed from outside as soon as its metrics show `step`."""
    with started(folder, world_size) as ranks:
        until(lambda: last_step(folder / "run") >= step or ranks.wait(0) != [None] * world_size)
        ranks.kill()
        assert ranks.wait() == [-signal.SIGKILL] * world_size, ranks.output


def last_step(run: Path) -> int:
    """The newest step in a metrics.jsonl that may be growing; 0 for none."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the part that the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    """A checkpoint's content."""
    state: dict[str, Any] = torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)
    return state


def steps_done(run: Path) -> int:
    """By the run's own sign of life; 0 before there is one."""
    return int(heartbeat(run).get("step", 0))


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The ledger's entries of one kind, oldest first."""
    return [entry for entry in read_ledger(run) if entry["event"] == name]


def status(run: Path) -> dict[str, Any]:
    """status.json."""
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def assert_same_bits(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Two states of nested dicts, lists, tensors and values."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(run: Path, expected: Path, step: int) -> None:
    """Parameters, momentum, buffers, counters and metrics after `step` steps, to the last bit; the configs may differ."""
    states = [{**checkpoint(folder, step), "config": None} for folder in (run, expected)]
    assert_same_bits(*states)
    assert metrics(run) == metrics(expected)


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return False
    return any(line.startswith("SigCgt") and int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1 for line in lines)


def state_of(pid: int | None) -> str:
    """R, S, T for stopped, Z for ended; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def until(condition: Callable[[], bool], seconds: float = 120.0, pause: float = 0.01) -> None:
    """Wait, asking every `pause` seconds; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(pause)


def _rank(folder: Path, variables: dict[str, Any], group: int, arguments: list[str], hook: Callable[[], None] | None) -> None:
    os.setpgid(0, group)
    os.environ |= {key: str(value) for key, value in variables.items()}
    os.chdir(folder)
    with Path("output").open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of reading processes; without it they get the server's
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    if hook is not None:
        hook()
    sys.exit(main(arguments))


def _group(pid: int | None) -> int | None:
    try:
        return os.getpgid(pid or 0)
    except ProcessLookupError:
        return None
