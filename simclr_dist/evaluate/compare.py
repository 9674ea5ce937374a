"""Compare runs: what differs between them, and what came of it. It reads run folders only."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simclr_dist.config.strict_yaml import leaves, spell
from simclr_dist.evaluate.result.charts import Series
from simclr_dist.evaluate.result.curves import comparable, curves
from simclr_dist.evaluate.result.file import NAMES, TRAINED, Result, read_result, title
from simclr_dist.run.folder import read_metrics
from simclr_dist.run.steps import step_name, steps_in
from simclr_dist.run.summary import Summary, is_run, loss_of, summarise
from simclr_dist.system.errors import DataError, UserError, printable, reason_of

_DEPTH = 3  # folders below the one that was named
_WIDEST = 40  # characters of a setting in the table
PROBE = "probe/knn_top1"
_NUMBERS = (
    ("probe %", PROBE, ".2f"), ("loss", "loss/nt_xent", ".4f"), ("loss (DCL)", "loss/dcl", ".4f"),
    ("images/s", "speed/images_per_second", ".0f"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A run among others. `accuracy`: of each protocol top-1 in percent by step, measured as the newest was.

    `measured`: of each protocol how, in two texts. The first is one where numbers can be compared, the second is for people.
    """

    name: str
    summary: Summary
    accuracy: dict[str, dict[int, float]] = field(default_factory=dict)
    measured: dict[str, tuple[str, str]] = field(default_factory=dict)

    def steps(self, protocol: str) -> tuple[int, int] | None:
        """Return the steps of the newest and of the best accuracy. None where there is none."""
        by_step = self.accuracy.get(protocol)
        return (max(by_step), max(by_step, key=lambda step: (by_step[step], step))) if by_step else None


@dataclass(frozen=True)
class Comparison:
    """Runs, and the settings that differ between them. `passed_over` has a line for each folder that is not among them."""

    rows: list[Row]
    settings: dict[str, list[Any]]  # by dotted key, a value a row
    passed_over: list[str]

    @property
    def protocols(self) -> list[str]:
        """Return the protocols that some run was evaluated by."""
        names = dict.fromkeys(name for row in self.rows for name in row.accuracy)
        return [name for protocol in NAMES for name in names if name.partition("@")[0] == protocol]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read the runs in `folders`: run folders, or folders of them. Raises DataError where there is none."""
    lines: list[str] = []
    runs = list(dict.fromkeys(run for folder in folders for run in _runs(Path(folder), lines)))
    summaries = []
    for run in runs:
        try:
            summaries.append(summarise(run))
        except (UserError, OSError) as error:
            lines.append(f"{run}: passed over: {reason_of(error)}")
    if not summaries:
        raise DataError(lines[0] if len(lines) == 1 else f"{', '.join(map(str, folders))}: no run folder that can be read")
    common = os.path.commonpath([one.run.absolute().parent for one in summaries])
    rows = [_row(os.path.relpath(one.run.absolute(), common), one, lines.append) for one in summaries]
    return Comparison(rows, _differing(summaries), lines)


def _runs(folder: Path, lines: list[str], depth: int = 0) -> list[Path]:
    try:
        if not folder.is_dir():
            why = "is no folder" if folder.exists() else "no such folder"
            lines.append(f"{folder}: {why}; name a run folder, or a folder of them")
            return []
        if is_run(folder):
            return [folder]
        below = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "slurm"]
    except OSError as error:  # another user's, say
        lines.append(f"{folder}: passed over: {error.strerror}")
        return []
    inside = [run for path in sorted(below, key=_natural) for run in _runs(path, lines, depth + 1)] if depth < _DEPTH else []
    if not inside and depth < 2:
        lines.append(f"{folder}: passed over: no run folder, and none in it")
    return inside


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key for sorting: seed=9 stands before seed=10."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", path.name)]


def _row(name: str, summary: Summary, say: Callable[[str], None]) -> Row:
    folder = summary.run / "eval"
    steps = steps_in(folder, ".json")
    newest: Result = {}
    while steps and not newest:  # which may be of a foreign format, or damaged
        path = folder / step_name(steps.pop(), ".json")
        try:
            newest = read_result(path)
        except DataError as error:
            say(str(error))
    if not newest or newest["settings"]["layer"] != "h":
        return Row(name, summary)
    accuracy: dict[str, dict[int, float]] = {}
    for step, (protocols, _) in sorted(comparable(folder, newest).items()):
        for protocol, part in protocols.items():
            accuracy.setdefault(protocol, {})[step] = part["results"][TRAINED]["top1"]
    sets = [f"{newest[part].get('labelled', '?')} images of {newest[part].get('folder', '?')}" for part in ("test", "train")]
    images = f"{sets[0]}, {newest['classes']} classes, learnt from {sets[1]}"
    measured = {}
    for protocol, values in curves(newest).items():
        settings = (f"{key} {value}" for key, value in newest["protocols"][protocol]["settings"].items())
        measured[protocol] = json.dumps(values), f"{images}; {', '.join(settings)}"
    return Row(name, summary, accuracy, measured)


def _differing(summaries: Sequence[Summary]) -> dict[str, list[Any]]:
    """Return the settings that differ. A run folder does so always, and says nothing."""
    flat = [dict(leaves(one.config.to_dict())) if one.config else {} for one in summaries]
    keys = dict.fromkeys(key for settings in flat for key in settings if key != "run_folder")
    return {key: [settings.get(key) for settings in flat] for key in keys if len({repr(one.get(key)) for one in flat}) > 1}


def table(comparison: Comparison) -> str:
    """Format the comparison for people. Lines below say what its numbers are of."""
    rows, kinds = comparison.rows, {protocol: _kinds(comparison, protocol) for protocol in comparison.protocols}
    columns = [
        ("run", [row.name for row in rows]),
        ("state", [row.summary.state for row in rows]),
        ("steps", [f"{row.summary.step}/{'?' if row.summary.total is None else row.summary.total}" for row in rows]),
        ("left", [row.summary.left for row in rows]),
        *((f"{title(protocol)} %", [_accuracy(row, protocol, kinds[protocol]) for row in rows]) for protocol in kinds),
        *((title, [_number(row.summary.metrics.get(name), form) for row in rows]) for title, name, form in _NUMBERS),
        ("rank-h", [f"{row.summary.rank_hours:.3g}" for row in rows]),
        # Behind the results: many may differ, and a terminal breaks the lines.
        *((short(key, comparison), [_cut(spell(value)) for value in values]) for key, values in comparison.settings.items()),
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    widths = [max(map(len, (title, *cells))) for title, cells in columns]
    grid = zip(*([title, *cells] for title, cells in columns), strict=True)
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in grid]
    lines += [f"{row.name}: {row.summary.standing}" for row in rows if row.summary.standing != row.summary.state]
    for protocol, letters in kinds.items():
        texts = {row.measured[protocol][0]: row.measured[protocol][1] for row in reversed(rows) if protocol in row.measured}
        lines += [f"{f'{title(protocol)} {letter}'.strip()}: {texts[how]}" for how, letter in letters.items()]
        if len(letters) > 1:
            lines.append(f"WARNING: {title(protocol)}: numbers with different letters cannot be compared")
    return printable("\n".join([*lines, *comparison.passed_over]), keep="\n")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _kinds(comparison: Comparison, protocol: str) -> dict[str, str]:
    """Return how a protocol was measured, each way with its letter. One alone has none."""
    ways = list(dict.fromkeys(row.measured[protocol][0] for row in comparison.rows if protocol in row.measured))
    return {how: chr(ord("a") + number % 26) if len(ways) > 1 else "" for number, how in enumerate(ways)}


def _accuracy(row: Row, protocol: str, kinds: dict[str, str]) -> str:
    """Show the newest accuracy, and the best where that is another. `kinds` has the letter of how it was measured."""
    if (steps := row.steps(protocol)) is None:
        return ""
    shown = [f"{row.accuracy[protocol][step]:.2f} @{step}" for step in dict.fromkeys(steps)]
    return f"{', best '.join(shown)} {kinds.get(row.measured[protocol][0], '')}".rstrip()


def accuracies(row: Row) -> str:
    """Show a run's accuracies in percent, by protocol."""
    return ", ".join(f"{title(protocol)} {_accuracy(row, protocol, {})}" for protocol in row.accuracy)


def short(key: str, comparison: Comparison) -> str:
    """Return a key's last part. Return all of it where two share that."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in comparison.settings) > 1 else last


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"...{text[3 - _WIDEST :]}"


def as_csv(comparison: Comparison) -> str:
    """Format the comparison for programs: a line a run, numbers in full."""
    lines = []
    for number, row in enumerate(comparison.rows):
        one = row.summary
        line: dict[str, Any] = {"run": str(one.run), "state": one.outlook.state, "reason": one.outlook.reason}
        line |= {"step": one.step, "total_steps": one.total}
        line["epochs"] = one.step / one.total * one.config.epochs if one.config and one.config.epochs and one.total else None
        line |= {key: spell(values[number]) for key, values in comparison.settings.items()}
        for protocol in comparison.protocols:
            for which, step in zip(("newest", "best"), row.steps(protocol) or (None, None), strict=True):
                accuracy = None if step is None else row.accuracy[protocol][step]
                line |= {f"{protocol}_{which}": accuracy, f"{protocol}_{which}_step": step}
            line[f"{protocol}_measured"] = row.measured.get(protocol, (None, None))[1]
        line |= {name: one.metrics.get(name) for _, name, _ in _NUMBERS}
        lines.append({**line, "rank_hours": one.rank_hours})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def curves_of(comparison: Comparison, axis: str) -> Mapping[str, Series]:
    """Return a picture's curves by title: losses, and accuracies if any. `axis`: steps, images or hours."""
    losses: dict[str, list[tuple[float, float]]] = {}
    accuracies: dict[str, list[tuple[float, float]]] = {}
    protocol = next((name for name in ("linear", "knn", *NAMES) if name in comparison.protocols), None)
    for row in comparison.rows:
        lines = read_metrics(row.summary.run)
        places = _places(row.summary, lines, axis)
        losses[row.name] = [(places[int(line["step"])], loss) for line in lines if (loss := loss_of(line)) is not None]
        by_step = (
            row.accuracy.get(protocol, {}) if protocol else {int(line["step"]): line[PROBE] for line in lines if PROBE in line}
        )
        nearest = {step: min((abs(logged - step), logged) for logged in places)[1] for step in by_step if places}
        accuracies[row.name] = [(places[logged], by_step[step]) for step, logged in sorted(nearest.items())]
    which = f"{title(protocol)} top-1, %" if protocol else "online kNN probe, top-1 %"
    return {"loss": losses} | ({which: accuracies} if any(accuracies.values()) else {})


def _places(summary: Summary, lines: Sequence[dict[str, float]], axis: str) -> dict[int, float]:
    """Return where each logged step stands on the axis. Hours are those of the steps, without starts and pauses."""
    batch = summary.config.global_batch_size if summary.config else 1
    places, before, hours = {}, 0, 0.0
    for line in lines:
        step = int(line["step"])
        hours += (step - before) * line.get("speed/step_ms", 0.0) / 3.6e6
        before = step
        places[step] = {"steps": float(step), "images": float(step * batch), "hours": hours}[axis]
    return places
