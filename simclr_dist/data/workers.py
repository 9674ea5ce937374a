"""Make items ahead in worker processes. They end with their reader and by nothing else."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simclr_dist.system import signals
from simclr_dist.system.errors import DataError, RankError

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


class Loader(Generic[T]):
    """Yields `make(index)` of each of `indices`, in order. `workers` processes make them ahead (0: this one).

    With `batch_size`, so many items at a time go through `collate`. `options` are more of DataLoader's. A DataError of
    `make` becomes a RankError, a worker's death RuntimeError. Workers ignore every stop signal but their parent's. With
    `stop_between`, what a signal's handler raises comes between two batches: in the middle of one it would leave processes, or
    their tracebacks, behind. `abandoned` (one number in shared memory) becomes 1 when no further item is wanted.
    """

    def __init__(
        self, make: Callable[[int], Any], indices: Sequence[int],
        *, workers: int, batch_size: int | None = None, collate: Callable[[list[Any]], Any] = list,
        stop_between: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.abandoned = torch.zeros((), dtype=torch.uint8).share_memory_()
        self._stop_between = stop_between
        collate_fn = _as_it_is if batch_size is None else partial(_together, collate)  # torch's makes tensors of arrays
        self._loader: DataLoader[T | DataError] = DataLoader(
            _Items(make, self.abandoned), batch_size=batch_size, collate_fn=collate_fn, sampler=indices, num_workers=workers,
            worker_init_fn=_obey_parent_only, **options,
        )  # fmt: skip

    def __iter__(self) -> Iterator[T]:
        batches: Iterator[T | DataError] | None = None
        try:
            with self._undisturbed(), signals.blocked():  # workers start here, and keep signals blocked
                batches = iter(self._loader)
            with contextlib.suppress(StopIteration):
                while True:
                    with self._undisturbed():
                        batch = next(batches)
                    if isinstance(batch, DataError):
                        raise RankError(str(batch))
                    yield batch
        except (EOFError, ConnectionError) as error:  # before torch has noticed
            raise RuntimeError("DataLoader worker died: killed, or out of memory") from error
        finally:
            self.abandoned.fill_(1)
            batches = None  # ends the workers, also when a traceback keeps this frame

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
                raised.append(error.with_traceback(None))  # a traceback would keep the loader's frames, and so its workers

        if self._stop_between and threading.current_thread() is threading.main_thread():  # where handlers run and can be set
            # Blocking would not do: another thread would get the signal, and the handler would run in this one all the same.
            for number in signals.SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, handle)
        try:
            yield
        finally:
            for replaced, handler in handlers.items():
                if signal.getsignal(replaced) is handle:  # the handler may have set another
                    signal.signal(replaced, handler)
            if raised:
                raise raised[0]


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


def _together(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, DataError)), None) or collate(items)


def _as_it_is(item: Any) -> Any:
    return item


def _obey_parent_only(_: int) -> None:
    signals.obey_parent_only()
