"""A function over many items in many processes: results in order, and no process that stays behind."""

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

from simclr_dist.system import signals

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def processes_for(images: int) -> int:
    """Processes that pay for so many images: starting one takes as long as decoding some hundred."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 1 + images // 500)


@contextmanager
def workers(processes: int, preload: tuple[str, ...]) -> Iterator[Map]:
    """`map` over that many processes, which have imported `preload`, results in order; for one, `map` itself.

    Raises concurrent.futures.process.BrokenProcessPool when a process dies.
    """
    if processes <= 1:
        with signals.blocked():  # torch, which they import, passes over what a signal raises
            for name in preload:
                importlib.import_module(name)
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Not multiprocessing.Pool, which waits for ever when a worker is killed.
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: workers of a killed parent would otherwise wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
