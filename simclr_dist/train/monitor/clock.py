"""How fast a run is, and which of its ranks hold it up."""

import resource
import socket
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from simclr_dist.method.distributed import all_gather, all_gather_objects

T = TypeVar("T")


class Stopwatch:
    """Adds up the time within `with stopwatch:`; on a GPU the GPU's, and nothing waits for it before `read`.

    Meant for work that waits for no other rank: all steps of a run take every rank equally long, and only such work tells a
    slow rank from those that wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: float | torch.cuda.Event = 0.0
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if isinstance(end, torch.cuda.Event):
            assert isinstance(self._began, torch.cuda.Event)
            self._pairs.append((self._began, end))
        else:
            assert isinstance(self._began, float)
            self._seconds += end - self._began

    def read(self) -> float:
        """Seconds since the last reading; waits for the GPU."""
        seconds, self._seconds = self._seconds, 0.0
        pairs, self._pairs = self._pairs, []
        if pairs:
            pairs[-1][1].synchronize()
        return seconds + sum(float(begin.elapsed_time(end)) for begin, end in pairs) / 1000

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Clock:
    """Throughput since the last reading, the share of it spent waiting for data, and how far the ranks differ.

    `own_work` is the stopwatch of what each rank does by itself. To be built on every rank alike.
    """

    def __init__(self, device: torch.device, own_work: Stopwatch) -> None:
        self.hosts: list[str] = all_gather_objects(socket.gethostname())
        self._device = device
        self._own_work = own_work
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each is there counted as waiting."""
        iterator = iter(items)
        self._since = time.perf_counter()  # what is between building a clock and the first step is no training
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
        """Of a run with `batch` images a step and `steps_left` to go, since the last reading; on every rank alike.

        speed/ is of this rank, but for speed/images_per_second, which all share; ranks/ of all: `own_ms` is the slowest rank's
        own work in a step, `own_ms_others` the median of the rest; `slowest` and `starving` are the ranks with the most own
        work and the most waiting for data.
        """
        now = time.perf_counter()
        elapsed = now - self._since
        steps = max(self._steps, 1)
        seconds_a_step = elapsed / steps
        mine = [batch / seconds_a_step, 100 * self._waited / elapsed, memory_gib(self._device)]
        mine.append(1000 * self._own_work.read() / steps)
        self._since, self._waited, self._steps = now, 0.0, 0
        ranks = all_gather(torch.tensor(mine, dtype=torch.float64, device=self._device)).cpu()
        return {
            "speed/images_per_second": mine[0],
            "speed/data_wait_percent": mine[1],
            "speed/memory_gib": mine[2],
            "speed/seconds_left": seconds_a_step * steps_left,
            "speed/step_ms": 1000 * seconds_a_step,
            **spread(*ranks.T),
        }


def spread(speed: Tensor, wait: Tensor, memory: Tensor, own: Tensor) -> dict[str, float]:
    """How far the ranks differ, from one number of each, [world_size]; see `Clock.read`."""
    slowest = int(own.argmax())
    others = torch.cat([own[:slowest], own[slowest + 1 :]]) if len(own) > 1 else own
    return {
        "ranks/images_per_second_min": float(speed.min()),
        "ranks/images_per_second_max": float(speed.max()),
        "ranks/data_wait_percent_max": float(wait.max()),
        "ranks/memory_gib_max": float(memory.max()),
        "ranks/own_ms": float(own[slowest]),
        "ranks/own_ms_others": float(others.median()),
        "ranks/slowest": slowest,
        "ranks/starving": int(wait.argmax()),
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
