"""Stop signals as a word that is read when it suits: SLURM's notice, a scheduler's SIGTERM, Ctrl-C.

`listen` before torch is imported: the import takes seconds, and a signal in that time would end the process.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from simclr_dist.system.errors import LAST_WORD

# SIGUSR1 and SIGUSR2 are what `sbatch --signal` sends before a time limit; preemption and requeue send SIGTERM only.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_PR_SET_PDEATHSIG = 1

_asked = 0
_asked_at: float | None = None


def listen() -> None:
    """From now on a stop signal is only noted (`asked`), also one that came while signals were `blocked` by the parent.

    A second Ctrl-C ends a process that nobody else has started and watches.
    """
    _install(_note)


def asked() -> int:
    """The number of the last stop signal; 0 for none."""
    return _asked


def asked_at() -> float | None:
    """When this process heard its first stop signal, in seconds since 1970; None when another's was enough."""
    return _asked_at


def name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def exit_when_asked(code: int, line: str) -> None:
    """From now on a stop signal ends the process with `code`, for work that has nothing to save.

    `line` goes to stderr, with {signal} for its name.
    """

    def leave(number: int, _: FrameType | None) -> None:
        on_the_way_out()
        print(line.format(signal=name(number)), file=sys.stderr, flush=True)
        raise SystemExit(code)

    _install(leave)


def leave_at_once(code: int, line: str) -> None:
    """The same while libraries are imported: they try imports and go on when one fails, so a SystemExit could be lost."""

    def leave(number: int, _: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), (line.format(signal=name(number)) + "\n").encode())
        os._exit(code)

    _install(leave)


def on_the_way_out() -> None:
    """From now on stop signals wait for the end of the process: SLURM sends two, and Python gives up its handlers early."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # one that came just before


def mind_parent_only() -> None:
    """From now on a stop signal ends this process, started with signals `blocked`, if its parent has sent it, and else nothing.

    For reading processes: a scheduler signals every process of a job, and one that died of it would take its rank along
    before that has saved. But multiprocessing ends them by SIGTERM, and waits until they have.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which has started it, ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold stop signals back; a process started within it keeps them pending until it calls `listen`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _install(handler: "signal._HANDLER") -> None:
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _note(number: int, _: FrameType | None) -> None:
    global _asked, _asked_at
    watched = "WORLD_SIZE" in os.environ or LAST_WORD in os.environ  # whose parent hands on what a terminal sends to both
    if number == signal.SIGINT and _asked and not watched:
        raise KeyboardInterrupt
    _asked, _asked_at = number, _asked_at or time.time()
