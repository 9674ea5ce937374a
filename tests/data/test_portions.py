"""The shared memory of a run, as it is counted, against what a real loader takes of a /dev/shm of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from faults.small_disk import PAGE, SmallDisk, why_not
from simclr_dist.data import portions
from simclr_dist.data.portions import Cut

# Reads one step and holds it, as a training does, until the workers are as far ahead as they may be.
LOADER = """
import os, sys, time, torch
from simclr_dist.data.portions import Cut
from simclr_dist.data.workers import Loader

micro_batches, images, side, workers = map(int, sys.argv[1:])
cut = Cut(micro_batches, images, side)
def portion(number):
    return [torch.zeros(cut.largest, 3, side, side, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(cut.largest).long()]
def taken():
    about = os.statvfs("/dev/shm")
    return (about.f_blocks - about.f_bfree) * about.f_frsize
each = len(cut.places)
loader = iter(Loader(portion, range(100), workers=workers, prefetch_factor=cut.prefetch(workers)))
hand = [next(loader) for _ in range(each)]
gathered = [next(loader) for _ in range(each)]
most, since = taken(), time.monotonic()
while time.monotonic() < since + 1:
    if taken() > most:
        most, since = taken(), time.monotonic()
print(most)
"""


@pytest.mark.parametrize(("cut", "workers"), [(Cut(1, 8, 100), 1), (Cut(3, 100, 64), 2), (Cut(1, 24, 16), 3)])
def test_the_count_is_what_a_loader_takes(cut: Cut, workers: int) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with SmallDisk(Path("/dev/shm"), 2**28 // PAGE) as shared:
        numbers = [cut.micro_batches, cut.images, cut.image_size, workers]
        command = [*shared.enter, sys.executable, "-W", "ignore", "-c", LOADER, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    least, most = cut.shared_bytes(workers, pinned=False)
    assert 0 <= int(done.stdout) - most < 32 * PAGE, "beside it a page of ours, and the queues' semaphores"
    assert least <= most / 3


def test_a_gpu_copies_at_once() -> None:
    cut = Cut(1, 256, 224)
    assert [len(cut.places), cut.largest] == [5, 52]
    assert cut.shared_bytes(4, pinned=False) == (5 * cut.portion_bytes, (4 * 2 + 10) * cut.portion_bytes)
    assert cut.shared_bytes(4, pinned=True) == (cut.portion_bytes, (4 * 2 + 1) * cut.portion_bytes)
    assert cut.shared_bytes(0, pinned=False) == (0, 0)
    assert Cut(2, 2048, 224).prefetch(4) == 38 * 2 // 4, "a step"


def test_shared_memory_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "SHARED_MEMORY", "/no/such/folder")
    assert portions.shared_memory() == (float("inf"), float("inf"))
