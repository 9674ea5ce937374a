"""Say how a run stands, and which command comes next. It reads the run folder only, so the run may be at work anywhere."""

import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from simclr_dist.encoder.names import encoder_path, newest_encoder, result_path
from simclr_dist.evaluate.compare import Row, accuracies, compare, table
from simclr_dist.run import commands
from simclr_dist.run.claim import describe_start, heartbeat, newest_start, signature
from simclr_dist.run.folder import newest_step
from simclr_dist.run.status import read_ledger
from simclr_dist.run.steps import step_name
from simclr_dist.run.summary import learning, loss_of
from simclr_dist.system.errors import printable

Lines = list[tuple[str, str]]


def status(folders: Sequence[str | Path]) -> str:
    """Describe a run by its card, several in a table. Raises DataError where there is none."""
    comparison = compare(folders)
    run = comparison.rows[0].summary.run
    if [run] != [*map(Path, folders)]:
        return table(comparison)
    return shown(run, [*card(comparison.rows[0]), *(("damaged", line) for line in comparison.passed_over)])


def shown(run: Path, lines: Lines) -> str:
    """Format a card."""
    return "\n".join(map(printable, [str(run), *(f"  {title:11} {text}" for title, text in lines)]))


def card(row: Row) -> Lines:
    """Describe a run by titled lines. What is not known has none."""
    one, damaged = row.summary, list[str]()
    run, numbers = one.run, one.metrics
    starts = [entry.get("steps_lost", 0) for entry in read_ledger(run, report=damaged.append) if entry["event"] == "start"]
    lines = [("state", one.standing)]
    if (start := newest_start(run)) and (beat := heartbeat(run)):
        lines.append(("last start", f"{describe_start(signature(run, start))}; last heard of {_ago(beat['time'])} ago"))
        lines.append(("starts", f"{len(starts)}, {sum(starts)} steps lost between them; {one.rank_hours:.3g} rank-hours"))
    if one.config and starts and commands.beginning_of(run, one.config) is None:
        lines.append(("copy", f"of {one.config.run_folder!r}, which is elsewhere; or that folder, moved"))
    if one.step or one.total:
        share, left = f" ({100 * one.step / one.total:.1f} %)" if one.total else "", one.left and f", {one.left} left"
        speed = f", {s:.0f} images/s" if (s := numbers.get("speed/images_per_second")) else ""
        lines.append(("step", f"{one.step} of {one.total or '?'}{share}{speed}{left}"))
    if loss_of(numbers) is not None:
        lines.append(("loss", f"{', '.join(learning(numbers))}, at step {numbers['step']:.0f}".removeprefix("loss ")))
    if saved := newest_step(run):
        seal = run / "checkpoints" / step_name(saved, ".json")
        with suppress(FileNotFoundError):  # removed for a newer one just now
            lines.append(("checkpoint", f"{seal.with_suffix('.pt')}, {_ago(seal.stat().st_mtime)} old"))
    if encoder := newest_encoder(run):
        lines.append(("encoder", f"{encoder}, {accuracies(row) or 'not evaluated'}"))
    lines += (("damaged", line) for line in damaged)
    return [*lines, *zip(("next", "or"), next_commands(row), strict=False)]


def next_commands(row: Row) -> list[str]:
    """Return the command that comes next for a run. A second one takes an encoder out of a run that has stopped."""
    one = row.summary
    run, config, end, encoder, saved = one.run, one.config, one.outlook, newest_encoder(one.run), newest_step(one.run)
    submitted = (run / "submission.json").exists()
    if one.state in ("waiting", "running"):
        logs = commands.command("submit", "logs", "-f", run)
        return [logs if submitted else shlex.join(["tail", "-f", str(run / "train.log")])]
    if end.state == "done" and encoder:
        if result_path(encoder).exists():
            return [commands.command("export", encoder, f"{encoder.stem}-hub/")]
        return [commands.evaluate(encoder, config)]
    lower: Sequence[str] = ()  # for another run: this one would diverge again
    if config and end.state == "diverged":
        lower = ("--run_folder", f"{config.run_folder}-lower", "--optim.base_lr", f"{config.optim.base_lr / 3:.3g}")
    if submitted and lower:
        again = [commands.command("submit", run / "config.yaml", "--profile", "FILE", *lower)]
    elif submitted:
        again = [commands.command("submit", "resume" if end.over else "status", run)]
    else:
        again = [commands.train_again(run, config, one.last, *lower)] if config else []
    if saved and end.state != "diverged" and encoder != encoder_path(run, saved):
        again.append(f"{commands.command('export', run)}  # an encoder of step {saved}")
    return again


def _ago(since: float) -> str:
    seconds = max(0.0, time.time() - since)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
