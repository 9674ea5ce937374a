"""`simclr-dist train` as a user starts it: launcher, torchrun, ranks and reading processes, all of them found again."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from training_runs import until

_MARKER = "SIMCLR_DIST_TEST"


class Command:
    """A program and whatever it has started, also what has lost its parent: they share a variable of the environment."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, log: Path) -> None:
        self.process = process
        self._mark = mark
        self._log = log

    @property
    def output(self) -> str:
        """What all of them have printed."""
        return self._log.read_text()

    def wait(self, seconds: float = 240.0) -> int:
        """The program's exit code; AssertionError when it has not ended in this time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s: {self.output}") from None

    def alive(self) -> dict[int, str]:
        """Command lines by process id."""
        return marked(self._mark)

    def agents(self) -> list[int]:
        """Process ids of torchrun."""
        return [process for process, line in self.alive().items() if "torch.distributed.run" in line]

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks by their number."""
        found = {}
        for process, line in self.alive().items():
            with suppress(OSError):
                variables = dict(v.partition("=")[::2] for v in Path(f"/proc/{process}/environ").read_text().split("\0"))
                if "RANK" in variables and "-m simclr_dist.train" in line:
                    found[process] = int(variables["RANK"])
        # A reading process is a fork of its rank, with the rank's environment and command line.
        forks = {process for process in found if _parent(process) in found}
        return {rank: process for process, rank in found.items() if process not in forks}

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole group that a terminal has in its foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """Nobody is left."""
        deadline = time.monotonic() + 30
        while (left := self.alive()) and time.monotonic() < deadline:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()


def marked(mark: str) -> dict[int, str]:
    """Command lines, by process id, of all that have this in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended in this moment, or somebody else's
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {process: line for process, line in found.items() if line}  # one that has ended has no line


@contextmanager
def running(folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Command]:
    """`command` in `folder`, in a process group of its own."""
    mark = secrets.token_hex(16)
    log = folder / "output"
    # Those that are killed leave temporary files; not in `folder`, since a socket's path must be short.
    with TemporaryDirectory() as temporary, log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "WITHOUT_COMPILER": "1", "TMPDIR": temporary, **(environment or {}), _MARKER: mark},
            start_new_session=True,
        )
        started = Command(process, f"{_MARKER}={mark}", log)
        try:
            yield started
        finally:
            started.close()


def simclr_dist(*arguments: str) -> list[str]:
    """The command line's program, as it is installed."""
    return [str(Path(sys.executable).with_name("simclr-dist")), *arguments]


def wait_for_ranks(command: Command, number: int) -> dict[int, int]:
    """The ranks, once there are `number`."""
    until(lambda: len(command.ranks()) == number or command.process.poll() is not None, pause=0.1)
    return command.ranks()


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0
