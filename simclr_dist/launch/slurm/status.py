"""Describe a submitted run: its jobs' states in SLURM beside its card. Note an end that SLURM alone knows."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.convert.partial import Partial
from simclr_dist.evaluate.compare import compare
from simclr_dist.evaluate.status import card, shown
from simclr_dist.launch.slurm import scheduler
from simclr_dist.launch.slurm.submission import jobs_of, original_of
from simclr_dist.run.claim import is_dead
from simclr_dist.run.status import note_death, outlook, read_ledger, record_event
from simclr_dist.system.errors import ConfigError, DataError

_LINES = 5  # of the ledger


def describe(run: Path, record: Mapping[str, Any]) -> str:
    """Return SLURM's word on the jobs, beside a run's card. `record` is its submission.json."""
    jobs = jobs_of(record)
    states = dict(zip(jobs.values(), scheduler.states(list(jobs.values())), strict=True))
    if (origin := original_of(run, record)) is None:
        note_end(run, states)
    copied = f"; it was submitted for {origin[0]}, which is another folder" if origin else ""
    damaged: list[str] = []
    history = read_ledger(run, report=damaged.append)
    lines = [(title, f"{job}: {states[job]}{copied}") for title, job in jobs.items()]
    reasons = Counter(str(entry.get("why")) for entry in history if entry["event"] == "requeued")
    lines += [("requeued", f"{times} x: {why}") for why, times in reasons.items()]
    for title, entry in zip(["ledger"] + [""] * _LINES, history[-_LINES:], strict=False):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        details = (f"{key}={value}" for key, value in entry.items() if key not in ("time", "event") and value is not None)
        lines.append((title, f"{when} {entry['event']} {' '.join(details)}"))
    if "tasks" in record:
        if whole := Partial(run.with_suffix("")).whole_files():
            lines.append(("unfinished", f"{whole} pieces are whole"))
        return shown(run, [*lines, *(("damaged", line) for line in damaged)])
    try:
        return shown(run, [*lines, *card(compare([run]).rows[0])])
    except DataError as error:  # which does not take away SLURM's word
        return shown(run, [*lines, ("damaged", str(error))])


def note_end(run: Path, states: Mapping[str, scheduler.JobState] | None = None) -> None:
    """Record the end of a training's job that nobody else could record. `states` are those that are known already.

    `scancel` takes a waiting job out of the queue before anything of ours has run, and KillWait after it the ranks of another
    are killed. SLURM alone knows of both, so whoever looks at the run writes it down: a watcher, `submit status` and `cancel`.
    """
    job = outlook(run).job
    if job is None or not scheduler.JOB_NUMBER.fullmatch(job) or not os.access(run / "ledger.jsonl", os.W_OK):
        return  # nobody's job; or another user's run
    with suppress(ConfigError):  # a damaged folder of starts, which the next start refuses
        if not is_dead(run):
            return
        state = (states or {}).get(job) or scheduler.state(job)
        if not (state.over and scheduler.cluster() in _clusters(run, job)):
            return
        note_death(run)
        record_event(  # unless somebody has submitted the run again in the meantime
            run, "gave_up", only_if=lambda: outlook(run).job == job, kind="train", job=job, why=f"job {job}: {state}"
        )


def _clusters(run: Path, job: str) -> set[str]:
    """Return the clusters that the ledger names for a job."""
    return {name for entry in read_ledger(run) if entry.get("job") == job and (name := entry.get("cluster"))}
