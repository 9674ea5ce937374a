"""Files that are whole or not there, and files that grow by whole pieces."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes, allowed: Callable[[], None] = lambda: None) -> None:
    """Put `content` at `path` so that a kill or power failure leaves the old file or the new one, never a part.

    `allowed` is called last, when the content is safe on disk and before it takes its place: what it raises leaves the old
    file. Raises OSError when the disk does not take the content; no temporary file is left.
    """
    with replacing(path, allowed) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, allowed: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """`write_atomically` of what is written into the file in the block; what the block raises leaves the old file."""
    # Not named by process id: two machines that write here may both be at number 7.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        allowed()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what has gone wrong before is what must be told
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append(path: Path, content: bytes) -> None:
    """Add `content` at the end of `path`, all of it or nothing: a full disk that takes a part of it has to give that back.

    Raises OSError when the disk does not take it.
    """
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:
                content = content[os.write(file.fileno(), content) :]
        except OSError:
            file.truncate(end)
            raise
