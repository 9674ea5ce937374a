"""Log files that are still being written."""

import codecs
from pathlib import Path
from typing import TextIO


class Tail:
    """Copies what a file has, and what it gets, to a stream; the file may come later."""

    def __init__(self, path: Path, to: TextIO) -> None:
        self._path, self._to = path, to
        self._read = 0  # bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may come in two parts

    def copy(self) -> bool:
        """Copy what is new; whether there was anything."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return False
        self._read += len(new)
        self._to.write(self._decoder.decode(new))
        self._to.flush()
        return bool(new)


def tails(folder: Path, job_id: str, out: TextIO, err: TextIO) -> tuple[Tail, Tail]:
    """The two logs of a job's rank 0, of all its starts, and of its batch script."""
    return Tail(folder / f"{job_id}_0_log.out", out), Tail(folder / f"{job_id}_0_log.err", err)
