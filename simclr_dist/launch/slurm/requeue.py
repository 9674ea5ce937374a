"""Whether a SLURM job that ended early starts again, and that it does; without torch, for parents and batch scripts."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simclr_dist.launch.slurm import scheduler
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import newest_step, note_death, read_status
from simclr_dist.system.errors import PREEMPTED

Kind = Literal["train", "eval"]

# Stops in a row that brought nothing new, as under a time limit that is shorter than the start takes.
MAX_IDLE_STOPS = 20


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job, and why; `code` is that of a job that ends."""

    final: bool
    why: str
    crash: bool = False
    code: int = PREEMPTED


def settle(run: Path, kind: Kind, job: str, code: int, max_restarts: int) -> Verdict:
    """Decide for a task that ended with `code`, and record a decision to give up.

    Stopped jobs go on, and crashed ones too, until `max_restarts` crashes in a row have come without a new checkpoint (or,
    in an evaluation, result). User errors, divergence and a cancelled job are final.
    """
    fate = scheduler.overtaken(job)
    if fate == "cancelled" or job in ledger.cancelled_jobs(run):
        return Verdict(True, "cancelled", code=code)
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    for entry in ledger.entries(run):  # a task has decided already, and the batch script asks after it
        if entry["event"] == "gave_up" and (entry.get("job"), entry.get("restart")) == (job, restart):
            return Verdict(True, entry["why"], code=code)
    if fate == "requeued":
        return Verdict(False, "SLURM has requeued it: preempted, a node lost, or asked to")
    status = _status(run) if kind == "train" else {}
    why = str(status.get("reason", f"a task of the {kind} job ended with {code}"))
    if status.get("state") == "done":
        return Verdict(True, "done", code=0)  # what came after, on the way out, does not count
    # The highest code of all tasks is what srun passes on: one rank's error can hide behind another's 75.
    if code in (2, 3) or status.get("state") in ("failed", "diverged"):
        return Verdict(True, why, code=status.get("exit_code") or code)
    crash = code != PREEMPTED
    if not crash:
        why = why if status else "stopped"
    fruitless, most = _fruitless(run, kind, crash=crash), max_restarts if crash else MAX_IDLE_STOPS
    if fruitless >= most:
        what = f"{fruitless + 1} {'crashes' if crash else 'stops'} in a row at step {_progress(run, kind)}; the last: {why}"
        ledger.record(run, "gave_up", kind=kind, job=job, restart=restart, why=what)
        return Verdict(True, what, crash, code)
    return Verdict(False, why, crash)


def go_on(run: Path, kind: Kind, job: str, verdict: Verdict, *, one_of_many: bool) -> bool:
    """Have the job requeued; returns whether it is, or (`one_of_many` tasks) is being, by us or another."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    mark = run / "slurm" / f"{job}-{restart}.requeued"
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if one_of_many:
            return True
        # The batch script, after all tasks have ended: whoever made the mark may have been killed before he was heard.
    else:
        ledger.record(run, "requeued", kind=kind, job=job, why=verdict.why, crash=verdict.crash, saved=_progress(run, kind))
    if refused := scheduler.requeue(job):
        ledger.record(run, "requeue_refused", kind=kind, job=job, why=refused)
        return False
    return True


def _progress(run: Path, kind: Kind) -> int:
    return newest_step(run) if kind == "train" else len(list((run / "eval").glob("*.json")))


def _fruitless(run: Path, kind: Kind, *, crash: bool) -> int:
    """Crashes, or stops, since the last start that brought something new."""
    saved, count = _progress(run, kind), 0
    for entry in reversed(ledger.entries(run)):
        if entry["event"] in ("submitted", "gave_up"):
            break
        if entry["event"] == "requeued" and entry["kind"] == kind:
            if entry["saved"] != saved:
                break
            count += entry["crash"] == crash
    return count


def _status(run: Path) -> dict[str, Any]:
    """What became of the run in this start; {} when the ranks did not get so far as to say."""
    note_death(run)
    status = read_status(run)
    return status if status.get("time", 0.0) > _began() else {}


def _began() -> float:
    """When this process started: a task's, or the batch script's in whose place it runs."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
