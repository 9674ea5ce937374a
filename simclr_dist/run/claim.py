"""Let one start at a time hold a run folder. Its number, its lock and its heartbeat say that it does.

A start takes the next number (its generation) by creating `starts/XXXXXXXX.json`, which only one process can do, and locks that
file while it lives. Locks do not always reach other machines, and a machine that lost its network may hold one for ever. So a
writer also checks, before each checkpoint becomes valid, that its number is still the highest.
"""

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from simclr_dist.system import files
from simclr_dist.system.errors import ConfigError, DamagedError, TakenOverError, refusing, say
from simclr_dist.system.slurm_job import job_id, restart_count

STALE_SECONDS = 120.0  # a holder on another machine without a sign of life for this long is taken for dead
# File systems of one machine: whoever else writes there is a process of the same kernel, and its lock tells the truth.
_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
_HEARTBEAT_BYTES = 128
_CURE = "; remove it once no start is at work there"
_HEARTBEAT = {"generation": int, "step": int, "time": int | float, "ended?": bool}
_HOLDER = {"host?": str, "pid?": int, "job?": str | None, "restart?": int, "time?": int | float}


def heartbeat(run: Path) -> dict[str, Any]:
    """Return the last sign of life: `generation`, `step`, `time`, `ended`. Return {} for none; the next one mends the file."""
    with contextlib.suppress(DamagedError):
        return files.read_object(run / "heartbeat", _HEARTBEAT)
    return {}


class Claim:
    """A start's right to write into the run folder. It ends with the process, or with `release`."""

    def __init__(self, run: Path, generation: int, lock: int) -> None:
        self.run, self.generation = run, generation
        self.step = 0  # of the last beat
        self._lock: int | None = lock
        # A reading process outlives its killed rank for seconds, and would hold the lock as long.
        os.register_at_fork(after_in_child=self._unlock)
        self._heartbeat = os.open(run / "heartbeat", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, files.FILE_MODE)
        if os.fstat(self._heartbeat).st_size > _HEARTBEAT_BYTES:  # damaged: what follows our line would stay
            os.ftruncate(self._heartbeat, _HEARTBEAT_BYTES)

    def check(self) -> None:
        """Raise TakenOverError when a later start holds the folder."""
        check_newest(self.run, self.generation)

    def beat(self, step: int, *, ended: bool = False) -> None:
        """Write the heartbeat: `step` steps are done.

        This is one small write in place. It does not wait for the disk, which may refuse it. Raises TakenOverError when a later
        start has written there: its log must not get our lines, between two checkpoints either.
        """
        self.step = step
        line = json.dumps({"generation": self.generation, "step": step, "time": time.time(), "ended": ended})
        with contextlib.suppress(OSError):  # a checkpoint or a log that cannot be written says so
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


def claim_run(run: Path) -> Claim:
    """Take the run folder for this process. Raises ConfigError while another start holds it.

    An earlier start of the same SLURM job is passed over: SLURM runs a job once at a time, so that start has lost its machine.
    It gets TakenOverError if it comes back.
    """
    (run / "starts").mkdir(exist_ok=True)
    while True:
        generation = newest_start(run)
        if generation:
            _wait_for_end(run, generation)
        try:
            lock = os.open(_path(run, generation + 1), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.FILE_MODE)
        except FileExistsError:
            continue  # another was quicker, and is now the one to wait for
        with contextlib.suppress(OSError):  # no locks on this file system: the heartbeat has to do
            files.lock(lock, wait=True)  # waits for somebody who only looks
        if newest_start(run) > generation + 1:  # somebody looked at the file before it was locked
            os.close(lock)
            raise _in_use(run, newest_start(run))
        who = {"host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), "restart": restart_count()}
        try:
            os.write(lock, json.dumps({**who, "time": time.time()}).encode() + b"\n")
            os.fsync(lock)
        except OSError:  # a full disk: nobody must wait for a sign of life of a start that could not sign
            os.close(lock)
            _path(run, generation + 1).unlink()
            raise
        return Claim(run, generation + 1, lock)


def check_newest(run: Path, generation: int) -> None:
    """Raise TakenOverError when a later start than `generation` holds the folder."""
    if (newest := newest_start(run)) > generation:
        who = f"{str(run)!r} was taken over by {describe_start(signature(run, newest))}"
        raise TakenOverError(f"run_folder: {who}; this start ends without writing")


def newest_start(run: Path) -> int:
    """Return the last start's number, alive or not; 0 for none."""
    return max((int(path.stem) for path in (run / "starts").glob("*.json") if re.fullmatch("[0-9]+", path.stem)), default=0)


def is_held(run: Path) -> bool:
    """Return whether a process is writing into the folder. Its lock says so."""
    generation = newest_start(run)
    return generation > 0 and bool(_is_locked(run, generation))


def refuse_if_held(run: Path) -> None:
    """Raise ConfigError while another start holds the folder: the early, cheap check."""
    if is_held(run) and _restarts_ahead(signature(run, newest_start(run))) <= 0:
        raise _in_use(run, newest_start(run))


def is_dead(run: Path) -> bool:
    """Return whether the last start has certainly ended."""
    if not (generation := newest_start(run)):
        return True
    ended = _has_ended(run, generation)
    return time.time() - _last_sign(run, generation) > STALE_SECONDS if ended is None else ended


def _wait_for_end(run: Path, generation: int) -> None:
    """Return once the holder is dead; raises ConfigError when it lives."""
    began, first = time.monotonic(), _last_sign(run, generation)
    announced = False
    while True:
        holder, waited = signature(run, generation), time.monotonic() - began
        if (restarts := _restarts_ahead(holder)) > 0:
            return
        if restarts < 0:
            raise TakenOverError(f"run_folder: {str(run)!r} was taken over by {describe_start(holder)}; this start ends")
        if not holder and waited < 5 and time.time() - _signed_at(run, generation) < 5:
            time.sleep(0.1)  # it has been created, and is about to be locked and signed
            continue
        ended, last = _has_ended(run, generation), _last_sign(run, generation)
        if ended is False:
            if waited > 5:  # one that is being killed holds its lock for a moment longer
                raise _in_use(run, generation)
        elif ended:
            return
        elif last > first:
            raise _in_use(run, generation)
        elif (left := min(last - time.time(), -waited) + STALE_SECONDS) < 0:  # the last sign may be of a clock that is ahead
            return
        elif not announced and waited > 1:
            announced = True
            silent = f"{describe_start(holder)}, has not said that it ended; waiting {left:.0f} s for a sign of life"
            say(f"run_folder: {str(run)!r}: its last start, {silent}", "")
        time.sleep(0.2)


def _last_sign(run: Path, generation: int) -> float:
    """Return when the holder was last heard of."""
    return max(_signed_at(run, generation), float(heartbeat(run).get("time", 0.0)))


def _has_ended(run: Path, generation: int) -> bool | None:
    """Return whether a start has ended. None where its lock may not reach this machine: only a long silence tells."""
    locked = _is_locked(run, generation)
    if locked:
        return False
    beat = heartbeat(run)
    if beat.get("generation") == generation and beat.get("ended"):
        return True
    same_machine = _file_system(run) in _ONE_MACHINE or signature(run, generation).get("host") == socket.gethostname()
    return True if locked is False and same_machine else None


def _path(run: Path, generation: int) -> Path:
    return run / "starts" / f"{generation:08d}.json"


def signature(run: Path, generation: int) -> dict[str, Any]:
    """Return what a start signed with. Return {} for one that was killed before it could, or whose file is damaged."""
    with contextlib.suppress(DamagedError):
        return files.read_object(_path(run, generation), _HOLDER)
    return {}


def _restarts_ahead(holder: dict[str, Any]) -> int:
    """Count one SLURM job's restarts from the holder to this process. Return 0 also for different jobs, or none."""
    if (job := job_id()) is None or holder.get("job") != job:
        return 0
    return restart_count() - int(holder.get("restart", 0))


def _is_locked(run: Path, generation: int) -> bool | None:
    """Return whether a start's file is locked. Return None where the file system has no locks."""
    with refusing(f"{_path(run, generation)}: cannot be opened", ConfigError, _CURE):
        file = _path(run, generation).open("rb")
    with file:
        try:
            return not files.lock(file.fileno(), shared=True)  # two who only look must not take each other for a holder
        except OSError:
            return None


def _signed_at(run: Path, generation: int) -> float:
    with refusing(f"{_path(run, generation)}: cannot be opened", ConfigError, _CURE):
        return _path(run, generation).stat().st_mtime


def _file_system(path: Path) -> str:
    """Return the file system's type, as `mount` names it. It is empty where that cannot be found out."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, described = line.partition(" - ")
            if mount.split()[2] == device:
                return described.split()[0]
    return ""


def _in_use(run: Path, generation: int) -> ConfigError:
    holder = describe_start(signature(run, generation))
    return ConfigError(f"run_folder: {str(run)!r} is in use by {holder}; stop that one first, or name another folder")


def describe_start(holder: dict[str, Any]) -> str:
    """Describe who made a start, by its signature."""
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("time", 0.0)))
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}, since {since}"
