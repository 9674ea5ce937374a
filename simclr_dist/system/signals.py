"""Handle stop signals: SLURM's notice, a scheduler's SIGTERM, Ctrl-C, a lost terminal.

Call `listen` before torch is imported: the import takes seconds, and a signal in that time would end the process.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from simclr_dist.system import progress
from simclr_dist.system.errors import LAST_WORD, say

# `sbatch --signal` sends SIGUSR1 or SIGUSR2 before a time limit; preemption and requeue send SIGTERM only. A terminal that
# goes, as when ssh is cut off, sends SIGHUP; nohup has that ignored, and it stays so.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

LAUNCHER = "SIMCLR_DIST_LAUNCHER"  # variable with the process that has started torchrun, for torchrun's ranks

_requested = 0
_requested_at: float | None = None
_interrupted = False


def listen() -> None:
    """Note stop signals from now on, also `blocked` ones. Without a launcher a second Ctrl-C ends the process."""
    _install(_note)


def requested() -> int:
    """Return the number of the last stop signal; 0 for none."""
    return _requested


def requested_at() -> float | None:
    """Return the time of the first stop signal. Seconds since 1970; None without one."""
    return _requested_at


def name(number: int) -> str:
    """Return a signal's name, like SIGTERM for 15."""
    return signal.Signals(number).name


def exit_on_signal(code: int, line: str) -> None:
    """Exit with `code` at a stop signal, when nothing is to save. Prints `line`; its {signal} becomes the name."""
    _install(_exiting(code, line))


@contextmanager
def importing(code: int, line: str) -> Iterator[None]:
    """Import libraries inside; a stop signal ends the process at once.

    Libraries try imports and go on when one fails, so a SystemExit inside could be lost. A signal noted before ends the
    process too. After the block: `exit_on_signal`.
    """

    def leave(number: int, _: FrameType | None) -> None:
        progress.clear()
        with suppress(OSError):  # the terminal may have gone
            os.write(sys.stderr.fileno(), (line.format(signal=name(number)) + "\n").encode())
        os._exit(code)

    _install(leave)
    if _requested:
        _exiting(code, line)(_requested, None)
    with uncollected():
        yield
    exit_on_signal(code, line)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import libraries inside, without the garbage collector. It finds nothing, and is a quarter of torch's import."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def ignore() -> None:
    """Ignore stop signals until the process ends. SLURM sends two, and Python gives up its handlers early."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # one that came just before


def obey_parent_only() -> None:
    """End this process at its parent's stop signals only; start it `blocked`.

    For reading processes. A scheduler signals every process of a job. A reader that died of it would end its rank before the
    rank has saved. But multiprocessing ends readers by SIGTERM, and waits for their end.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send us signal `number` when our `parent` ends (Linux)."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def die_with_torchrun() -> None:
    """Let the kernel kill this rank when its torchrun ends (Linux).

    While a rank starts, torchrun may have ended already: then the rank's parent is another process. Only our launcher lets it
    tell the two apart, as the parent of torchrun.
    """
    parent = os.getppid()
    die_with(parent)
    if launcher := os.environ.pop(LAUNCHER, ""):
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"\nPPid:\t{launcher}\n" in Path(f"/proc/{parent}/status").read_text():
                return
        os._exit(1)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold stop signals back, also in new children until they call `listen`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exiting(code: int, line: str) -> Callable[[int, FrameType | None], None]:
    def leave(number: int, _: FrameType | None) -> None:
        ignore()
        say(line.format(signal=name(number)), "")
        raise SystemExit(code)

    return leave


def _install(handler: "signal._HANDLER") -> None:
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _note(number: int, _: FrameType | None) -> None:
    global _requested, _requested_at, _interrupted
    watched = "WORLD_SIZE" in os.environ or LAST_WORD in os.environ  # its parent hands on what a terminal sends to both
    # The first one may come behind a SIGTERM: a terminal interrupts everybody, and a parent hands that on in its own way.
    if number == signal.SIGINT and _interrupted and not watched:
        raise KeyboardInterrupt
    _interrupted = _interrupted or number == signal.SIGINT
    _requested, _requested_at = number, _requested_at or time.time()
