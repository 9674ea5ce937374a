"""Run the ranks of one machine under a small parent. Several ranks need torchrun, one rank alone may do without.

The parent knows the exit code that torchrun loses, and starts crashed ranks again. torchrun's own restarts count for ever. They
keep a rendezvous that a replaced machine cannot join, and end with the machine that hosts the store. Ours start a fresh agent
on every machine, and count only starts that brought the run no new checkpoint.
"""

import math
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from simclr_dist.launch.rendezvous import Nodes, torchrun_options
from simclr_dist.launch.supervisor import children, supervise
from simclr_dist.run.claim import is_held, newest_start
from simclr_dist.run.folder import newest_step
from simclr_dist.run.restarts import Ended, decide, pause_seconds
from simclr_dist.run.status import End, name_cause, note_death, read_notes, read_status, record_event
from simclr_dist.system import signals
from simclr_dist.system.errors import LAST_WORD, PREEMPTED, say
from simclr_dist.system.machine import threads_a_rank
from simclr_dist.system.slurm_job import job_id

_REFUSED_SECONDS = 10.0  # the others mostly end with it, and rank 0 has a line to say and a status to write
_HANGS_SECONDS = 60.0  # the last rank to end may have a status to write on a slow disk
_Start = Callable[[Callable[[int], bool]], tuple[int, dict[int, End], bool]]  # `_run_ranks` of these ranks


def torchrun(
    processes: int, command: Sequence[str], run: Path | None = None, *, nodes: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Run `command` with `processes` ranks on this machine; return its exit code. `command` is `-m MODULE ...`.

    The code is the one in `run`/status.json, or in the ranks' notes where they did not get so far, or 75 after a stop. After a
    crash all starts again, as `restarts.decide` has it. A start for which too few machines came together does not count. Raises
    what `torchrun_options` raises, and KeyboardInterrupt when ranks without a `run`, which
    have nothing to save, are stopped.
    """
    signals.listen()
    agent = None
    if processes > 1 or nodes is not None or run is None:
        # By its own name a machine may not be found, in a container for one: ranks would wait for minutes.
        agent = ["--standalone", "--local-addr=127.0.0.1"] if nodes is None else torchrun_options(nodes)
    ranks = partial(_run_ranks, processes, command, agent)
    if run is None:
        code, notes, _ = ranks(lambda _: bool(signals.requested()))
        if signals.requested():
            raise KeyboardInterrupt
        return max([int(code != 0), *(note.code for note in notes.values())])
    note_death(run)  # of an earlier start
    crashes: list[Ended] = []
    before, since, attempts = newest_step(run), time.monotonic(), 0
    while True:
        end, why, met, disk = _start(ranks, run, nodes, since)
        if end is not None:
            return end
        if met:
            crashes.append(Ended(crash=True, saved=newest_step(run), disk=disk))
            decision = decide(crashes, max_restarts, before=before)
            if run.is_dir():  # else they have ended before they made it
                event = "restart" if decision.again else "gave_up"
                record_event(
                    run, event, why=why, host=socket.gethostname(), fruitless=decision.fruitless, launcher_job=job_id()
                )
            if not decision.again:
                if not disk:  # the rank has said what is to be mended
                    say(f"{why}; given up (--max-restarts {max_restarts})")
                return 1
            since, attempts = time.monotonic(), decision.fruitless
            say(f"{why}; starting again from step {newest_step(run)}")
        else:
            attempts += 1
            if nodes is not None and time.monotonic() > since + 60 * nodes.wait_minutes:
                limit = f"at {nodes.endpoint} within {nodes.wait_minutes:g} minutes (first_step_timeout_minutes)"
                say(f"--nnodes {nodes}: the machines did not come together {limit}; the same line on each of them goes on")
                return 1
        if _within(pause_seconds(attempts), signals.requested):
            return PREEMPTED


def _start(ranks: _Start, run: Path, nodes: Nodes | None, since: float) -> tuple[int | None, str, bool, bool]:
    """Start the ranks once. The other machines are waited for from `since` on.

    Returns the exit code, None when another start may follow; why this one ended; whether all machines had come together; and
    whether it ended by a disk that refuses.
    """
    watch = _Watch(run, nodes, since)
    code, notes, began = ranks(watch.is_over)
    _within(5.0, lambda: not is_held(run))  # a rank that has lost its agent is being killed: it holds the run for a moment
    note_death(run)
    if (cause := _cause(watch.first_gone, notes)) is not None:
        name_cause(run, watch.earlier, cause)
    status = read_status(run)
    ended = status if status.get("start", 0) > watch.earlier else {}
    final = [note.code for note in notes.values() if note.state not in ("crashed", "done")]
    why = str(ended.get("reason") or _first_word(sorted(notes), notes) or f"the ranks ended with {code}")
    if ended.get("state") in ("done", "preempted", "failed", "diverged"):
        end: int | None = int(ended["exit_code"])
    elif final:
        end = max(final)
    elif signals.requested():
        end = 1 if ended else PREEMPTED  # nothing was begun that could be lost
    else:
        end = None if code else 0
    return end, why, nodes is None or began, any(note.disk for note in notes.values())


def _cause(gone: Sequence[int], notes: Mapping[int, End]) -> str | None:
    """Return what ended the ranks that went first; None if unknown. The other ranks only notice a lost connection."""
    for rank in gone:
        if rank not in notes:
            who = f"rank {rank} on {socket.gethostname()}"
            return f"{who} was killed, or crashed outside Python; was memory short? the system's log (dmesg) says so"
    return _first_word(gone, notes)


def _first_word(ranks: Sequence[int], notes: Mapping[int, End]) -> str | None:
    return next((f"rank {rank}: {notes[rank].why}" for rank in ranks if notes[rank].why and not notes[rank].lost), None)


def _within(seconds: float, happens: Callable[[], object]) -> bool:
    """Wait until something happens, at most `seconds`; return whether it did."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if happens():
            return True
        time.sleep(0.1)
    return False


def _run_ranks(
    processes: int, command: Sequence[str], agent: Sequence[str] | None, is_over: Callable[[int], bool]
) -> tuple[int, dict[int, End], bool]:
    """Start the ranks once; return the exit code and the ranks' notes. Also return whether torchrun came to start them.

    `agent`: torchrun's options for these machines; None for one rank, which needs no torchrun. torchrun is killed when
    `is_over`.
    """
    # The last: else an agent that joins a rendezvous anew waits for an address that nobody publishes again.
    # PET_*, of a platform: torchrun would take them for options, and PET_NNODES has it wait for machines.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    env = {"OMP_NUM_THREADS": str(threads_a_rank(processes)), **inherited, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryDirectory(prefix="simclr_dist-") as folder:
        note = Path(folder, "note")
        env[LAST_WORD] = str(note)
        if agent is None:
            code = supervise([sys.executable, *command], env=env)
        else:
            # Without a folder for its logs torchrun makes one, and leaves it behind. And by default it takes SIGHUP, too: then
            # its ranks would not see that nohup has had it ignored.
            agent = [f"--log-dir={folder}", "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT", *agent]
            agent += [f"--nproc-per-node={processes}", "--max-restarts=0"]
            env[signals.LAUNCHER] = str(os.getpid())
            command = ["-m", "torch.distributed.run", *agent, *command]
            code = supervise(
                [sys.executable, *command], env=env, tell=children, give_up=lambda child: is_over(child) or _is_refused(note)
            )
        notes = read_notes(note)
        began = any(Path(folder).glob("*/attempt_*"))  # made for the ranks' logs; ranks themselves may be gone before a look
        return code or max((end.code for end in notes.values()), default=0), notes, began


def _is_refused(note: Path) -> bool:
    """Return whether a rank has refused some seconds ago. torchrun does not see it, as the rank ends with 0."""
    refused = [rank for rank, end in read_notes(note).items() if end.code and (end.disk or end.state != "crashed")]
    return any(time.time() > Path(f"{note}.{rank}").stat().st_mtime + _REFUSED_SECONDS for rank in refused)


class _Watch:
    """A watch that sees a start is over before torchrun does."""

    def __init__(self, run: Path, nodes: Nodes | None, since: float) -> None:
        self._run = run
        self.earlier = newest_start(run)  # the start before: its end may be noticed, and recorded, only now
        self._elastic = nodes is not None and nodes.least < nodes.most
        self._wait_until = math.inf if nodes is None else since + 60 * nodes.wait_minutes
        self._look_at = 0.0
        self._ended_badly: float | None = None  # since when
        self._empty: float | None = None  # since when our ranks are gone
        self._ranks: dict[int, int] = {}  # by process
        self.first_gone: list[int] = []  # while others of this machine were still there

    def is_over(self, agent: int) -> bool:
        """Return whether there is nothing to wait for.

        Before this machine has ranks: a stop signal has come, or the other machines have not. Later: the run has ended well and
        our ranks are gone, but torchrun still waits for others; or it has ended badly elsewhere, and our ranks would notice
        only by a time-out; or our ranks are gone, and torchrun hangs in a dead connection.
        """
        now = time.monotonic()
        alive = self._look_at_ranks(agent)
        if now < self._look_at:
            return False
        self._look_at = now + 0.3
        if alive:
            self._empty = None
            return self._run_is_over(now)
        if signals.requested():
            return True
        if not self._ranks:
            return now > self._wait_until
        self._empty = now if self._empty is None else self._empty
        return now > self._empty + _HANGS_SECONDS or self._run_is_over(now)

    def _look_at_ranks(self, agent: int) -> bool:
        """Return whether there are ranks, and keep which of them went first."""
        alive = {process: rank for process in children(agent) if (rank := _rank(process)) is not None}
        if alive and self._ranks and self._ranks.keys().isdisjoint(alive):
            # All were stopped and started anew, as for a machine that joins: that has nothing to do with how these will end.
            self._ranks, self.first_gone = {}, []
            with suppress(OSError):  # a network disk that stutters must not end the run
                self.earlier = newest_start(self._run)
        if alive and not self.first_gone:
            self.first_gone = sorted(self._ranks[process] for process in self._ranks.keys() - alive.keys())
        self._ranks |= alive
        return bool(alive)

    def _run_is_over(self, now: float) -> bool:
        """Return whether status.json shows an end that torchrun does not see."""
        try:
            status = read_status(self._run)
        except OSError:  # as above
            return False
        if status.get("start", 0) <= self.earlier or status["state"] == "running":
            self._ended_badly = None
            return False
        if status["exit_code"] in (1, 2, 3):
            self._ended_badly = now if self._ended_badly is None else self._ended_badly
            return now > self._ended_badly + 5.0
        # When a machine joins an elastic run, torchrun stops the ranks to start them anew: a stop is not the end there.
        return self._empty is not None and (status["state"] == "done" or not self._elastic)


def _rank(process: int) -> int | None:
    """Return a process's rank. None for what an import in torchrun starts for a moment, and for a process that has ended."""
    # The environment of one that has ended is forbidden to all but root.
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if rank := re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{process}/environ").read_bytes()):
            return int(rank[1])
    return None
