"""launch/*.sh, run for real on this machine: exit codes come through, wrong use is one line."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import pytest

import training_runs
from ranks import free_port
from simclr_dist.system.errors import PREEMPTED

LAUNCH = Path(__file__).parents[2] / "launch"
LISTENS = "0A"  # a socket's state in /proc/net/tcp


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for all runs of this file."""
    return training_runs.make_shards(tmp_path_factory.mktemp("images"))


class Scripts:
    """Processes that run launch/*.sh in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """launch/NAME.sh; what it says goes to the end of `output`."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # not the .venv that the scripts take without it
        environment = {**os.environ, "WITHOUT_COMPILER": "1", "PATH": path, **variables}
        command = [LAUNCH / f"{name}.sh", *arguments]
        with (self.folder / "output").open("a") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, text=True)
        self.processes.append(process)
        return process

    @property
    def output(self) -> str:
        """All that they have said."""
        return (self.folder / "output").read_text()


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    """Killed at the end, with what they have started: that dies with its parent."""
    made = Scripts(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "said"),
    [
        ("torchrun_single", (), {}, "usage: launch/torchrun_single.sh CONFIG"),
        ("torchrun_single", ("no.yaml",), {}, "simclr-dist: no.yaml: "),
        ("torchrun_multi", (), {"NNODES": "2", "RDZV": "localhost:29500"}, "usage: NNODES=2 RDZV=HOST:PORT"),
        ("torchrun_multi", ("config.yaml",), {"RDZV": "localhost:29500"}, "usage: NNODES=2 RDZV=HOST:PORT"),
        ("torchrun_multi", ("config.yaml",), {"NNODES": "2"}, "usage: NNODES=2 RDZV=HOST:PORT"),
        (
            "torchrun_multi",
            ("config.yaml",),
            {"NNODES": "two", "RDZV": "localhost:29500"},
            "simclr-dist: argument --nnodes: 'two'",
        ),
        (
            "torchrun_multi",
            ("config.yaml",),
            {"NNODES": "2", "RDZV": "localhost"},
            "simclr-dist: --rdzv-endpoint: 'localhost' ",
        ),
        (
            "torchrun_multi",
            ("config.yaml",),
            {"NNODES": "2", "RDZV": "no.such.host.:1"},
            "simclr-dist: --rdzv-endpoint: 'no.such",
        ),
        ("tensorboard", (), {}, "usage: launch/tensorboard.sh RUNS"),
        ("tensorboard", ("no-such-folder",), {}, "launch/tensorboard.sh: no-such-folder: no such folder"),
    ],
)
def test_wrong_use_is_one_line_and_2(
    tmp_path: Path, shards: Path, scripts: Scripts, name: str, arguments: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    training_runs.write_config(tmp_path, shards)
    assert scripts.start(name, *arguments, **variables).wait(60) == 2
    line = scripts.output
    assert line.startswith(said), line
    assert line.count("\n") == 1, line


def test_a_port_that_is_taken(tmp_path: Path, shards: Path, scripts: Scripts) -> None:
    """On the machine that is to host the rendezvous."""
    training_runs.write_config(tmp_path, shards)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert scripts.start("torchrun_multi", "config.yaml", NNODES="2", RDZV=where).wait(60) == 2
    line = scripts.output
    assert line.startswith(f"simclr-dist: --rdzv-endpoint: '{where}'"), line
    assert "the port is in use on this machine" in line
    assert line.count("\n") == 1, line


@pytest.mark.slow
def test_one_machine_stopped_and_on_again(tmp_path: Path, shards: Path, scripts: Scripts) -> None:
    training_runs.write_config(tmp_path, shards, steps=60)
    run = scripts.start("torchrun_single", "config.yaml", "--processes", "2")
    training_runs.until(lambda: training_runs.steps_done(tmp_path / "run") > 2 or run.poll() is not None)
    run.send_signal(SIGTERM)
    assert run.wait(60) == PREEMPTED, scripts.output
    assert scripts.start("torchrun_single", "config.yaml", "--processes", "2").wait(120) == 0
    assert [entry["steps_lost"] for entry in training_runs.events(tmp_path / "run", "start")] == [0, 0]
    assert training_runs.status(tmp_path / "run")["state"] == "done"


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_3(tmp_path: Path, shards: Path, scripts: Scripts) -> None:
    """As the one machine of several."""
    optim = {"name": "sgd", "base_lr": 1e30, "warmup_steps": 0}
    training_runs.write_config(tmp_path, shards, steps=60, max_skipped_steps=2, optim=optim)
    where = {"NNODES": "1", "RDZV": f"127.0.0.1:{free_port()}"}
    run = scripts.start("torchrun_multi", "config.yaml", "--processes", "2", **where)
    assert run.wait(120) == 3, scripts.output
    assert "not finite" in training_runs.status(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_tensorboard_answers_on_this_machine_only(tmp_path: Path, scripts: Scripts) -> None:
    port = free_port()
    board = scripts.start("tensorboard", str(tmp_path), PORT=str(port))
    deadline, answer = time.monotonic() + 90, 0
    while answer != 200:
        assert time.monotonic() < deadline, scripts.output
        assert board.poll() is None, scripts.output
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
                answer = page.status
        except urllib.error.URLError:
            time.sleep(0.1)
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [local for _, local, _, state, *_ in sockets if state == LISTENS and local.endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]
