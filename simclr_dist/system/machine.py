"""Ask what this machine has: cores, memory, processes, bfloat16, a compiler. Rule its threads."""

import math
import os
import resource
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path

from simclr_dist.system.errors import ConfigError

_GROUPS, _MINE, _CPUINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/cpuinfo")


def cores() -> int:
    """Count the cores that this process may use. Its affinity bounds them, and the quotas of its control groups."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with suppress(OSError):
        for line in _MINE.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):  # version 2 names none
                group = _GROUPS / ("cpu" if controllers else "") / path[1:]
                # A container sees its own group as the topmost, under a path that may be the host's.
                counts += [_quota(each) for each in (group, *group.parents)]
    return min(counts)


def threads_a_rank(ranks: int) -> int:
    """Return each rank's threads where `ranks` share this machine's cores."""
    return max(1, cores() // ranks)


def wait_without_spinning() -> None:
    """Let threads that wait sleep soon. It holds for what is loaded later, and for children; a user's own value wins.

    The OpenMP of torch's wheels (libgomp; KMP_BLOCKTIME is another's) spins for some ms after each region. Where anybody else
    needs the core, a loader's worker or another rank, the thread that all wait for does not get it. 1,000 turns, some ten
    microseconds, cost nobody, and an idle machine misses hardly one of the short waits (benchmarks/threads.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for another OpenMP


def _quota(group: Path) -> int:
    """Return how many cores a control group may use. A part of a core counts as one: held back, threads still use it."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
        with suppress(OSError, ValueError):  # not there; "max"
            quota, period = (int(number) for file in files for number in (group / file).read_text().split())
            if quota > 0:  # -1: none
                return math.ceil(quota / period)
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the bytes of memory, of the container if it has less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(_GROUPS / "memory.max")])


def most_processes() -> int:
    """Return how many processes a program may have, at the very most."""
    most = [*_limits(Path("/proc/sys/kernel/pid_max")), *_limits(_GROUPS / "pids.max"), 2**22]
    of_user = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return min([*most, of_user]) if os.geteuid() and of_user != resource.RLIM_INFINITY else min(most)


def most_open_files() -> int:
    """Return how many files a process may have open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**20 if most == resource.RLIM_INFINITY else most


def _limits(path: Path) -> list[int]:
    with suppress(OSError, ValueError):  # it is not there, or says "max"
        return [int(path.read_text())]
    return []


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 by instructions of its own. True where it does not say."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return True
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return not words or not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def cpp_compiler() -> str:
    """Find the C++ compiler that torch.compile takes for CPUs. Raises ConfigError where it, or Python's headers, is missing."""
    name = os.environ.get("CXX") or "g++"
    missing = "" if shutil.which(name) else f"a C++ compiler: {name!r} is not found (CXX names another)"
    if not Path(header := sysconfig.get_path("include"), "Python.h").is_file():
        missing = missing or f"Python's headers: {header} has no Python.h (the package is called python3-dev, or the like)"
    if missing:
        raise ConfigError(f"compile: true: needs {missing}; install it, or set compile: false")
    return name
