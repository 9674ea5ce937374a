"""Sum up a run folder. It reads files only, so the run may be at work, on another machine, or long gone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from simclr_dist.config.load import config_from_dict
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_settings
from simclr_dist.run.claim import heartbeat, is_dead
from simclr_dist.run.folder import newest_step, read_metrics, stored_config
from simclr_dist.run.status import Outlook, outlook, read_ledger
from simclr_dist.system.progress import clock

_WORDS = {"submitted": "waiting", "requeued": "waiting", "preempted": "paused"}
_MARKS = ("starts", "status.json", "submission.json")  # a run folder has one; config.yaml may lie anywhere


@dataclass(frozen=True)
class Summary:
    """What a run folder says of its run. `total` is None where nothing says it, `config` before it was submitted.

    `rank_hours`: of all starts, each with its number of ranks. A rank is one GPU, or one process on CPUs.
    """

    run: Path
    config: Config | None
    outlook: Outlook
    step: int
    total: int | None
    metrics: dict[str, float]  # the newest, and the median speed of the last
    rank_hours: float
    last: Mapping[str, Any]  # start, its line of the ledger; {} before the first

    @property
    def standing(self) -> str:
        """Return the state in a word, with its reason behind a colon."""
        end, word = self.outlook, _WORDS.get(self.outlook.state, self.outlook.state)
        if end.over and end.reason and end.reason.startswith(("cancelled", "given up")):
            return end.reason
        reason = end.reason or (word == "waiting" and f"SLURM job {end.job}")
        return f"{word}: {reason}" if reason else word

    @property
    def state(self) -> str:
        """Return the word alone."""
        return self.standing.partition(":")[0]

    @property
    def left(self) -> str:
        """Return the time left at the last speed, if it is known."""
        speed = self.metrics.get("speed/images_per_second", 0.0)
        if self.outlook.state != "running" or self.total is None or self.config is None or speed <= 0:
            return ""
        return clock((self.total - self.step) * self.config.global_batch_size / speed)


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's, begun or submitted."""
    return any((folder / mark).exists() for mark in _MARKS)


def summarise(run: Path) -> Summary:
    """Read what a run folder says. Raises ConfigError and DataError for a damaged one."""
    config = stored_config(run)
    if config is None and (submitted := run / "slurm" / "config.yaml").is_file():
        config = config_from_dict(read_settings(submitted, "config", "submit the run anew"), str(submitted))
    end = outlook(run)
    if end.state == "running" and is_dead(run):
        end = Outlook("killed", "ended without a word; the same command goes on")
    lines = read_metrics(run, last=True)
    metrics = {name: value for line in lines for name, value in line.items()}  # some are not of every line
    if speeds := [line["speed/images_per_second"] for line in lines if "speed/images_per_second" in line]:
        metrics["speed/images_per_second"] = median(speeds)
    step = max(int(heartbeat(run).get("step", 0)), newest_step(run))
    ledger = read_ledger(run)
    last: dict[str, Any] = next((entry for entry in reversed(ledger) if entry["event"] == "start"), {})
    total = step if end.state == "done" else last.get("total") or (config.steps if config else None) or _reckoned(metrics)
    return Summary(run, config, end, step, total, metrics, _rank_seconds(run, ledger) / 3600, last)


def loss_of(metrics: Mapping[str, float]) -> float | None:
    """Return the loss of a logged step, whichever the run has."""
    return metrics.get("loss/nt_xent", metrics.get("loss/dcl"))


def learning(metrics: Mapping[str, float]) -> tuple[str, str]:
    """Show the loss beside chance. Show also how many views have their partner as the nearest."""
    loss, chance = f"{loss_of(metrics):.4f}", f"{metrics.get('loss/chance', 0.0):.2f}"
    return f"loss {loss} (chance {chance})", f"partner nearest {100 * metrics.get('retrieval/top1', 0.0):.0f} %"


def _reckoned(metrics: Mapping[str, float]) -> int | None:
    """Reckon all steps of a run from its log. Ledgers of older versions do not say them."""
    left, each = metrics.get("speed/seconds_left"), metrics.get("speed/step_ms")
    return None if left is None or not each else round(metrics["step"] + 1000 * left / each)


def _rank_seconds(run: Path, ledger: Sequence[dict[str, Any]]) -> float:
    """Add up the seconds of all starts, each times its ranks. A killed start counts to its last sign of life."""
    starts = [entry for entry in ledger if entry["event"] == "start"]
    stops = {entry.get("generation"): entry for entry in ledger if entry["event"] == "stop"}
    total = 0.0
    for start, after in zip_longest(starts, starts[1:]):
        seconds = _number(stops.get(start.get("generation"), {}), "seconds")
        if seconds is None:
            down = after and _number(after, "seconds_down")
            last = after["time"] - down if after and down is not None else heartbeat(run).get("time", 0.0)
            seconds = last - start["time"]
        total += max(0.0, seconds) * (_number(start, "world_size") or 1)
    return total


def _number(entry: dict[str, Any], name: str) -> float | None:
    return value if isinstance(value := entry.get(name), int | float) and abs(value) < 1e11 else None
