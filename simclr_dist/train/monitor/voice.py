"""Write a run's console lines, train.log, metrics.jsonl, TensorBoard, and status.json's alarms."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard.summary import image, scalar, text

from simclr_dist.run.loggers import Follower, end_all
from simclr_dist.run.status import write_status
from simclr_dist.run.summary import learning
from simclr_dist.system.errors import LAYOUT, printable, say
from simclr_dist.system.files import append
from simclr_dist.system.progress import Progress, clear, clock, columns
from simclr_dist.train.monitor.alarms import Alarms, Numbers
from simclr_dist.train.monitor.board import SECOND, EventFile, cosine_histogram, cosines, layout


class Monitor:
    """Rank 0's output; on the other ranks every method does nothing.

    On a terminal one line that is rewritten, else one an interval; train.log gets the lines in both cases. What a full disk or
    a closed console does not take is lost: each file is warned of once, losses are counted, and the run goes on. Alarms (their
    rules need `warmup_steps` and the ranks' `hosts`) are lines too, and stand in status.json, as those of `start`, while they
    last.
    """

    def __init__(
        self,
        run: Path,
        *,
        active: bool,
        total_steps: int,
        first_step: int,
        tensorboard: bool = True,
        loggers: Sequence[str] = (),
        warmup_steps: int = 0,
        hosts: Sequence[str] = (),
        start: int | None = None,
    ) -> None:
        self._active = active
        self._followers: list[Follower] = []
        self.lost: Counter[str] = Counter()  # lines and TensorBoard entries that could not be written, by file
        if not active:
            return
        self._run, self._log, self._metrics = run, run / "train.log", run / "metrics.jsonl"
        self._total, self._first_step = total_steps, first_step
        self._alarms, self._start = Alarms(warmup_steps=warmup_steps, hosts=hosts), start
        self._loggers = loggers
        self._board: EventFile | None = None
        if tensorboard:
            # What a killed start wrote after the checkpoint is written again, or is no part of this run.
            self._board, self._second = (EventFile(tb, purge_step=first_step + 1) for tb in (run / "tb", run / "tb" / "second"))
        self._on_terminal, self._shown = columns() > 0, ExitStack()
        line = Progress("training", total_steps, "steps", done=first_step, shown=self._on_terminal)
        self._line = self._shown.enter_context(line)

    def say(self, line: str) -> None:
        """Print and log a line for people."""
        if self._active:
            line = printable(line, keep=LAYOUT)
            self._note(line)
            self._try("standard output", lambda: _print(line))

    def card(self, markdown: str) -> None:
        """Write the run's card and the dashboard's layout to TensorBoard. The other loggers start now."""
        if self._active and self._board is not None:
            self._show(self._board, [layout(), text("run", printable(markdown, keep=LAYOUT))], self._first_step)
        if self._active:
            self._followers = [Follower(name, self._run, lambda line: self.say(f"WARNING: {line}")) for name in self._loggers]

    def images(self, name: str, grid: Tensor, step: int) -> None:
        """Write a picture to TensorBoard, float [3, h, w] in 0..1."""
        if self._active and self._board is not None:
            self._show(self._board, [image(name, grid, dataformats="CHW")], step)

    def advance(self) -> None:
        """Count a step on the terminal."""
        if self._active:
            self._line.done += 1

    def log(self, step: int, metrics: Numbers, timing: Numbers, z: tuple[Tensor, Tensor] | None = None) -> None:
        """Log the metrics after `step` steps. `timing` is apart: it alone differs when a run is repeated.

        `z`, the embeddings [n, d] of this rank's two views, are for the histograms of cosines.
        """
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        entry = json.dumps({"step": step, **finite, "timing": dict(timing)})
        self._try(str(self._metrics), lambda: append(self._metrics, f"{entry}\n".encode()))
        for follower in self._followers:
            follower.poke()
        if self._board is not None:
            scalars = {name: scalar(name, value) for name, value in {**metrics, **timing}.items()}
            self._show(self._second, [scalars.pop(name) for name in sorted(SECOND & scalars.keys())], step)
            summaries = [*scalars.values()]
            if z is not None:
                partners, others = cosines(*z)
                summaries += [cosine_histogram("cosine/partners", partners), cosine_histogram("cosine/others", others)]
            self._show(self._board, summaries, step)
        against, nearest = learning(metrics)
        speed, left = f"{timing['speed/images_per_second']:.0f} img/s", clock(timing["speed/seconds_left"])
        line = (
            f"step {step}/{self._total}  {against}  pos {metrics['similarity/positive']:.3f}"
            f"  {nearest}  lr {metrics['optim/learning_rate']:.2e}  {speed}  data {timing['speed/data_wait_percent']:.0f} %"
            f"  peak memory {timing['speed/memory_gib']:.2f} GiB  ETA {left}"
        )
        if self._on_terminal:
            self._line.note = f"{against}  {nearest}  {speed}  {left} left"
            self._note(line)
        else:
            self.say(line)
        if changes := self._alarms.see(step, metrics, timing):
            for change in changes:
                self.say(change.line)
            alarms = [dataclasses.asdict(alarm) for alarm in self._alarms.active]
            write_status(self._run, "running", None, start=self._start, alarms=alarms)

    def close(self) -> None:
        """End the terminal's line and the loggers. Warn of what was lost."""
        end_all(self._followers)
        if self._active:
            self._shown.close()
        if self.lost:
            lost = ", ".join(f"{name}: {count} times nothing could be written" for name, count in self.lost.items())
            say(lost, "WARNING: ")

    def _note(self, line: str) -> None:
        self._try(str(self._log), lambda: append(self._log, f"{line}\n".encode()))

    def _show(self, board: EventFile, summaries: Iterable[Any], step: int) -> None:
        self._try(str(board.path), lambda: board.add(summaries, step))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.lost[name] += 1
            if self.lost[name] == 1:
                more = "what it cannot take is lost, and training goes on"
                say(f"{name}: cannot be written: {error.strerror}; {more}", "WARNING: ")


def _print(line: str) -> None:
    clear()
    print(line, flush=True)
