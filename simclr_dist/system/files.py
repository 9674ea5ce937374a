"""Write whole files, append whole lines, and lock files."""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes, allowed: Callable[[], None] = lambda: None) -> None:
    """Replace a file by `content`. A kill leaves the old or the new one.

    `allowed` is called when the content is safe on disk, just before it replaces the old file. If it raises, the old file
    stays. Raises OSError when the disk does not take the content; no temporary file is left.
    """
    with replacing(path, allowed) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, allowed: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` unless the block raises."""
    # A random name, not the process id: processes on two machines may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        allowed()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, content: bytes) -> None:
    """Append `content` to `path`, all or nothing. Raises OSError when the disk does not take it."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:
                content = content[os.write(file.fileno(), content) :]
        except OSError:
            file.truncate(end)
            raise


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file (flock); False where another process has locked it.

    The kernel ends the lock with `unlock`, or when the file's last descriptor is closed, so also with the process. With `wait`
    it waits until the file is free. Raises OSError on a file system that has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """End the lock, also for children's copies of the descriptor. OSError like `lock`."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
