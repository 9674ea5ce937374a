"""A limit on processor time, for what must not take time that grows with the square of its input."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the block with TimeoutError when this process has computed for so long; waiting does not count."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s of a processor")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
