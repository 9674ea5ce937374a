"""Cut a rank's part of a step into portions. Count the shared memory that they take."""

import math
import mmap
import os
from dataclasses import dataclass

# A worker makes such a portion at a time, crops of both views. It bounds the memory of a worker and of what waits.
_PORTION_BYTES = 2**24
SHARED_MEMORY = "/dev/shm"
MORE_SHARED_MEMORY = "give it more (docker run --shm-size 16g or --ipc host, shm_size in compose), or take fewer workers"


@dataclass(frozen=True)
class Cut:
    """Portions of a step on one rank. `images` are those of one of its micro-batches."""

    micro_batches: int
    images: int
    image_size: int
    pixel_bytes: int = 3

    @property
    def largest(self) -> int:
        """Return the images of the largest portion."""
        most = max(1, _PORTION_BYTES // (2 * self.pixel_bytes * self.image_size**2))
        # No larger than it must be, so that a micro-batch's portions are alike.
        return -(-self.images // -(-self.images // most))

    @property
    def places(self) -> list[slice]:
        """Return each portion's place in the rank's images of a step."""
        size, count = self.largest, self.images
        return [
            slice(number * count + start, number * count + min(start + size, count))
            for number in range(self.micro_batches)
            for start in range(0, count, size)
        ]

    def prefetch(self, workers: int) -> int:
        """Return the portions that each worker makes ahead. Together they make two each, or a step."""
        return max(2, -(-len(self.places) // workers))

    def most(self, workers: int) -> int:
        """Return how many portions exist at a time.

        Those made ahead, of the step being gathered, and of the one in hand.
        """
        return (workers * self.prefetch(workers) if workers else 0) + 2 * len(self.places)

    @property
    def portion_bytes(self) -> int:
        """Return the bytes of the largest portion, in pages."""
        sizes = (*[self.pixel_bytes * self.image_size**2 * self.largest] * 2, 8 * self.largest)  # crops of both views, and rows
        return mmap.PAGESIZE * sum(-(-size // mmap.PAGESIZE) for size in sizes)

    def shared_bytes(self, workers: int, *, pinned: bool) -> tuple[int, int]:
        """Count a rank's shared memory. Returns (what it cannot do without, the most).

        On a CPU crops stay there until their step is done. For a GPU (`pinned`) they are copied to other memory at once.
        """
        if not workers:
            return 0, 0
        gathered = len(self.places)
        copied = 2 * gathered - 1 if pinned else 0
        return self.portion_bytes * (1 if pinned else gathered), self.portion_bytes * (self.most(workers) - copied)


def shared_memory() -> tuple[float, float]:
    """Return (size, free bytes) of this machine's shared memory. Both are inf where there is no limit."""
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:  # no Linux
        return math.inf, math.inf
    if not about.f_blocks:
        return math.inf, math.inf
    return about.f_frsize * about.f_blocks, about.f_frsize * about.f_bavail
