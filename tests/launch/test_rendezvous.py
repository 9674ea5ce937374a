"""Where machines meet: what one that cannot come there says, and when it looks again."""

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from simclr_dist.cli.main import main
from simclr_dist.launch import rendezvous
from simclr_dist.launch import torchrun as launcher
from simclr_dist.launch.rendezvous import Nodes, torchrun_options
from simclr_dist.launch.slurm.job import meeting_port
from simclr_dist.system import signals
from simclr_dist.system.errors import PassingError, StoppedError

SCRIPT = Path(__file__).parents[2] / "launch" / "train.sbatch"
IN_USE = "the port is in use on this machine; take another, on all of them, or end what has it"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("simclr_dist.launch.rendezvous.time.sleep", lambda _: None)


@pytest.mark.parametrize(("job", "code"), [(None, 2), ("7", 1)])
def test_a_port_that_is_taken(
    tmp_path: Path, taken: int, outside: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    job: str | None, code: int,
) -> None:  # fmt: skip
    """One line; refused for good where a person chose it, a crash in a SLURM job, whose next start has another port."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("something was started"))
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    path = runs.write_config(Path(), runs.make_shards(tmp_path, images=48))
    endpoint = f"127.0.0.1:{taken}"
    assert main(["train", str(path), "--processes", "1", "--nnodes", "1", "--rdzv-endpoint", endpoint]) == code
    assert capsys.readouterr().err == f"simclr-dist: --rdzv-endpoint: {endpoint!r}: {IN_USE}\n"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Name servers that answer like this, one time after the other; returns which names were asked for."""
    real = socket.getaddrinfo
    asked: list[str] = []

    def program(*errors: Exception) -> list[str]:
        left = list(errors)

        def getaddrinfo(host: str, *arguments: Any, **more: Any) -> Any:
            asked.append(host)
            if left:
                raise left.pop(0)
            return real("127.0.0.1", *arguments, **more)

        monkeypatch.setattr(rendezvous.socket, "getaddrinfo", getaddrinfo)
        return asked

    return program


SILENT = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_that_is_not_known_is_a_typo(outside: None, answers: Callable[..., list[str]]) -> None:
    asked = answers(UNKNOWN)
    line = "^--rdzv-endpoint: 'n1:21000': Name or service not known; name the machine as all of them know it$"
    with pytest.raises(PassingError, match=line):
        torchrun_options(Nodes(2, 2, "n1:21000"))
    assert asked == ["n1"]


def test_in_a_slurm_job_it_may_be_known_in_a_moment(
    outside: None, answers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asked = answers(SILENT, UNKNOWN, OSError(101, "Network is unreachable"))
    assert "--rdzv-conf=is_host=1" in torchrun_options(Nodes(2, 2, "n1:21000"))
    assert len(asked) == 4
    answers(SILENT, SILENT)
    with pytest.raises(PassingError, match="Temporary failure in name resolution"):
        torchrun_options(Nodes(2, 2, "n1:21000", wait_minutes=0))


def test_who_looks_again_says_so_once(
    outside: None, answers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: next(clock))
    answers(*[UNKNOWN] * 2)
    torchrun_options(Nodes(2, 2, "n1:21000"))
    assert capsys.readouterr().err == "", "it is soon over"
    answers(*[UNKNOWN] * 9)
    torchrun_options(Nodes(2, 2, "n1:21000"))
    line = "simclr-dist: --rdzv-endpoint: 'n1:21000': Name or service not known; looked for again, 30 minutes at most\n"
    assert capsys.readouterr().err == line


def test_a_stop_signal_meanwhile_is_no_crash(
    outside: None, answers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(signals, "requested", lambda: signal.SIGTERM)
    answers(SILENT)
    with pytest.raises(StoppedError, match="SIGTERM before the machines had met"):
        torchrun_options(Nodes(2, 2, "n1:21000"))


def bash(script: str, variables: dict[str, str]) -> str:
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_port_of_a_job() -> None:
    """None that Linux gives to a connection, and another in the next start; neighbours in the queue have different ones."""
    ports = [[meeting_port(job, restart) for restart in range(30)] for job in (*range(1, 3001), 2**26, 10**9 + 7)]
    assert {21_000 <= port < 24_000 for of_job in ports for port in of_job} == {True}
    assert all(len(set(of_job)) == 30 for of_job in ports)
    assert len({of_job[0] for of_job in ports[:3000]}) == 3000


def test_the_batch_script_has_the_same_rule(taken: int) -> None:
    """Bash cannot ask Python for it without the seconds of a start; and it passes over a port at which somebody listens."""
    (line,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("port=")]
    (loop,) = [line for line in SCRIPT.read_text().splitlines() if "/dev/tcp/" in line]
    for job, restart in ((1, 0), (1, 1), (2999, 7), (10**9 + 7, 123)):
        variables = {"SLURM_JOB_ID": str(job), "first": "127.0.0.1"} | (
            {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        )
        assert bash(f"set -u; {line}; echo $port", variables) == str(meeting_port(job, restart))
    assert int(bash(f"set -u; port={taken}; {loop}; echo $port", {"first": "127.0.0.1"})) > taken
    assert int(bash(f"set -u; port={taken}; {loop}; echo $port", {"first": "no-such-machine.invalid"})) == taken
