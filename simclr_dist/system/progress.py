"""Show on standard error how far work is. A terminal's line is rewritten; elsewhere one comes every half minute."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

SECONDS, HOUR = 30.0, 3600.0  # from a line to the next where none can be rewritten; the same of what comes rarely, at most
_REDRAWN = 0.5  # seconds
_open: list["Progress"] = []  # the innermost, which speaks for all, is the last
_drawn = 0  # characters that stand on the terminal's last line
_last = 0.0  # when a line came, or the terminal's was taken away for one


class Progress:
    """Tells how far the block is, also while its work waits.

    The block counts in `done`. Without a `total` only the time is told. A `note` stands in place of speed and time left. The
    last line stays, unless a block that counts is around it. `rarely`: where no line can be rewritten, each comes after twice
    the time, up to an hour.
    """

    def __init__(
        self, title: str, total: int | None = None, unit: str = "", *, done: int = 0, shown: bool = True, rarely: bool = False
    ) -> None:
        self.note, self._title, self._total, self._unit, self._rarely = "", title, total, unit, rarely
        self._shown = shown and sys.stderr is not None  # else print would write to standard output
        self._first = self.done = done
        self._said, self._ended = False, threading.Event()
        self._speaker: threading.Thread | None = None  # of the outermost

    def __enter__(self) -> "Progress":
        global _last
        self._began = time.monotonic()
        if self._shown:
            _open.append(self)
            if len(_open) == 1:
                _last = self._began
                self._speaker = threading.Thread(target=_speak, args=(self._ended,), daemon=True)
                self._speaker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._speaker:
            self._speaker.join()  # it may be drawing
        if self._shown:
            _open.remove(self)
            clear()
            if self._said and self._total is not None and all(around._total is None for around in _open):
                self._say(f"{self._text()}\n")

    def show(self) -> None:
        """Draw the line on a terminal. Elsewhere print it when it is time."""
        global _drawn, _last
        if width := columns():
            if time.monotonic() > _last + _REDRAWN / 2:  # else somebody is about to print, and has cleared the line for that
                text = self._text()[: width - 1]
                self._say(f"\r{text:<{_drawn}}")
                _drawn = len(text)
        elif time.monotonic() >= _last + min(HOUR, max(SECONDS, (_last - self._began) * self._rarely)):
            _last = time.monotonic()
            self._say(f"{self._text()}\n")

    def _say(self, text: str) -> None:
        for block in [self, *_open]:
            block._said = True
        with suppress(OSError, ValueError):  # gone, or closed
            print(text, end="", file=sys.stderr, flush=True)

    def _text(self) -> str:
        seconds, new = time.monotonic() - self._began, self.done - self._first
        if self._total is None:
            return f"{self._title}: {clock(seconds)}"
        speed, left = f"{new / seconds:.3g}/s  " if new else "", self._total - self.done
        rest = f"{clock(left * seconds / new)} left" if new and left else clock(seconds)
        return f"{self._title}: {self.done} of {self._total} {self._unit}  {self.note or speed + rest}"


def columns() -> int:
    """Return the terminal's width; 0 where no line can be rewritten."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or a notebook's
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            return os.get_terminal_size(sys.stderr.fileno()).columns
    return 0


def clear() -> None:
    """Take the drawn line off the terminal. Whoever prints there calls it first."""
    global _drawn, _last
    if _drawn:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"\r{'':{_drawn}}\r".encode())
        _drawn, _last = 0, time.monotonic()


def clock(seconds: float) -> str:
    """Write a time as 1:02:03."""
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"


def _speak(ended: threading.Event) -> None:
    """Show the innermost block until the outermost has ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # what the main thread holds back is not for this one
    while not ended.wait(_REDRAWN):
        for innermost in _open[-1:]:
            innermost.show()
