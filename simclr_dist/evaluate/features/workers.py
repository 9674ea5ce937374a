"""A DataLoader's worker processes, which end with whoever reads, and by nothing else.

The workers mind no stop signal but their parent's (`data.steps.mind_parent_only`); and the parent leaves the loader only
between two batches, since half way in it would leave processes, or their tracebacks, behind.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from simclr_dist.system import signals

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


def read(loader: DataLoader[T], abandoned: Tensor) -> Iterator[T]:
    """The loader's batches. `abandoned` (one number in shared memory) becomes 1 when a batch in the making is not wanted."""
    batches: Iterator[T] | None = None
    try:
        with _deferred(abandoned), signals.blocked():
            batches = iter(loader)
        with contextlib.suppress(StopIteration):
            while True:
                with _deferred(abandoned):
                    batch = next(batches)
                yield batch
    finally:
        abandoned.fill_(1)
        batches = None  # ends the workers, also when a traceback keeps this frame


@contextmanager
def _deferred(abandoned: Tensor) -> Iterator[None]:
    """What a stop signal's handler raises is raised at the end of the block; until then `abandoned` is set."""
    raised: list[BaseException] = []
    handlers: dict[int, Handler] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handlers[number](number, frame)
        except (SystemExit, KeyboardInterrupt) as error:
            abandoned.fill_(1)
            raised.append(error.with_traceback(None))  # which would keep the loader's frames, and so its workers

    if threading.current_thread() is threading.main_thread():  # where handlers run and can be set
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
