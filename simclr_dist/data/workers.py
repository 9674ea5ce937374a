"""Make items ahead in worker processes. They end with their reader and by nothing else."""

import contextlib
import itertools
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simclr_dist.data.portions import MORE_SHARED_MEMORY, SHARED_MEMORY
from simclr_dist.system import signals
from simclr_dist.system.errors import DataError, RankError, WorkerError

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


SILENT_MINUTES = 10.0  # a worker that sends nothing for so long hangs
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0  # that a worker has after a stop signal
_STATES = {"T": " and is stopped (SIGSTOP)", "D": " and waits for a disk"}  # of /proc


class Loader(Generic[T]):
    """Yields `make(index)` of each of `indices`, in order. `workers` processes make them ahead (0: this one).

    With `batch_size`, so many items at a time go through `collate`. `options` are more of DataLoader's. A DataError of
    `make`, and shared memory that is full, become a RankError. A worker that dies, or sends nothing for `minutes` (or, after a
    stop signal that is only noted, for some seconds), becomes a WorkerError. Workers ignore every stop signal but their
    parent's. With `stop_between`, what a signal's handler raises comes between two batches: in the middle of one it would
    leave processes, or their tracebacks, behind. `abandoned` (one number in shared memory) becomes 1 when no further item is
    wanted.
    """

    def __init__(
        self, make: Callable[[int], Any], indices: Sequence[int],
        *, workers: int, batch_size: int | None = None, collate: Callable[[list[Any]], Any] = list,
        stop_between: bool = True, minutes: float = SILENT_MINUTES, **options: Any,
    ) -> None:  # fmt: skip
        self.abandoned = torch.zeros((), dtype=torch.uint8)
        if workers:
            with _full_memory_named():
                self.abandoned.share_memory_()
        self.minutes, self._stop_between = minutes, stop_between
        self._batches: Iterator[T | DataError] | None = None
        self._workers: list[BaseProcess] = []
        self._at_death: signal._HANDLER = None
        self._waiting: tuple[int, float] | None = None  # for which batch, since when
        self._held_since = 0.0  # a stop, since when
        self._silent = ""
        collate_fn = partial(_handed_over, None if batch_size is None else collate)  # torch's makes tensors of arrays
        self._loader: DataLoader[T | DataError] = DataLoader(
            _Items(make, self.abandoned), batch_size=batch_size, collate_fn=collate_fn, sampler=indices, num_workers=workers,
            worker_init_fn=_obey_parent_only, **options,
        )  # fmt: skip

    def __iter__(self) -> Iterator[T]:
        ended = threading.Event()
        try:
            with self._undisturbed(), signals.blocked(), _full_memory_named():  # workers start here, and keep signals blocked
                others = multiprocessing.active_children()
                self._batches = iter(self._loader)
                self._workers = sorted(set(multiprocessing.active_children()) - set(others), key=lambda worker: worker.pid or 0)
            if self._workers:
                threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
            # Out of `next`, torch's handler would raise at a worker's death wherever this thread is then.
            with _handled(signal.SIGCHLD, signal.SIG_DFL) as self._at_death:
                yield from self._items()
        finally:
            ended.set()
            self.abandoned.fill_(1)
            self._batches = None  # ends the workers; in no frame, as a traceback may keep that
            self._kill_workers()  # those that do not hear

    def _items(self) -> Iterator[T]:
        try:
            for number in itertools.count():
                batch = self._wait(number)
                if isinstance(batch, DataError):
                    raise RankError(str(batch))
                yield batch
        except StopIteration:
            return
        except WorkerError:
            self._kill_workers()
            self._batches = None
            raise

    def _wait(self, number: int) -> T | DataError:
        """Return the next batch, which has this number. Raises WorkerError where its worker cannot send it."""
        assert self._batches is not None
        problem = "killed, or out of memory"
        self._waiting = number, time.monotonic()
        try:
            with self._undisturbed(), _handled(signal.SIGCHLD, self._at_death):
                return next(self._batches)
        except (EOFError, ConnectionError):  # before torch has noticed
            pass
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            problem = str(error).strip().rstrip(".")
        finally:
            self._waiting = None
        # Not above: a traceback that is kept would keep torch's frames, and so the workers.
        raise WorkerError(self._silent or f"a DataLoader worker died: {problem}; fewer workers need less memory")

    def _watch(self, ended: threading.Event) -> None:
        """Kill the workers when their reader has waited too long. It may be deep in a read from one that is stopped."""
        while not ended.wait(_POLL_SECONDS):
            if (waiting := self._waiting) is None:
                continue
            number, since = waiting
            waited, noted = time.monotonic() - since, signals.requested_at()
            stop = self._held_since or (noted and time.monotonic() - (time.time() - noted))
            if waited > 60 * self.minutes or (stop and time.monotonic() - max(since, stop) > _GRACE_SECONDS):
                self._silent = self._silence(number % len(self._workers), waited)
                self._kill_workers()

    def _silence(self, worker: int, seconds: float) -> str:
        """Say which worker is silent, and why it may be so."""
        process, state = self._workers[worker].pid, ""
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return (
            f"DataLoader worker {worker + 1} of {len(self._workers)} (process {process} on {socket.gethostname()}) has sent"
            f" nothing for {seconds / 60:.2g} minutes{_STATES.get(state, '')}; look at the disk or server that it reads from"
        )

    def _kill_workers(self) -> None:
        """Kill the workers that are left. One that is stopped, or waits for a disk, hears no other signal."""
        for worker in self._workers:
            worker.kill()

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Hold back what a stop signal's handler raises, until the block ends. Set `abandoned` at once."""
        raised: list[BaseException] = []
        handlers: dict[int, Handler] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handlers[number](number, frame)
            except (SystemExit, KeyboardInterrupt) as error:
                self.abandoned.fill_(1)
                self._held_since = time.monotonic()
                raised.append(error.with_traceback(None))  # a traceback would keep the loader's frames, and so its workers

        # Blocking would not do: another thread would get the signal, and the handler would run in this one all the same.
        try:
            with contextlib.ExitStack() as replaced:
                for number in signals.SIGNALS if self._stop_between else ():
                    if callable(handler := signal.getsignal(number)):
                        handlers[number] = handler
                        replaced.enter_context(_handled(number, handle))
                yield
        finally:
            if raised:
                raise raised[0]


@contextlib.contextmanager
def _handled(number: int, handler: "signal._HANDLER") -> Iterator["signal._HANDLER"]:
    """Set a signal's handler inside, where it can be set. Yields the one before."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield before
        return
    signal.signal(number, handler)
    try:
        yield before
    finally:
        if signal.getsignal(number) is handler:  # it may have set another
            signal.signal(number, before)


class _Items(Dataset[Any]):
    """A map from index to item, or to its DataError. Raised in a worker, it would reach the user as a traceback."""

    def __init__(self, make: Callable[[int], Any], abandoned: Tensor) -> None:
        self._make, self._abandoned = make, abandoned

    def __getitem__(self, index: int) -> Any:
        if self._abandoned:
            return DataError("nobody waits for it")
        try:
            return self._make(index)
        except DataError as error:
            return DataError(str(error))


def _handed_over(collate: Callable[[list[Any]], Any] | None, item: Any) -> Any:
    """Finish an item or a batch; in a worker, in shared memory.

    torch would move it there in a thread, which prints an error and loses the item: its reader would wait for ever.
    """
    try:
        with _full_memory_named():
            if collate is not None:
                item = next((each for each in item if isinstance(each, DataError)), None) or collate(item)
            if get_worker_info() is not None:
                for tensor in _tensors(item):
                    tensor.share_memory_()
    except DataError as error:
        return DataError(str(error))
    return item


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _tensors(part)


@contextlib.contextmanager
def _full_memory_named() -> Iterator[None]:
    """Raise RankError, with the cure, where shared memory cannot be had."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # of torch, and of a queue's semaphores
        if isinstance(error, RuntimeError) and "shared memory" not in str(error):
            raise
        why = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        cure = "raise ulimit -n" if "open files" in why else MORE_SHARED_MEMORY
        raise RankError(f"{SHARED_MEMORY}: the workers can hand nothing over: {why}; {cure}") from None


def _obey_parent_only(_: int) -> None:
    signals.obey_parent_only()
