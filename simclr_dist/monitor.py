"""What a run shows of itself: console and train.log, metrics.jsonl, TensorBoard."""

import io
import json
import math
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import image, scalar
from tqdm import tqdm

from simclr_dist.atomic import append

T = TypeVar("T")


class Monitor:
    """Rank 0's voice; on the other ranks every method does nothing.

    On a terminal a progress bar, else one plain line an interval; train.log gets the lines in both cases. What a full disk or
    a closed console does not take is lost, which is said once for each file and counted; the run goes on.
    """

    def __init__(self, run: Path, *, active: bool, total_steps: int, first_step: int, tensorboard: bool = True) -> None:
        self._active = active
        self._lost: Counter[str] = Counter()
        if not active:
            return
        self._log = run / "train.log"
        self._metrics = run / "metrics.jsonl"
        self._board: _Events | None = None
        if tensorboard:
            # Events of a killed run from after its checkpoint are purged, so the curves stay monotone.
            self._board = _Events(run / "tb", purge_step=first_step + 1)
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._total = total_steps

    @property
    def lost_lines(self) -> int:
        """Lines and TensorBoard entries that could not be written so far."""
        return self._lost.total()

    def say(self, line: str) -> None:
        """A line for people."""
        if self._active:
            self._note(line)
            self._try("standard output", lambda: _print(line))

    def images(self, name: str, grid: Tensor, step: int) -> None:
        """A picture for TensorBoard, float [3, h, w] in 0..1."""
        if self._active and self._board is not None:
            self._show(self._board, [image(name, grid, dataformats="CHW")], step)

    def advance(self) -> None:
        """One step is done."""
        if self._active and self._bar is not None:
            self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """The metrics after `step` steps; `timing` apart, since it alone differs when a run is repeated."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        entry = json.dumps({"step": step, **finite, "timing": dict(timing)})
        self._try(str(self._metrics), lambda: append(self._metrics, f"{entry}\n".encode()))
        if self._board is not None:
            self._show(self._board, [scalar(name, value) for name, value in {**metrics, **timing}.items()], step)
        loss = metrics["loss/nt_xent"] if "loss/nt_xent" in metrics else metrics["loss/dcl"]
        line = (
            f"step {step}/{self._total}  loss {loss:.4f} (chance {metrics['loss/chance']:.2f})"
            f"  pos {metrics['similarity/positive']:.3f}"
            f"  top-1 {100 * metrics['retrieval/top1']:.0f} %  lr {metrics['optim/learning_rate']:.2e}"
            f"  {timing['speed/images_per_second']:.0f} img/s  data {timing['speed/data_wait_percent']:.0f} %"
            f"  mem {timing['speed/memory_gib']:.2f} GiB  ETA {_clock(timing['speed/seconds_left'])}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f} {timing['speed/images_per_second']:.0f} img/s")
            self._note(line)
        else:
            self.say(line)

    def close(self) -> None:
        """End the progress bar, and say how much was lost."""
        if self._active and self._bar is not None:
            self._bar.close()
        if self._lost:
            _warn(", ".join(f"{name}: {count} times nothing could be written" for name, count in self._lost.items()))

    def _note(self, line: str) -> None:
        self._try(str(self._log), lambda: append(self._log, f"{line}\n".encode()))

    def _show(self, board: "_Events", summaries: Iterable[Any], step: int) -> None:
        self._try(str(board.path), lambda: board.add(summaries, step))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._lost[name] += 1
            if self._lost[name] == 1:
                _warn(f"{name}: cannot be written: {error.strerror}; what it cannot take is lost, and training goes on")


class _Events:
    """TensorBoard's file of this start. Written at once and in this thread, unlike SummaryWriter's: that one ends for good,
    with a traceback, when the disk is full for a moment, and a kill takes what waits in its queue."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._opening = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        ]

    def add(self, summaries: Iterable[Any], step: int) -> None:
        """All of the summaries or none; OSError when the disk does not take them."""
        records = io.BytesIO()
        for event in [*self._opening, *(Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries)]:
            RecordWriter(records).write(event.SerializeToString())
        self.path.parent.mkdir(exist_ok=True)
        append(self.path, records.getvalue())
        self._opening = []


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _warn(line: str) -> None:
    with suppress(OSError):  # the disk that is full may be the one that has the console's file
        tqdm.write(f"WARNING: {line}", file=sys.stderr)
        sys.stderr.flush()


class Clock:
    """Throughput since the last reading, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each is there counted as waiting."""
        iterator = iter(items)
        while True:
            begin = time.perf_counter()
            item = next(iterator, None)
            self._waited += time.perf_counter() - begin
            if item is None:
                return
            self._steps += 1
            yield item

    def read(self, batch: int, steps_left: int, device: torch.device) -> dict[str, float]:
        """Speed of a run with `batch` images a step and `steps_left` to go, since the last reading."""
        now = time.perf_counter()
        elapsed = now - self._since
        seconds_a_step = elapsed / max(self._steps, 1)
        reading = {
            "speed/images_per_second": batch / seconds_a_step,
            "speed/data_wait_percent": 100 * self._waited / elapsed,
            "speed/memory_gib": memory_gib(device),
            "speed/seconds_left": seconds_a_step * steps_left,
        }
        self._since, self._waited, self._steps = now, 0.0, 0
        return reading


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
