"""Describe a submitted run: its jobs' states in SLURM, steps, and ledger. Note an end that SLURM alone knows."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.config.load import config_from_dict
from simclr_dist.config.strict_yaml import read_settings
from simclr_dist.data.collection import count_images
from simclr_dist.launch.slurm import scheduler
from simclr_dist.launch.slurm.submission import original_of
from simclr_dist.run.claim import heartbeat, is_dead
from simclr_dist.run.folder import read_metrics
from simclr_dist.run.status import note_death, outlook, read_ledger, read_status, record_event
from simclr_dist.system.errors import ConfigError, UserError, printable

_LINES = 5  # of the ledger


def describe(run: Path, record: Mapping[str, Any]) -> str:
    """Return the answer to `submit status`; `record` is the run's submission.json."""
    jobs = [job for job in (record["job_id"], record["eval_job_id"]) if job is not None]
    states = scheduler.states(jobs)
    if (origin := original_of(run, record)) is None:
        note_end(run, dict(zip(jobs, states, strict=True)))
    copied = f"; it was submitted for {origin[0]}, which is another folder" if origin else ""
    damaged: list[str] = []
    history = read_ledger(run, report=damaged.append)
    lines = [str(run), f"  job         {jobs[0]}: {states[0]}{copied}", f"  run         {_progress(run, record)}"]
    starts = [entry for entry in history if entry["event"] == "start"]
    lost = sum(entry.get("steps_lost", 0) for entry in starts)
    reasons = Counter(str(entry.get("why")) for entry in history if entry["event"] == "requeued")
    again = "".join(f"; requeued {times} x: {why}" for why, times in reasons.items())
    lines.append(f"  starts      {len(starts)}, {lost} steps lost between them{again}")
    if len(jobs) > 1:
        lines.append(f"  evaluation  {jobs[1]}: {states[1]}")
    for title, entry in zip(["ledger"] + [""] * _LINES, history[-_LINES:], strict=False):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        details = (f"{key}={value}" for key, value in entry.items() if key not in ("time", "event") and value is not None)
        lines.append(f"  {title:11} {when} {entry['event']} {' '.join(details)}")
    lines += (f"  damaged     {line}" for line in damaged)
    return "\n".join(map(printable, lines))


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


def _progress(run: Path, record: Mapping[str, Any]) -> str:
    status, beat = read_status(run), heartbeat(run)
    if not status:
        return "has not started"
    parts = [f"{status['state']} ({status['reason']})" if status.get("reason") else str(status["state"])]
    if beat:
        total = _total_steps(run, record)
        parts.append(f"step {beat['step']}" + (f" of {total} ({100 * beat['step'] / total:.1f} %)" if total else ""))
    metrics = (read_metrics(run, last=True) or [{}])[-1]
    if "loss/nt_xent" in metrics:
        parts.append(f"loss {metrics['loss/nt_xent']:.4f} at step {metrics['step']}")
    if beat:
        parts.append(f"last heard of {_ago(time.time() - beat['time'])} ago")
    return ", ".join(parts)


def _total_steps(run: Path, record: Mapping[str, Any]) -> int | None:
    path = run / "slurm" / "config.yaml"
    try:
        config = config_from_dict(read_settings(path, "config", "submit the run anew"), str(path))
        if config.steps is not None:
            return config.steps
        return config.total_steps(count_images(config.data.shards, config.data.samples, beside=record["working_directory"]))
    except UserError:  # the data may be gone, or on another machine
        return None


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
