"""A disk of a few pages that can be filled to the last byte and made read-only.

It is a tmpfs in a mount namespace of its own, whose first process reads a pipe that the test holds: with the pipe's end, for
whatever reason, the kernel takes the mount away.
"""

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE = 4096  # bytes; a tmpfs gives out whole pages
_MOUNT = 'mount -t tmpfs -o size="$1" small "$2" && echo up && exec cat'


def why_not() -> str:
    """Why there can be no such disk here, in a line; empty where there can be one."""
    if os.geteuid() != 0:
        return "mounting needs root"
    missing = [program for program in ("unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"mount namespaces are not allowed here: {tried.stderr.strip()}"


class SmallDisk:
    """`pages` pages at `mount_point`, a folder that exists; a context manager.

    `path` reaches the disk from any process. Where a program resolves links (which leads out of the namespace), start it with
    `enter` before its name: it then finds the disk at `mount_point`.
    """

    def __init__(self, mount_point: Path, pages: int) -> None:
        self.mount_point = mount_point
        self._size = pages * PAGE

    def __enter__(self) -> Self:
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT, "sh", str(self._size)]
        self._first = subprocess.Popen(
            [*command, str(self.mount_point)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "up\n":
            self.close()
            raise AssertionError("the disk could not be mounted")
        self.path = Path(f"/proc/{self._first.pid}/root{self.mount_point}")
        self.enter = ["nsenter", "--target", str(self._first.pid), "--mount"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The disk is gone, once no process that was started with `enter` is left."""
        self._first.communicate()

    def free(self) -> int:
        """Bytes that it can still take, in whole pages."""
        about = os.statvfs(self.path)
        return about.f_bavail * about.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take all pages but `leave`."""
        self.clear()
        if (size := self.free() - leave * PAGE) > 0:
            with (self.path / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        assert self.free() == min(self.free(), leave * PAGE)

    def clear(self) -> None:
        """Give back what `fill` took."""
        (self.path / "ballast").unlink(missing_ok=True)

    def set_read_only(self, on: bool) -> None:
        """As an administrator does, or the kernel after an error of the disk."""
        remount = ["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.mount_point)]
        subprocess.run([*self.enter, *remount], check=True)
