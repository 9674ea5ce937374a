"""A program on a terminal of its own: keys are pressed, and what it shows is read."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_CONTROLS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()].|[=>])")  # colours, cursor movements, titles

INTERRUPT = "\x03"
TAB = "\t"


class Terminal:
    """The keyboard and screen of a process that has been started on them."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self.process = process
        self._master = master
        self.raw = ""

    @property
    def shown(self) -> str:
        """All that was printed, keys' echo too, without colours and cursor movements."""
        return _CONTROLS.sub("", self.raw).replace("\r\n", "\n")

    def press(self, keys: str) -> None:
        """Keys as they are: Ctrl-C is INTERRUPT, and goes to whoever is in the foreground."""
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 200.0) -> str:
        """What was shown once `pattern` is in it; AssertionError when it does not come."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert self._read(end), f"no {pattern!r} in: {self.shown}"
        return self.shown

    def hang_up(self) -> None:
        """The terminal goes: SIGHUP to the head of its session and, when that ends, to all in the foreground."""
        os.close(self._master)
        self._master = os.open(os.devnull, os.O_RDWR)

    def close(self, seconds: float = 200.0) -> int:
        """Read to the end; returns the exit code. AssertionError when the process has not ended in this time."""
        end = time.monotonic() + seconds
        while self._read(end):
            pass
        try:
            return self.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there: {self.shown}") from None

    def _read(self, end: float) -> bool:
        """One more piece of output; False when there will be none, or not before `end`."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # nobody has the other side open any more
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)


def _sit_down() -> None:
    """The first terminal that the head of a session opens becomes the one whose keys it gets."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored by all that a script has started in the background, or under nohup
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def terminal(command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """`command` in `cwd` with a terminal of 160 columns; whatever is left of its session is killed at the end."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (50, 160))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "PATH": path, "TERM": "xterm", **(environment or {})},
        start_new_session=True,
        preexec_fn=_sit_down,
    )
    os.close(slave)
    shell = Terminal(process, master)
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shell.hang_up()
