"""The ranks of a machine, by torchrun or alone, under a small parent: with the exit code that torchrun loses, and with restarts
that a long run can live on.

torchrun's own restarts count for ever, keep a rendezvous that a replaced machine cannot join, and end with the machine that
hosts the store. Ours start a fresh agent on every machine, and count only starts that brought the run no new checkpoint.
"""

import math
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from simclr_dist.launch.rendezvous import Nodes, torchrun_options
from simclr_dist.launch.supervisor import children, supervise
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import newest_step, note_death, read_status, write_status
from simclr_dist.system import signals
from simclr_dist.system.errors import LAST_WORD, PREEMPTED

_LOST = re.compile("gloo|nccl|connection|timed out|without a word", re.IGNORECASE)  # what is said of a rank that was lost
_HANGS_SECONDS = 60.0  # the last rank to end may have a status to write on a slow disk


def torchrun(
    processes: int, command: Sequence[str], run: Path | None = None, *, nodes: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Run `command` (`-m MODULE ...`) with `processes` ranks on this machine, one without torchrun; returns its exit code.

    The code is the one in `run`/status.json, or the ranks' last word where they did not get so far, 75 after a stop. After a
    crash all starts again, until `max_restarts` starts in a row have brought no new checkpoint; a start for which too few
    machines came together is none of them. Raises ConfigError when the rendezvous is at no address that this machine knows a
    way to, and KeyboardInterrupt when ranks without a `run`, which have nothing to save, are stopped.
    """
    signals.listen()
    ranks = _Ranks(processes, command, nodes, alone=processes == 1 and nodes is None and run is not None)
    if run is None:
        code, word = ranks.run(lambda _: bool(signals.asked()))
        if signals.asked():
            raise KeyboardInterrupt
        return word if word is not None else int(code != 0)
    note_death(run)  # of an earlier start
    fruitless, early, since = 0, 0, time.monotonic()
    while True:
        start, saved = ledger.newest_start(run), newest_step(run)
        watch = _Watch(run, start, nodes, since)
        code, final = ranks.run(watch.is_over)
        _wait_for_ranks(run)
        note_death(run)
        if (why := ranks.why_first(watch.first_gone)) is not None:
            _name_the_lost(run, start, why)
        status = read_status(run)
        ended = status if status.get("start", 0) > start else {}
        if ended.get("state") in ("done", "preempted", "failed", "diverged"):
            return int(ended["exit_code"])
        if final is not None:
            return final
        if signals.asked():
            return 1 if ended else PREEMPTED  # nothing was begun that could be lost
        if code == 0:
            return 0
        if nodes is None or watch.began:
            early, since = 0, time.monotonic()
            fruitless = 0 if newest_step(run) > saved else fruitless + 1
            why = ended.get("reason") or f"the ranks ended with {code}"
            if fruitless > max_restarts or max_restarts == 0:
                if run.is_dir():
                    ledger.record(run, "gave_up", why=why)
                _say(f"{why}; given up (--max-restarts {max_restarts})")
                return 1
            ledger.record(run, "restart", why=why, host=socket.gethostname(), fruitless=fruitless)
            _say(f"{why}; starting again from step {newest_step(run)}")
        else:
            early += 1
            if time.monotonic() > since + 60 * nodes.wait_minutes:
                _say(
                    f"--nnodes {nodes}: the machines did not come together at {nodes.endpoint} within {nodes.wait_minutes:g}"
                    " minutes (first_step_timeout_minutes); the same line on each of them goes on"
                )
                return 1
        again = time.monotonic() + min(2.0 ** max(fruitless, early), 30.0)
        while time.monotonic() < again:
            if signals.asked():
                return PREEMPTED
            time.sleep(0.1)


class _Ranks:
    """The ranks of this machine, to be started as often as needed: one by itself, several by torchrun."""

    def __init__(self, processes: int, command: Sequence[str], nodes: Nodes | None, *, alone: bool) -> None:
        self._alone, self._command = alone, list(command)
        self._agent = [
            # By its own name a machine may not be found, in a container for one: ranks would wait for minutes.
            *(["--standalone", "--local-addr=127.0.0.1"] if nodes is None else torchrun_options(nodes)),
            f"--nproc-per-node={processes}",
            "--max-restarts=0",
        ]
        self._env = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
            **os.environ,
            # Else an agent that joins a rendezvous anew waits for an address that nobody publishes again.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self._crashes: dict[int, str] = {}  # of the last start

    def run(self, is_over: Callable[[int], bool] = lambda _: False) -> tuple[int, int | None]:
        """One start; returns its exit code, and the ranks' last word if there was one. torchrun is killed when `is_over`."""
        with tempfile.TemporaryDirectory(prefix="simclr_dist-") as folder:
            word = Path(folder, "word")
            env = {**self._env, LAST_WORD: str(word)}
            if self._alone:
                code = supervise([sys.executable, *self._command], env=env, tell=lambda child: (child,))
            else:
                # Without a folder for its logs torchrun makes one, and leaves it behind.
                agent = ["-m", "torch.distributed.run", f"--log-dir={folder}", *self._agent]
                code = supervise([sys.executable, *agent, *self._command], env=env, tell=children, give_up=is_over)
            self._crashes = {
                int(note.suffix[1:]): note.read_text(encoding="utf-8", errors="replace") for note in word.parent.glob("word.*")
            }
            return code, int(word.read_text()) if word.exists() else None

    def why_first(self, gone: Sequence[int]) -> str | None:
        """What ended the ranks that went first, which the others only notice as a connection that is lost; None if unknown."""
        killed = [rank for rank in gone if rank not in self._crashes]
        if killed:
            return (
                f"rank {killed[0]} on {socket.gethostname()} was killed, or crashed outside Python;"
                " was memory short? the system's log (dmesg) says so"
            )
        said = (f"rank {rank}: {self._crashes[rank]}" for rank in gone if not _LOST.search(self._crashes[rank]))
        return next(said, None)


def _name_the_lost(run: Path, start: int, why: str) -> None:
    """Put `why` into status.json where a start after `start` says no more than that it has lost a rank."""
    status = read_status(run)
    if status.get("start", 0) > start and status["state"] == "crashed" and _LOST.search(str(status.get("reason"))):
        write_status(run, "crashed", 1, reason=why)


def _wait_for_ranks(run: Path) -> None:
    """A rank that has lost its agent is being killed, and holds the run for a moment."""
    until = time.monotonic() + 5.0
    while ledger.is_held(run) and time.monotonic() < until:
        time.sleep(0.1)


class _Watch:
    """Sees that a start is over before torchrun does."""

    def __init__(self, run: Path, start: int, nodes: Nodes | None, alone: float) -> None:
        self._run = run
        self._start = start  # of the ranks before: what became of them may be noticed, and said, only now
        self._elastic = nodes is not None and nodes.least < nodes.most
        self._wait_until = math.inf if nodes is None else alone + 60 * nodes.wait_minutes
        self._look_at = 0.0
        self._ended_badly: float | None = None
        self._empty: float | None = None
        self.began = False  # whether there were ranks
        self._ranks: dict[int, int] = {}  # by process
        self.first_gone: list[int] = []  # while others of this machine were still there

    def is_over(self, agent: int) -> bool:
        """Whether there is nothing to wait for.

        Before there are ranks here: when a stop is asked for, or the others have not come. Later: when the run has ended well
        and its ranks here are gone, but torchrun still waits for others; when it has ended badly elsewhere, and our ranks
        would wait for a time-out to notice; when our ranks are gone and torchrun hangs in a connection that is dead.
        """
        now = time.monotonic()
        here = {process: rank for process in children(agent) if (rank := _rank(process)) is not None}
        if here and not self.first_gone:
            self.first_gone = sorted(self._ranks[process] for process in self._ranks.keys() - here.keys())
        self._ranks |= here
        if now < self._look_at:
            return False
        self._look_at = now + 0.3
        if here:
            self.began, self._empty = True, None
        elif signals.asked():
            return True
        elif not self.began:
            return now > self._wait_until
        else:
            self._empty = self._empty or now
        if self._empty is not None and now > self._empty + _HANGS_SECONDS:
            return True
        try:
            status = read_status(self._run)
        except OSError:  # a network disk that stutters must not end the run
            return False
        if status.get("start", 0) <= self._start or status["state"] == "running":
            self._ended_badly = None
            return False
        if status["exit_code"] in (1, 2, 3):
            self._ended_badly = self._ended_badly or now
            return now > self._ended_badly + 5.0
        # When a machine joins an elastic run, torchrun stops the ranks to start them anew: a stop is not the end there.
        return self._empty is not None and (status["state"] == "done" or not self._elastic)


def _rank(process: int) -> int | None:
    """None for what an import in torchrun starts for a moment, and for one that has ended, and whose parent takes no notice.

    The environment of one that has ended is forbidden to all but root.
    """
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{process}/environ").read_bytes())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return int(found[1]) if found else None


def _say(line: str) -> None:
    print(f"simclr-dist: {line}", file=sys.stderr, flush=True)
