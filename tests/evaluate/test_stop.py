"""Stop signals at an evaluation: exit code 75 and one line, whenever they come, and nothing is left behind."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Union

import pytest
import torch
from torch import Tensor

from evaluated import draw_images
from forkserver import Command
from simclr_dist.cli.main import main
from simclr_dist.data.workers import Loader
from simclr_dist.run.status import write_status

Make = Callable[..., Path]
Process = Union["subprocess.Popen[str]", Command]
Start = Callable[..., Process]
STOPPED = "simclr-dist: stopped by {}; the same command starts the evaluation again\n"
GATE = """
import sys, time
from pathlib import Path
folder = Path(__file__).parent
while not (folder / "open").exists():
    time.sleep(0.005)
sys.path.remove(str(folder))
del sys.modules["torch"]
import torch
"""
WAYS = {"module": ["-m", "simclr_dist.evaluate"], "verb": ["-m", "simclr_dist", "eval"]}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Process]]:
    """What has been started as the head of its own session, which is ended at the end; temporary files are in tmp/."""
    (tmp_path / "tmp").mkdir()
    processes: list[Process] = []
    yield processes
    for process in processes:
        for pid in session(process):
            os.kill(pid, signal.SIGKILL)
        with process:  # waits, and closes the pipes
            pass


@pytest.fixture
def start(tmp_path: Path, started: list[Process]) -> Start:
    """Starts `python ARGUMENTS`."""

    def python(*arguments: object, **environment: str) -> Process:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), **environment},
        )
        started.append(process)
        return process

    return python


@pytest.fixture
def begin(tmp_path: Path, started: list[Process]) -> Start:
    """Starts an evaluation that need not import torch first."""

    def evaluation(*arguments: object, **environment: str) -> Process:
        process = Command(main, ["eval", *arguments], environment={"TMPDIR": str(tmp_path / "tmp"), **environment})
        started.append(process)
        return process

    return evaluation


@pytest.fixture
def job(make_encoder: Make, make_shards: Make) -> list[object]:
    """The arguments of an evaluation that takes some seconds, most of them for features: it looks at single images."""
    train, test = make_shards("train", *draw_images(600, seed=0)), make_shards("test", *draw_images(31, seed=1))
    return [make_encoder(), "--train", train, "--test", test, "--device", "cpu", "--batch-size", "1"]


def session(process: Process) -> list[int]:
    """The living processes of a session, but for those that have ended and are not yet waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, head, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(head) == process.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def hears(process: Process, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)
    return bool(caught >> (number - 1) & 1)


def send(process: Process, number: signal.Signals, *, group: bool) -> None:
    (os.killpg if group else os.kill)(process.pid, number)


def check_stopped(process: Process, number: signal.Signals, folder: Path) -> None:
    """The process ends as it should, and leaves nothing."""
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (75, STOPPED.format(number.name))
    assert session(process) == []
    left = [path for path in (folder / "tmp").iterdir() if not path.name.startswith("torchinductor")]  # torch's own cache
    assert [*left, *folder.rglob("*.tmp"), *folder.rglob("eval/*.json")] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("number", "wait"), [(signal.SIGTERM, 0.3), (signal.SIGUSR1, 0.0), (signal.SIGHUP, 1.0)])
def test_during_import(start: Start, job: list[object], tmp_path: Path, way: str, number: signal.Signals, wait: float) -> None:
    """It hears from before torch's import on, which begins here when it does."""
    (tmp_path / "torch.py").write_text(GATE)
    process = start(*WAYS[way], *job, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    wait_until(lambda: hears(process, number), process)
    (tmp_path / "open").touch()
    time.sleep(wait)
    send(process, number, group=False)
    check_stopped(process, number, tmp_path)


def test_during_an_import_that_swallows_what_is_raised(start: Start, job: list[object], tmp_path: Path) -> None:
    """As torch's does, about once in ten signals."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)\nexcept BaseException:\n    pass\n"
    )
    process = start("-m", "simclr_dist.evaluate", *job, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    check_stopped(process, signal.SIGTERM, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGUSR1, True), (signal.SIGHUP, True)],
)
def test_during_extraction(begin: Start, job: list[object], tmp_path: Path, number: signal.Signals, group: bool) -> None:
    process = begin(*job, "--workers", "2")
    wait_until(lambda: len(session(process)) == 3, process)
    time.sleep(random.uniform(0, 1))
    send(process, number, group=group)
    check_stopped(process, number, tmp_path)


@pytest.mark.slow
def test_while_a_worker_stands_still(begin: Start, job: list[object], tmp_path: Path) -> None:
    process = begin(*job, "--workers", "1")
    wait_until(lambda: len(session(process)) == 2, process)
    (worker,) = set(session(process)) - {process.pid}
    os.kill(worker, signal.SIGSTOP)
    time.sleep(0.5)
    send(process, signal.SIGTERM, group=False)
    check_stopped(process, signal.SIGTERM, tmp_path)


@pytest.mark.slow
def test_during_the_linear_probe_and_twice(begin: Start, make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    """SLURM signals twice."""
    train, test = make_shards("train", *draw_images(300, seed=0)), make_shards("test", *draw_images(31, seed=1))
    encoder = make_encoder(image_size=32)  # raw pixels of 3072 values: a second for their probe
    process = begin(encoder, "--train", train, "--test", test, "--device", "cpu")
    assert process.stderr.readline().startswith("features of 331 images")
    assert process.stderr.readline().startswith("features kept in ")
    assert process.stderr.readline().startswith("raw pixels, kNN")
    time.sleep(random.uniform(0.1, 0.3))
    send(process, signal.SIGTERM, group=True)
    send(process, signal.SIGTERM, group=True)
    check_stopped(process, signal.SIGTERM, tmp_path)


@pytest.mark.slow
def test_while_waiting_for_an_encoder_and_again(begin: Start, make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    train, test = make_shards("train", *draw_images(31, seed=0)), make_shards("test", *draw_images(31, seed=1))
    run = make_encoder().parent.parent
    (run / "config.yaml").write_text("seed: 0\n")
    job = ["--watch", run, "--train", train, "--test", test, "--device", "cpu", "--workers", "0", "--poll", "600"]
    process = begin(*job)
    assert process.stdout.readline().startswith("step-00001200: kNN")
    assert process.stdout.readline() == f"{run}: not started; waiting for its next encoder\n"
    result = (run / "eval" / "step-00001200.json").rename(tmp_path / "result.json")
    send(process, signal.SIGUSR1, group=False)
    check_stopped(process, signal.SIGUSR1, tmp_path)
    result.rename(run / "eval" / "step-00001200.json")
    write_status(run, "done", 0)
    process = begin(*job)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.splitlines()[0].endswith("; evaluated before")


@pytest.mark.slow
def test_ranks_without_a_launcher(begin: Start, job: list[object], tmp_path: Path) -> None:
    """As the tasks of a SLURM step: one rank may be waiting, deep in a collective, for another that has gone already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [begin(*job, "--workers", "1", **where, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    for process in both:
        wait_until(lambda process=process: len(session(process)) == 2, process)  # type: ignore[misc]
    for process in both:
        send(process, signal.SIGTERM, group=True)
    for process in both:
        check_stopped(process, signal.SIGTERM, tmp_path)


def signalling(processes: int) -> Loader[Tensor]:
    """The numbers to 999; the reading process gets a signal while it waits for each."""
    reader = os.getpid()

    def make(index: int) -> int:
        os.kill(reader, signal.SIGUSR1)
        os.kill(reader, signal.SIGUSR2)
        return index

    return Loader(make, range(1000), workers=processes, batch_size=10, collate=torch.tensor)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_handler_that_returns_changes_nothing(processes: int) -> None:
    """In a program with its own handlers, like a training that only notes the signal, the batches stay whole."""
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    loader, seen = signalling(processes), []
    for batch in loader:
        assert not loader.abandoned
        seen += batch.tolist()
    assert seen == list(range(1000))
    assert heard


def test_a_handler_that_raises_ends_the_workers_first() -> None:
    """Also when the exception is kept, and its frames with it."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text().split()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def leave(number: int, _: object) -> None:
        assert len(children.read_text().split()) == len(before) + 2
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(75)

    signal.signal(signal.SIGUSR1, leave)
    loader = signalling(2)
    with pytest.raises(SystemExit) as kept:
        list(loader)
    assert loader.abandoned
    assert kept.value.code == 75
    assert children.read_text().split() == before
