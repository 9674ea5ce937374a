"""Run a function over many items in many processes. Results come in order, and no process stays behind."""

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from simclr_dist.convert.sources.originals import ReadError
from simclr_dist.data.portions import MORE_SHARED_MEMORY, SHARED_MEMORY
from simclr_dist.system import signals
from simclr_dist.system.errors import refusing
from simclr_dist.system.machine import cores

_SILENT_SECONDS = 600.0  # without a result, and without computing
_END_SECONDS = 5.0  # that workers have to finish what they do

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def processes_for(images: int) -> int:
    """Count the processes that pay off. Starting one takes as long as decoding some hundred images."""
    return min(cores(), 1 + images // 500)


@contextmanager
def workers(processes: int, preload: tuple[str, ...], folder: Path, cure: str = "use fewer processes") -> Iterator[Map]:
    """Start processes that have imported `preload`. Yields `map` over them, results in order.

    Raises ReadError, which names `folder` and `cure`, when a process dies, or none does anything. At the end all are gone.
    """
    if processes <= 1:
        with signals.blocked():  # torch, which they import, passes over what a signal raises
            for name in preload:
                importlib.import_module(name)
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    others = set(multiprocessing.active_children())
    # Not multiprocessing.Pool, which does not tell that a worker has died.
    # A semaphore is a file in shared memory.
    with refusing(f"{SHARED_MEMORY}: no worker process can start", ReadError, f"; {MORE_SHARED_MEMORY}"):
        executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        yield partial(_map, executor, folder, others)
    except BrokenProcessPool:
        raise ReadError(f"{folder}: a worker process died, perhaps for lack of memory; {cure}") from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _END_SECONDS
        for worker in set(multiprocessing.active_children()) - others:
            worker.join(max(0.0, until - time.monotonic()))
            worker.kill()  # one that is stopped, or waits for a disk


def _map(
    executor: ProcessPoolExecutor, folder: Path, others: set[BaseProcess], function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """Yield each item's result. Raises ReadError when none comes and no worker computes."""
    futures, before = deque(executor.submit(function, item) for item in items), -1
    while futures:
        if wait([futures[0]], _SILENT_SECONDS).done:
            yield futures.popleft().result()
        elif (now := _ticks(set(multiprocessing.active_children()) - others)) == before:
            why = f"no worker process has done anything for {_SILENT_SECONDS / 60:g} minutes"
            raise ReadError(f"{folder}: {why}; look at the disk that they read, and give the same command again")
        else:
            before = now


def _ticks(workers: Iterable[BaseProcess]) -> int:
    """Count the processor time of these processes, in clock ticks."""
    total = 0
    for worker in workers:
        with suppress(OSError):
            total += sum(map(int, Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return total


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it. Workers of a killed parent would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
