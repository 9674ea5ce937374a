"""Write whole files, append whole lines, lock files, read our JSON."""

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from simclr_dist.system.errors import DamagedError, reason_of

FILE_MODE = 0o666  # for os.open, less the umask, as for all other files: by it a group shares a folder
_MOST_BYTES = 16 << 20  # of a JSON file of ours
_MOST = 10**11  # no step, count or time of ours reaches it (a time would be in the year 5138)
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as `replacing` names it


def read_object(path: Path, kinds: Mapping[str, Any], cure: str = "") -> dict[str, Any]:
    """Read a JSON object that this program wrote. Return {} where there is no file. Raises DamagedError.

    `kinds` are as in `fitting`. `cure` ends the error's line.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
                raise ValueError(f"it is no file, or larger than {_MOST_BYTES >> 20} MiB")
            content = file.read()
        return fitting(json.loads(content.decode()), kinds)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged or cannot be read: {reason_of(error)}{cure and f'; {cure}'}") from None


def fitting(value: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value`, a dict with these keys and types. A key like "why?" may be missing. Raises ValueError for another."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    for key, kind in kinds.items():
        name = key.removesuffix("?")
        part = value.get(name)
        if name == key or name in value:
            number = isinstance(part, int | float)
            if name not in value or not isinstance(part, kind) or (number and not 0 <= part < _MOST):  # NaN is not between them
                raise ValueError(f"{name}: {repr(part)[:60] if name in value else 'is missing'}")
    return value


def json_lines(content: bytes, fit: Callable[[Any], dict[str, Any]]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its object, which `fit` checks. None stands for a damaged one.

    A last line that a kill cut short is left out.
    """
    for line in content.splitlines(keepends=True):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            if line.endswith(b"\n") or line.strip(b"\0")[:1] not in (b"", b"{"):
                yield line, None
            continue
        try:
            fitted = fit(value)
        except ValueError:
            fitted = None
        yield line, fitted


def keep_damaged(path: Path, content: bytes) -> Path:
    """Keep a damaged file's content under another name. Returns that."""
    copy = path.with_name(f"{path.name}.damaged-{hashlib.sha256(content).hexdigest()[:8]}")
    if not copy.exists():
        write_atomically(copy, content)
    return copy


def write_atomically(path: Path, content: bytes, allowed: Callable[[], None] = lambda: None) -> None:
    """Replace a file by `content`. A kill leaves the old or the new one.

    `allowed` is called when the content is safe on disk, just before it replaces the old file. If it raises, the old file
    stays. Raises OSError when the disk does not take the content; no temporary file is left.
    """
    with replacing(path, allowed) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, allowed: Callable[[], None] = lambda: None, *, new: bool = False) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` unless the block raises. What killed writers of `path` left is removed.

    A `new` one replaces nothing: raises FileExistsError where another process was quicker.
    """
    remove_leftovers(path.parent, glob.escape(path.name))
    file = _temporary_beside(path)
    temporary = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            allowed()
            _put(temporary, path, new=new)  # while it is locked: another writer of `path` would take it for a leftover
    except BaseException:  # a second Ctrl-C, too
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
    sync(path.parent)


def _put(temporary: Path, path: Path, *, new: bool) -> None:
    if new:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            pass
        else:
            temporary.unlink()
            return
    temporary.replace(path)


def remove_leftovers(folder: Path, names: str = "*") -> None:
    """Remove temporary files of killed writers in `folder`. They are of files `names`, a pattern. Live writers hold a lock."""
    for path in folder.glob(f".{names}.*.tmp"):
        with suppress(OSError):  # it is another user's, or gone, or there are no locks
            if _LEFTOVER.fullmatch(path.name) and path.is_file():
                with path.open("r+b") as file:
                    if lock(file.fileno()):
                        path.unlink()


def _temporary_beside(path: Path) -> BinaryIO:
    while True:
        # A random name, not the process id: processes on two machines may have the same.
        file = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp").open("xb")
        with suppress(OSError):  # no locks: then nobody takes it for a leftover either
            lock(file.fileno(), wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else it was taken for a leftover before it was locked
            return file
        file.close()


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
