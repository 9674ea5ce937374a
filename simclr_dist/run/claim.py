"""Who writes into a run folder, since when, and how far: its lock, its heartbeat, and a line for every start and stop.

A start takes the next number (a generation) by creating `starts/XXXXXXXX.json`, which only one can, and holds a lock on that
file while it lives. Locks do not always reach other machines, and a machine that lost its network may hold one for ever; so a
writer also asks, before each checkpoint becomes valid, whether its number is still the highest.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from simclr_dist.system.errors import ConfigError, TakenOverError

STALE_SECONDS = 120.0  # a holder on another machine without a sign of life for this long is taken for dead
# File systems of one machine: whoever else writes there is a process of the same kernel, and its lock tells the truth.
_ONE_MACHINE = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
_HEARTBEAT_BYTES = 128


def record(run: Path, event: str, **fields: Any) -> None:
    """Append a line to `run`/ledger.jsonl. A disk that takes none costs the line, said on stderr, and not the run."""
    line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
    try:
        with (run / "ledger.jsonl").open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")  # a kill, or a full disk, has cut the last line short
            file.write(b"\n" * torn + line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"WARNING: {run / 'ledger.jsonl'}: {error.strerror}: lost: {line}", end="", file=sys.stderr, flush=True)


def entries(run: Path) -> list[dict[str, Any]]:
    """The ledger's lines, oldest first; a line that a kill cut short is left out."""
    found = []
    for line in _read(run / "ledger.jsonl").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def given_up(run: Path) -> str | None:
    """Why nobody will start the run again by himself; None while somebody may."""
    for entry in reversed(entries(run)):
        if entry["event"] in ("start", "submitted", "requeued"):
            return None
        if entry["event"] == "cancelled":
            return "cancelled"
        if entry["event"] == "gave_up" and entry.get("kind") != "eval":
            return f"given up: {entry['why']}"
    return None


def cancelled_jobs(run: Path) -> list[str]:
    """SLURM jobs of the run that somebody has cancelled, and that must not requeue themselves."""
    return _read(run / "cancelled").split()


def heartbeat(run: Path) -> dict[str, Any]:
    """The last sign of life: `generation`, `step` and `time`; {} when there is none."""
    try:
        beat: dict[str, Any] = json.loads(_read(run / "heartbeat"))
    except ValueError:
        return {}
    return beat


class Claim:
    """A start's right to write into the run folder; ends with the process, or with `release`."""

    def __init__(self, run: Path, generation: int, lock: int) -> None:
        self.run = run
        self.generation = generation
        self._lock: int | None = lock
        self.step = 0  # of the last beat
        # A reading process outlives its killed rank for seconds, and would hold the lock as long.
        os.register_at_fork(after_in_child=self._unlock)
        self._heartbeat = os.open(run / "heartbeat", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def started(self, step: int, world_size: int) -> None:
        """Record the start, with what was lost since the last sign of life: this start goes on from `step`."""
        before = heartbeat(self.run)
        record(
            self.run,
            "start",
            generation=self.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            world_size=world_size,
            step=step,
            steps_lost=max(0, before.get("step", 0) - step),
            seconds_down=time.time() - before["time"] if before else 0.0,
        )
        self.beat(step)

    def check(self) -> None:
        """Raises TakenOverError when a later start holds the folder."""
        newest = newest_start(self.run)
        if newest > self.generation:
            who = _describe(_holder(self.run, newest))
            raise TakenOverError(f"run_folder: {str(self.run)!r} was taken over by {who}; this start ends without writing")

    def beat(self, step: int, *, ended: bool = False) -> None:
        """Say that `step` steps are done, in place: one small write, without waiting for the disk, which may refuse it.

        Raises TakenOverError when a later start has spoken there: between two checkpoints the log must not get ours either.
        """
        self.step = step
        line = json.dumps({"generation": self.generation, "step": step, "time": time.time(), "ended": ended})
        with contextlib.suppress(OSError):  # what else fails to be written says so
            if heartbeat(self.run).get("generation", 0) > self.generation:
                self.check()
            os.pwrite(self._heartbeat, line.ljust(_HEARTBEAT_BYTES - 1).encode() + b"\n", 0)

    def release(self) -> None:
        """Give the folder back."""
        os.close(self._heartbeat)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def claim(run: Path) -> Claim:
    """Take the run folder for this process; raises ConfigError when another that lives has it.

    An earlier start of the same SLURM job is passed over: SLURM runs a job once at a time, so it has lost its machine. Should
    that one try again, it gets TakenOverError.
    """
    (run / "starts").mkdir(exist_ok=True)
    while True:
        generation = newest_start(run)
        if generation:
            _wait_for_end(run, generation)
        try:
            lock = os.open(_path(run, generation + 1), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue  # somebody was quicker: he is the one to ask now
        _lock(lock)
        if newest_start(run) > generation + 1:  # somebody looked at the file before it was locked
            os.close(lock)
            raise _in_use(run, newest_start(run))
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": _restart(),
            "time": time.time(),
        }
        try:
            os.write(lock, json.dumps(me).encode() + b"\n")
            os.fsync(lock)
        except OSError:  # a full disk; nobody must wait for a sign of life of one that could not sign
            os.close(lock)
            _path(run, generation + 1).unlink()
            raise
        return Claim(run, generation + 1, lock)


def newest_start(run: Path) -> int:
    """The number of the last start that has taken the folder, alive or not; 0 for none."""
    return max((int(path.stem) for path in (run / "starts").glob("*.json")), default=0)


def is_held(run: Path) -> bool:
    """Whether a process that locks can tell about is writing into the folder."""
    generation = newest_start(run)
    return generation > 0 and bool(_is_locked(run, generation))


def refuse_if_held(run: Path) -> None:
    """Raises ConfigError when another start has the folder: the early, cheap check."""
    if is_held(run) and _restarts_ahead(_holder(run, newest_start(run))) <= 0:
        raise _in_use(run, newest_start(run))


def is_dead(run: Path) -> bool:
    """Whether the last start has certainly ended: where locks may not reach its machine, after a long silence."""
    if not (generation := newest_start(run)):
        return True
    locked, beat = _is_locked(run, generation), heartbeat(run)
    if locked:
        return False
    if beat.get("generation") == generation and beat.get("ended", False):
        return True
    here = _file_system(run) in _ONE_MACHINE or _holder(run, generation).get("host") == socket.gethostname()
    return (locked is False and here) or time.time() - _signs_of_life(run, generation) > STALE_SECONDS


def _wait_for_end(run: Path, generation: int) -> None:
    """Return once the holder is dead; raises ConfigError when it lives."""
    began, first = time.monotonic(), _signs_of_life(run, generation)
    told, trusted = False, _file_system(run) in _ONE_MACHINE
    while True:
        holder, waited = _holder(run, generation), time.monotonic() - began
        if (restarts := _restarts_ahead(holder)) > 0:
            return
        if restarts < 0:
            raise TakenOverError(f"run_folder: {str(run)!r} was taken over by {_describe(holder)}; this start ends")
        if not holder and time.time() - _path(run, generation).stat().st_mtime < 5:
            time.sleep(0.1)  # it has been created, and is about to be locked and signed
            continue
        locked = _is_locked(run, generation)
        signs = _signs_of_life(run, generation)
        beat = heartbeat(run)
        ended = beat.get("generation") == generation and beat.get("ended", False)
        if locked:
            if waited > 5:  # one that is being killed holds its lock for a moment longer
                raise _in_use(run, generation)
        elif ended or (locked is False and (trusted or holder.get("host") == socket.gethostname())):
            return
        elif signs > first:
            raise _in_use(run, generation)
        elif (left := signs + STALE_SECONDS - time.time()) < 0:
            return
        elif not told and waited > 1:
            told = True
            print(
                f"run_folder: {str(run)!r}: its last start, {_describe(holder)}, has not said that it ended;"
                f" waiting {left:.0f} s for a sign of life",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.2)


def _signs_of_life(run: Path, generation: int) -> float:
    """When the holder was last heard of."""
    beat: float = heartbeat(run).get("time", 0.0)
    return max(_path(run, generation).stat().st_mtime, beat)


def _path(run: Path, generation: int) -> Path:
    return run / "starts" / f"{generation:08d}.json"


def _holder(run: Path, generation: int) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(_read(_path(run, generation)))
    except ValueError:
        return {}  # it was killed before it could sign
    return holder


def _restarts_ahead(holder: dict[str, Any]) -> int:
    """How many restarts of one SLURM job lie between the holder and this process; 0 also for different jobs, or none."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None or holder.get("job") != job:
        return 0
    return _restart() - int(holder.get("restart", 0))


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _is_locked(run: Path, generation: int) -> bool | None:
    """None where the file system has no locks."""
    descriptor = os.open(_path(run, generation), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # no locks on this file system: the heartbeat has to do
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for somebody who only looks


def _file_system(path: Path) -> str:
    """Its type, as `mount` names it; empty where that cannot be found out."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        mount, _, described = line.partition(" - ")
        if mount.split()[2] == device:
            return described.split()[0]
    return ""


def _in_use(run: Path, generation: int) -> ConfigError:
    holder = _describe(_holder(run, generation))
    return ConfigError(f"run_folder: {str(run)!r} is in use by {holder}; stop that one first, or name another folder")


def _describe(holder: dict[str, Any]) -> str:
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("time", 0.0)))
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}, since {since}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
