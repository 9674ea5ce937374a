"""Raise standard output's errors while the program can still answer."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from simclr_dist.system import progress
from simclr_dist.system.errors import LAYOUT, OutputError, printable

T = TypeVar("T")


@contextmanager
def checked() -> Iterator[None]:
    """Flush standard output at the block's end, also at SystemExit.

    Raises OutputError when a full disk does not take the text, and BrokenPipeError when nobody reads it. It comes from the
    print or at the end, and only once. What is printed later is lost, as all is that is for a terminal that has gone.
    Control characters, which come from files, are escaped.
    """
    plain = sys.stdout
    if plain is None:  # closed by the shell: `>&-`
        yield
        return
    sys.stdout = cast(TextIO, _Checked(plain))
    try:
        try:
            yield
        except SystemExit:  # help and version
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        sys.stdout = plain


class _Checked:
    """Stream whose errors become OutputError or stay BrokenPipeError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        progress.clear()
        return self._try(self._stream.write, printable(text, keep=LAYOUT))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., T], *arguments: str) -> T:
        try:
            return action(*arguments)
        except OSError as error:
            # What is left in the buffer would fail again, at the latest when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if error.errno == errno.EIO and self._terminal:
                return action(*arguments)
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"standard output: cannot be written: {error.strerror}") from None
