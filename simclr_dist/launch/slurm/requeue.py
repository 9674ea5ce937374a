"""Decide whether a SLURM job that ended early starts again; requeue it. Without torch, for parents and batch scripts."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simclr_dist.convert.partial import Partial
from simclr_dist.launch.slurm import scheduler
from simclr_dist.run.folder import newest_step
from simclr_dist.run.restarts import Ended, decide
from simclr_dist.run.status import cancelled_jobs, note_death, read_ledger, read_status, record_event
from simclr_dist.system.errors import PREEMPTED
from simclr_dist.system.slurm_job import restart_count

Kind = Literal["train", "eval", "work"]


@dataclass(frozen=True)
class Verdict:
    """The fate of a job, and the reason. `code` is the exit code of one that ends."""

    final: bool
    why: str
    crash: bool = False
    code: int = PREEMPTED


def settle(run: Path, kind: Kind, job: str, code: int, max_restarts: int) -> Verdict:
    """Decide for a task that ended with `code`. Record a decision to give up.

    Stopped and crashed jobs go on as `restarts.decide` has it; an evaluation's results count as a training's checkpoints do,
    and a conversion's whole files. User errors, divergence and a cancelled job are final.
    """
    fate = scheduler.overtaken(job)
    if fate == "cancelled" or job in cancelled_jobs(run):
        return Verdict(True, "cancelled", code=code)
    ends, given_up, waited = _earlier(run, kind, job)
    if given_up is not None:  # by a task of this start, and the batch script asks after it
        return Verdict(True, given_up, code=code)
    if fate == "requeued":
        return Verdict(False, "SLURM has requeued it: preempted, a node lost, or asked to")
    status: dict[str, Any] = {}
    if kind == "train":
        note_death(run)
        # The status of an earlier start does not count: then the ranks of this one did not get so far as to write theirs.
        status = last if (last := read_status(run)).get("time", 0.0) > _began() else {}
    why = str(status.get("reason", f"a task of the {kind} job ended with {code}"))
    if status.get("state") == "done":
        return Verdict(True, "done", code=0)  # what came after, on the way out, does not count
    # The highest code of all tasks is what srun passes on: one rank's error can hide behind another's 75.
    if code in (2, 3) or status.get("state") in ("failed", "diverged"):
        if kind != "train":  # which has its status.json: the other ranks, which this end stops, must know
            record_event(run, "gave_up", kind=kind, job=job, restart=str(restart_count()), why=why)
        return Verdict(True, why, code=status.get("exit_code") or code)
    crash = code != PREEMPTED
    if not (crash or status):
        why = "stopped"
    saved = _progress(run, kind, job)
    decision = decide([*ends, Ended(crash, saved, disk=status.get("disk", False), waited=waited)], max_restarts)
    if not decision.again:
        times = max(1, decision.fruitless)
        what = f"{times} {'crashes' if crash else 'stops'} in a row at step {saved}; the last: {why}"
        record_event(run, "gave_up", kind=kind, job=job, restart=str(restart_count()), why=what)
        return Verdict(True, what, crash, code)
    return Verdict(False, why, crash)


def go_on(run: Path, kind: Kind, job: str, verdict: Verdict, *, one_of_many: bool) -> str | None:
    """Have the job requeued. Return None when it is, otherwise why not.

    Of `one_of_many` tasks one asks for all; the others return at once.
    """
    restart = str(restart_count())
    mark = run / "slurm" / f"{job}-{restart}.requeued"
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        if one_of_many:
            return None  # but the batch script asks again: the task that made the mark may have died before SLURM heard it
    else:
        starts = (entry for entry in read_ledger(run) if (entry["event"], entry.get("job")) == ("start", job))
        if any(_restart(entry) > restart_count() for entry in starts):
            return None  # we were left behind: what we add now would stand behind the new start
        more: dict[str, Any] = {"why": verdict.why, "crash": verdict.crash, "saved": _progress(run, kind, job)}
        record_event(run, "requeued", kind=kind, job=job, restart=restart, **more)
    if refused := scheduler.requeue(job):
        record_event(run, "requeue_refused", kind=kind, job=job, why=refused)
    return refused


def jobs_folder(product: Path) -> Path:
    """Return where the jobs that make `product` keep their files. It is what a run folder is for a training."""
    return product.with_name(f"{product.name}.jobs")


def _progress(run: Path, kind: Kind, job: str) -> int:
    if kind == "work":  # `run` is DST's jobs_folder, and a part has the number of its task
        return Partial(run.with_suffix("")).whole_files(int(job.partition("_")[2] or 0))
    return newest_step(run) if kind == "train" else len(list((run / "eval").glob("*.json")))


def _earlier(run: Path, kind: Kind, job: str) -> tuple[list[Ended], str | None, bool]:
    """Return the ends of the job's earlier starts, oldest first. Return also what the ledger knows of this one.

    That is why it was given up, if it was, and whether it has waited. Only ends since the job was last given up count. The
    launcher of a batch script without submitit gives up too, at every start: that names no job. It is one crash of the job, and
    no more.
    """
    ends: list[Ended] = []
    waited, newest = False, 0
    for entry in read_ledger(run):
        if (entry.get("job"), entry.get("kind")) == (job, kind) and _restart(entry, newest) >= newest:
            newest = _restart(entry, newest)
            now = entry.get("restart") == str(restart_count())
            if entry["event"] == "gave_up":
                if now:
                    return ends, str(entry["why"]), waited
                ends.clear()
            elif entry["event"] == "requeued" and not now:
                ends.append(Ended(entry["crash"], entry["saved"], waited=waited))
                waited = False
            waited = waited or entry["event"] == "waiting"
    return ends, None, waited


def _restart(entry: Mapping[str, Any], unknown: int = 0) -> int:
    """Return the number of the job's start that a line is of."""
    return int(text) if (text := str(entry.get("restart"))).isdecimal() else unknown


def _began() -> float:
    """Return when this process started. It is a task, or runs in the place of a batch script."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
