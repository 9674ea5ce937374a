"""How a submitted run stands: its jobs as SLURM sees them, its steps, and its ledger."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simclr_dist.config.load import load_config
from simclr_dist.data.collection import load_collection
from simclr_dist.launch.slurm import scheduler
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import read_status
from simclr_dist.system.errors import UserError

_LINES = 5  # of the ledger


def describe(run: Path, record: Mapping[str, Any]) -> str:
    """The answer to `submit status`, of a run folder and its submission.json."""
    jobs = [job for job in (record["job_id"], record["eval_job_id"]) if job is not None]
    found = scheduler.states(jobs)
    history = ledger.entries(run)
    lines = [str(run), f"  job         {jobs[0]}: {found[0]}", f"  run         {_progress(run, record)}"]
    starts = [entry for entry in history if entry["event"] == "start"]
    lost = sum(entry.get("steps_lost", 0) for entry in starts)
    lines.append(f"  starts      {len(starts)}, {lost} steps lost between them{_why_again(history)}")
    if len(jobs) > 1:
        lines.append(f"  evaluation  {jobs[1]}: {found[1]}")
    for title, entry in zip(["ledger"] + [""] * _LINES, history[-_LINES:], strict=False):
        lines.append(f"  {title:11} {_line(entry)}")
    return "\n".join(lines)


def _progress(run: Path, record: Mapping[str, Any]) -> str:
    status, beat = read_status(run), ledger.heartbeat(run)
    if not status:
        return "has not started"
    parts = [f"{status['state']} ({status['reason']})" if status.get("reason") else str(status["state"])]
    if beat:
        total = _total_steps(run, record)
        parts.append(f"step {beat['step']}" + (f" of {total} ({100 * beat['step'] / total:.1f} %)" if total else ""))
    if (metrics := _last_metrics(run)).get("loss/nt_xent") is not None:
        parts.append(f"loss {metrics['loss/nt_xent']:.4f} at step {metrics['step']}")
    if beat:
        parts.append(f"last heard of {_ago(time.time() - beat['time'])} ago")
    return ", ".join(parts)


def _total_steps(run: Path, record: Mapping[str, Any]) -> int | None:
    try:
        config = load_config(run / "slurm" / "config.yaml")
        samples = config.data.samples or 0
        if config.steps is None and not samples:
            samples = len(load_collection(config.data.shards, beside=record["working_directory"]))
    except UserError:  # the data may be gone, or on another machine
        return None
    return config.total_steps(samples)


def _last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; {} when there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 65536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            metrics: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        return metrics
    return {}


def _why_again(history: list[dict[str, Any]]) -> str:
    reasons = Counter(str(entry.get("why")) for entry in history if entry["event"] == "requeued")
    return "".join(f"; requeued {times} x: {why}" for why, times in reasons.items())


def _line(entry: Mapping[str, Any]) -> str:
    """A line of the ledger, for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    told = (f"{key}={value}" for key, value in entry.items() if key not in ("time", "event") and value is not None)
    return f"{when} {entry['event']} {' '.join(told)}"


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
