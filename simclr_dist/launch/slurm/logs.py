"""Show log files while they are being written."""

import codecs
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TextIO

from simclr_dist.system.errors import LAYOUT, DataError, printable, reason_of


class Tail:
    """A copier of a growing file to a stream. The file may come later."""

    def __init__(self, path: Path, to: TextIO) -> None:
        self._path, self._to = path, to
        self._read = 0  # bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may come in two parts

    def copy(self) -> bool:
        """Copy what is new, escaping control characters; return whether there was anything."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {reason_of(error)}") from None
        self._read += len(new)
        with suppress(OSError) if self._to is sys.stderr else nullcontext():  # it may be a terminal that has gone
            self._to.write(printable(self._decoder.decode(new), keep=LAYOUT))
            self._to.flush()
        return bool(new)


def tails(folder: Path, job_id: str) -> tuple[Tail, Tail]:
    """Return tails of a job's stdout and stderr. They are those of rank 0 and the batch script, in all its starts."""
    return Tail(folder / f"{job_id}_0_log.out", sys.stdout), Tail(folder / f"{job_id}_0_log.err", sys.stderr)
