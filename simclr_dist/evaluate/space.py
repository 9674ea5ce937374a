"""Make space for features in memory, or in a mapped file. Its pages are the system's to keep."""

import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simclr_dist.system.errors import reason_of, say

IN_MEMORY_BYTES = 2**29


def empty(rows: int, columns: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return an uninitialised array [rows, columns].

    More than `IN_MEMORY_BYTES` lie in a file without a name in TMPDIR, or /var/tmp, which is gone with the array. Where there
    is no room for it they are held in memory, with a warning.
    """
    size = rows * columns * np.dtype(dtype).itemsize
    if size <= IN_MEMORY_BYTES:
        return np.empty((rows, columns), dtype)
    folder = os.environ.get("TMPDIR") or "/var/tmp"  # /tmp may be memory itself
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill us when a page is written
            return np.memmap(file, dtype, "r+", shape=(rows, columns)).view(np.ndarray)
    except OSError as error:
        more = f"{folder}: no room for {size / 2**30:.3g} GiB of features: {reason_of(error)}"
        say(f"{more}; they are held in memory, unless TMPDIR names a folder on a larger disk", "WARNING: ")
        return np.empty((rows, columns), dtype)
