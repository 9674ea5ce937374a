"""What a run shows of itself: console and train.log, metrics.jsonl, TensorBoard."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

T = TypeVar("T")


class Monitor:
    """Rank 0's voice; on the other ranks every method does nothing.

    On a terminal a progress bar, else one plain line an interval; train.log gets the lines in both cases.
    """

    def __init__(self, run: Path, *, active: bool, total_steps: int, first_step: int, tensorboard: bool = True) -> None:
        self._active = active
        if not active:
            return
        self._log = (run / "train.log").open("a", encoding="utf-8")
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        if tensorboard:
            # Events of a killed run from after its checkpoint are purged, so the curves stay monotone.
            self._board = SummaryWriter(str(run / "tb"), purge_step=first_step + 1)
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._total = total_steps

    def say(self, line: str) -> None:
        """A line for people."""
        if self._active:
            print(line, file=self._log, flush=True)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def images(self, name: str, grid: Tensor, step: int) -> None:
        """A picture for TensorBoard, float [3, h, w] in 0..1."""
        if self._active and self._board is not None:
            self._board.add_image(name, grid, step)

    def advance(self) -> None:
        """One step is done."""
        if self._active and self._bar is not None:
            self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """The metrics after `step` steps; `timing` apart, since it alone differs when a run is repeated."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        print(json.dumps({"step": step, **finite, "timing": dict(timing)}), file=self._metrics, flush=True)
        if self._board is not None:
            for name, value in {**metrics, **timing}.items():
                self._board.add_scalar(name, value, step)
        line = (
            f"step {step}/{self._total}  loss {metrics['loss/nt_xent']:.4f} (chance {metrics['loss/chance']:.2f})"
            f"  pos {metrics['similarity/positive']:.3f}  lr {metrics['optim/learning_rate']:.2e}"
            f"  {timing['speed/images_per_second']:.0f} img/s  data {timing['speed/data_wait_percent']:.0f} %"
            f"  mem {timing['speed/memory_gib']:.2f} GiB  ETA {_clock(timing['speed/seconds_left'])}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics['loss/nt_xent']:.3f} {timing['speed/images_per_second']:.0f} img/s")
            print(line, file=self._log, flush=True)
        else:
            self.say(line)

    def close(self) -> None:
        """Close the files."""
        if self._active:
            for closing in (self._bar, self._board, self._log, self._metrics):
                if closing is not None:
                    closing.close()


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
