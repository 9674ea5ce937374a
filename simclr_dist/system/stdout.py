"""Standard output that takes nothing more: its failures, told from those of files, come once and while they can be answered."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from simclr_dist.system.errors import OutputError


@contextmanager
def checked() -> Iterator[None]:
    """What is printed inside has reached standard output when it ends, also when it ends by SystemExit.

    Raises OutputError, from the print or at the end, where a full disk does not take it, and BrokenPipeError where nobody
    reads it; either once, and what is printed later is lost.
    """
    plain = sys.stdout
    if plain is None:  # which a shell can close: `>&-`
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
    """A stream whose errors are OutputError or BrokenPipeError; the error of a file's print stays what it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)
            raise

    def _give_up(self, error: OSError) -> None:
        # What is left in the buffer would fail again, at the latest on the interpreter's way out.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"standard output: cannot be written: {error.strerror}") from None
