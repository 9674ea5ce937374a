"""Run a function over many items in many processes. Results come in order, and no process stays behind."""

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from simclr_dist.convert.sources.originals import ReadError
from simclr_dist.system import signals

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def processes_for(images: int) -> int:
    """Count the processes that pay off. Starting one takes as long as decoding some hundred images."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 1 + images // 500)


@contextmanager
def workers(processes: int, preload: tuple[str, ...], folder: Path, cure: str = "use fewer processes") -> Iterator[Map]:
    """Start processes that have imported `preload`. Yields `map` over them, results in order.

    Raises ReadError, which names `folder` and `cure`, when a process dies.
    """
    if processes <= 1:
        with signals.blocked():  # torch, which they import, passes over what a signal raises
            for name in preload:
                importlib.import_module(name)
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # Not multiprocessing.Pool, which does not tell that a worker has died.
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    except BrokenProcessPool:
        raise ReadError(f"{folder}: a worker process died, perhaps for lack of memory; {cure}") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it. Workers of a killed parent would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
