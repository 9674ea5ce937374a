"""Record what became of a run. ledger.jsonl: a line for every start and end; status.json: the newest; and the ranks' notes."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simclr_dist.run.claim import Claim, check_newest, heartbeat, is_dead, newest_start
from simclr_dist.system import errors, files, signals
from simclr_dist.system.slurm_job import job_id, restart_count

_STATUS = {"state": str, "exit_code": int | None, "start": int, "time": int | float, "reason?": str, "disk?": bool}
_EVENT = {
    "time": int | float, "event": str, "kind?": str, "generation?": int, "step?": int, "total?": int | None,
    "steps_lost?": int, "lost?": bool, "disk?": bool, "job?": str | None,
    "launcher_job?": str | None, "cluster?": str | None, "restart?": str, "nodes?": int, "by?": str,
}  # fmt: skip
_MORE_OF_EVENT: dict[str, dict[str, Any]] = {
    "stop": {"state": str, "exit_code": int, "why": str | None},
    "gave_up": {"why": str},
    "requeued": {"crash": bool, "saved": int},
}
_END = {"state": str, "code": int, "why": str | None, "lost?": bool, "disk?": bool, "error?": str | None}
_FINAL = ("done", "failed", "diverged")  # a start that crashed or was preempted may be followed by another
_LOCK_SECONDS = 5.0  # whoever has locked the ledger for longer is cut off, and must not hold us up


@dataclass(frozen=True)
class End:
    """The way a start ended. `lost`: by the loss of another rank. The true reason is what ended that rank.

    `disk`: by a disk that is full, read-only or forbidden. `error`: the class of a user's mistake.
    """

    state: str
    code: int
    why: str | None = None
    lost: bool = False
    disk: bool = False
    error: str | None = None


_BY_ERROR = (
    (errors.StoppedError, "preempted", errors.PREEMPTED),
    (errors.UserError, "failed", 2),
    (errors.DivergedError, "diverged", 3),
    (errors.WorkerError, "crashed", 1),
)


def end_of(error: BaseException | None) -> End:
    """Return how this error ends a start; None for a good end."""
    if error is None:
        return End("done", 0)
    if isinstance(error, errors.PassingError) and job_id() is not None:
        return End("crashed", 1, str(error))
    for kind, state, code in _BY_ERROR:
        if isinstance(error, kind):
            return End(state, code, str(error), error=type(error).__name__ if code == 2 else None)
    lost, disk = isinstance(error, errors.LostRankError), errors.is_of_disk(error)
    return End("crashed", 1, errors.crash_summary(error), lost, disk)


def leave_note(end: End) -> int:
    """Leave a note for the launcher, and torchrun the reason. Return the exit code."""
    with suppress(OSError):  # of a full disk, say, which is then the error itself
        if path := os.environ.get(errors.LAST_WORD):
            # One that is there is its own process's alone; ranks share a name.
            file = Path(path) if Path(path).exists() else Path(f"{path}.{os.environ.get('RANK', '0')}")
            file.write_text(json.dumps(asdict(end)))
        if end.code and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            more = {"py_callstack": end.why or "", "timestamp": str(int(time.time()))}
            files.write_atomically(Path(path), json.dumps({"message": {"message": end.why, "extraInfo": more}}).encode())
    return end.code


def read_notes(path: Path) -> dict[int, End]:
    """Return a start's notes by rank. torchrun does not pass them on; `path` is what its ranks had in LAST_WORD."""
    return {int(file.suffix[1:]): read_note(file) for file in path.parent.glob(f"{path.name}.*")}


def read_note(file: Path) -> End:
    """Return the end that a note tells of."""
    try:
        return End(**files.read_object(file, _END))
    except (errors.DamagedError, TypeError):  # or empty, or of another version
        return End("crashed", 1, f"{file}: was cut short, as by a full disk", disk=True)


def record_event(run: Path, event: str, *, only_if: Callable[[], bool] = lambda: True, **fields: Any) -> None:
    """Append a line to ledger.jsonl. A disk that does not take it costs the line, with a warning, not the run.

    `only_if` is asked while nobody else writes.
    """
    with _ledger_locked(run):
        if only_if():
            _append(run, event, **fields)


def _append(run: Path, event: str, **fields: Any) -> dict[str, Any]:
    entry = {"time": time.time(), "event": event, **fields}
    line = json.dumps(entry) + "\n"
    try:
        with (run / "ledger.jsonl").open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")  # a kill, or a full disk, has cut the last line short
            file.write(b"\n" * torn + line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        errors.say(f"{run / 'ledger.jsonl'}: {error.strerror}: lost: {line.rstrip()}", "WARNING: ")
    return entry


def read_ledger(run: Path, *, report: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Return the ledger's lines, oldest first. Damaged ones are left out; `report` gets a line about them."""
    path = run / "ledger.jsonl"
    entries = [entry for _, entry in files.json_lines(_content(path), _event)]
    if damaged := entries.count(None):
        report(f"{path}: {damaged} of its {len(entries)} lines are damaged, or cut short by a kill, and are left out")
    return [entry for entry in entries if entry is not None]


@dataclass(frozen=True)
class Outlook:
    """Whether a run goes on. `over`: nothing starts it again by itself. `job`: the SLURM job that otherwise would."""

    state: str
    reason: str | None = None
    over: bool = False
    job: str | None = None


def outlook(run: Path) -> Outlook:
    """Tell whether a run goes on. The training's newest line counts more than an older status; an evaluation's do not count."""
    status, launcher, job = read_status(run), None, None
    state, reason, start = status.get("state", "not started"), status.get("reason"), status.get("start", 0)
    for entry in reversed(read_ledger(run)):
        match entry:
            case {"kind": "eval" | "work"}:
                continue
            case {"event": "cancelled"}:
                return Outlook(state, "cancelled", over=True)
            case {"event": "gave_up", "job": _}:
                return Outlook(state, f"given up: {entry['why']}", over=True)
            case {"event": "gave_up"}:  # by a launcher, whose batch script, if there is one, may start it again
                launcher, job = f"given up: {entry['why']}", entry.get("launcher_job")
            case {"event": "stop", "state": end, "why": why, "generation": number} if end in _FINAL and start <= number:
                return Outlook(end, why, over=True)
            case {"event": "submitted" | "requeued" as event}:
                return Outlook(event, job=entry.get("job"))
            case {"event": "start", "generation": number}:
                job = job or entry.get("job")
                if start < number:
                    return Outlook("running", job=job)
                break
    over = state in _FINAL or (launcher is not None and job is None)
    return Outlook(state, launcher or reason, over, None if over else job)


def cancelled_jobs(run: Path) -> list[str]:
    """Return the run's SLURM jobs that somebody has cancelled. They must not requeue themselves."""
    return _content(run / "cancelled").decode(errors="replace").split()


def read_status(run: Path) -> dict[str, Any]:
    """Return status.json, or {} before the first start. A missing or damaged one is made anew from the ledger."""
    with suppress(errors.DamagedError):
        status = files.read_object(run / "status.json", _STATUS)
        if status and status["start"] <= newest_start(run):
            return status
    for entry in reversed(read_ledger(run)):
        if entry["event"] in ("start", "stop"):
            return {**_shown(entry), "start": entry.get("generation", newest_start(run)), "time": entry["time"]}
    return {}


def write_status(run: Path, state: str, exit_code: int | None, *, start: int | None = None, **more: Any) -> None:
    """Show in status.json how the run's last start stands. It has the true exit code: torchrun makes every exit code 1.

    `start` is the number of the start that is spoken of. Raises TakenOverError, and writes nothing, when a later one holds the
    folder. `alarms` that a start had when it ended stay. A disk that does not take the file costs a warning.
    """
    start = newest_start(run) if start is None else start
    before = read_status(run)
    if state != "running" and before.get("start") == start and (alarms := before.get("alarms")):
        more = {"alarms": alarms, **more}
    status = {"state": state, "exit_code": exit_code, "start": start, "time": time.time(), **more}
    content = json.dumps(status, indent=2).encode() + b"\n"
    try:
        files.write_atomically(run / "status.json", content, allowed=lambda: check_newest(run, start))
    except OSError as error:
        errors.say(f"{run / 'status.json'}: {error.strerror}: lost: {json.dumps(status)}", "WARNING: ")


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what status.json shows of a start or stop in the ledger."""
    if entry["event"] == "start":
        return {"state": "running", "exit_code": None}
    more = {"reason": entry["why"], "disk": entry.get("disk")}
    return {"state": entry["state"], "exit_code": entry["exit_code"], **{name: value for name, value in more.items() if value}}


def record_start(claim: Claim, step: int, world_size: int, total: int | None = None) -> None:
    """Record that a start goes on from `step` of `total`. Also record what was lost since the last sign of life before.

    Also on how many machines, and `by` what, which says how it is typed again. Raises TakenOverError when a later start holds
    the folder.
    """
    claim.check()
    before, nodes = heartbeat(claim.run), world_size // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and errors.LAST_WORD not in os.environ
    record_event(
        claim.run, "start", generation=claim.generation, host=socket.gethostname(), pid=os.getpid(),
        job=job_id(), cluster=os.environ.get("SLURM_CLUSTER_NAME"), restart=str(restart_count()),
        world_size=world_size, nodes=nodes, by="torchrun" if by_torchrun else "simclr-dist", step=step, total=total,
        steps_lost=max(0, before.get("step", 0) - step), seconds_down=time.time() - before["time"] if before else 0.0,
    )  # fmt: skip
    claim.beat(step)


def record_end(run: Path, generation: int, end: End, **more: Any) -> None:
    """Record how a start ended, once, and show it in status.json."""
    # The first word stands: a rank that says why it ends breaks the others' connections, and two parents may see one death.
    with _ledger_locked(run):
        stop = next((line for line in _stops(run) if line.get("generation") == generation), None)
        if stop is None:
            marks = {mark: True for mark in ("lost", "disk") if getattr(end, mark)}
            more = {"step": heartbeat(run).get("step", 0), "generation": generation, **more, **marks}
            stop = _append(run, "stop", state=end.state, exit_code=end.code, why=end.why, **more)
        with suppress(errors.TakenOverError):
            write_status(run, start=generation, **_shown(stop))


@contextmanager
def recorded(run: Path, claim: Claim | None) -> Iterator[None]:
    """Record how the block ends: done, preempted, failed, diverged or crashed. Until then status.json says running.

    `claim` is rank 0's. The other ranks record only what no other rank has seen.
    """
    began, error = time.monotonic(), None
    try:
        if claim is not None:
            write_status(run, "running", None, start=claim.generation)
        yield
    except BaseException as raised:  # however it ends, this is told
        error = raised
        raise
    finally:
        if isinstance(error, errors.TakenOverError):
            pass  # the folder, with its status, belongs to the other start
        elif claim is not None:
            claim.check()  # one that was left behind ends somehow, and must not say so in the other start's folder
            notice = {} if (at := signals.requested_at()) is None else {"asked": at}
            seconds = time.monotonic() - began
            record_end(run, claim.generation, end_of(error), step=claim.step, seconds=seconds, **notice)
            claim.beat(claim.step, ended=True)
            claim.release()
        elif isinstance(error, errors.RankError):
            # A network disk may show an old list of starts.
            record_end(run, max(newest_start(run), heartbeat(run).get("generation", 0)), end_of(error))


def note_death(run: Path) -> None:
    """Record the end of a start that was killed before it could. For a parent that outlives it."""
    generation = newest_start(run)  # before the status is read: a start that comes later has not died
    if read_status(run).get("state") == "running" and is_dead(run):
        record_end(run, generation, End("crashed", 1, "ended without a word: killed, or cut off", lost=True))


def name_cause(run: Path, earlier: int, why: str) -> None:
    """Show `why` in status.json. Do so if the last start is later than number `earlier` and only knows it lost a rank."""
    for stop in _stops(run)[-1:]:
        if earlier < stop.get("generation", 0) and stop.get("lost"):
            with suppress(errors.TakenOverError):
                write_status(run, "crashed", 1, start=stop["generation"], reason=why)


def _stops(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_ledger(run) if line["event"] == "stop"]


@contextmanager
def _ledger_locked(run: Path) -> Iterator[None]:
    """Keep other processes out of the ledger, where its disk has locks."""
    with ExitStack() as held:
        with suppress(OSError):  # no locks there, or a full disk
            file = held.enter_context((run / "ledger.jsonl").open("ab"))
            until = time.monotonic() + _LOCK_SECONDS
            while not files.lock(file.fileno()) and time.monotonic() < until:
                time.sleep(0.05)
        yield


def _event(value: Any) -> dict[str, Any]:
    event = files.fitting(value, _EVENT)
    return files.fitting(event, _MORE_OF_EVENT.get(event["event"], {}))


def _content(path: Path) -> bytes:
    with suppress(OSError):  # most often there is none; a start refuses what it cannot read
        return path.read_bytes()
    return b""
