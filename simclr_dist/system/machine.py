"""Ask how much memory and how many processes this machine allows."""

import os
import resource
from contextlib import suppress
from pathlib import Path

_CONTAINER = Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """Return the bytes of memory, of the container if it has less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(_CONTAINER / "memory.max")])


def most_processes() -> int:
    """Return how many processes a program may have, at the very most."""
    most = [*_limits(Path("/proc/sys/kernel/pid_max")), *_limits(_CONTAINER / "pids.max"), 2**22]
    of_user = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return min([*most, of_user]) if os.geteuid() and of_user != resource.RLIM_INFINITY else min(most)


def _limits(path: Path) -> list[int]:
    with suppress(OSError, ValueError):  # it is not there, or says "max"
        return [int(path.read_text())]
    return []
