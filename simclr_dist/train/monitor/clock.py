"""Measure a run's speed, and find the ranks that slow it."""

import resource
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from simclr_dist.method.distributed import all_gather, all_gather_objects

T = TypeVar("T")


class Stopwatch:
    """Adds up the time within `with stopwatch:`. On CUDA it is GPU time, and only `read` waits for it.

    For local work, which waits for no other rank. A step takes every rank equally long. Only local work tells a slow rank
    from those that wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: Any = None
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._pairs.append((self._began, self._now()))
        else:
            self._seconds += self._now() - self._began

    def read(self) -> float:
        """Return the seconds since the last reading; waits for the GPU."""
        seconds, self._seconds = self._seconds, 0.0
        pairs, self._pairs = self._pairs, []
        if pairs:
            pairs[-1][1].synchronize()
        return seconds + sum(float(begin.elapsed_time(end)) for begin, end in pairs) / 1000

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Clock:
    """Measures speed, waiting for data, and how far the ranks differ. Every rank must build one."""

    def __init__(self, device: torch.device, local_timer: Stopwatch) -> None:
        self.hosts: list[str] = all_gather_objects(socket.gethostname())
        self._device, self._local_timer = device, local_timer
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items. The time until each arrives counts as waiting."""
        iterator = iter(items)
        self._since = time.perf_counter()  # time between building a clock and the first step is no training
        while True:
            begin = time.perf_counter()
            with record_function("data"):
                item = next(iterator, None)
            self._waited += time.perf_counter() - begin
            if item is None:
                return
            self._steps += 1
            yield item

    def read(self, batch: int, steps_left: int) -> dict[str, float]:
        """Measure since the last reading, on every rank alike. A step has `batch` images; `steps_left` are to go.

        speed/ is of this rank, but for speed/images_per_second, which all share. ranks/ is of all: `own_ms` is the slowest
        rank's local work in a step, `own_ms_others` the median of the rest; `slowest` and `starving` are the ranks with the
        most local work and the most waiting for data.
        """
        now, steps = time.perf_counter(), max(self._steps, 1)
        elapsed = now - self._since
        seconds_a_step = elapsed / steps
        speed, wait, memory = batch / seconds_a_step, 100 * self._waited / elapsed, memory_gib(self._device)
        mine = [speed, wait, memory, 1000 * self._local_timer.read() / steps]
        self._since, self._waited, self._steps = now, 0.0, 0
        ranks = all_gather(torch.tensor(mine, dtype=torch.float64, device=self._device)).cpu()
        return {
            "speed/images_per_second": speed,
            "speed/data_wait_percent": wait,
            "speed/memory_gib": memory,
            "speed/seconds_left": seconds_a_step * steps_left,
            "speed/step_ms": 1000 * seconds_a_step,
            **spread(*ranks.T),
        }


def spread(speed: Tensor, wait: Tensor, memory: Tensor, local: Tensor) -> dict[str, float]:
    """Return how far the ranks differ. Each argument is [world_size], a number a rank; keys as in `Clock.read`."""
    slowest = int(local.argmax())
    others = torch.cat([local[:slowest], local[slowest + 1 :]]) if len(local) > 1 else local
    return {
        "ranks/images_per_second_min": float(speed.min()),
        "ranks/images_per_second_max": float(speed.max()),
        "ranks/data_wait_percent_max": float(wait.max()),
        "ranks/memory_gib_max": float(memory.max()),
        "ranks/own_ms": float(local[slowest]),
        "ranks/own_ms_others": float(others.median()),
        "ranks/slowest": slowest,
        "ranks/starving": int(wait.argmax()),
    }


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB. On CUDA the allocator's, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
