"""What worker processes make ahead, and how their failures reach the reader."""

import os
import signal

import pytest
import torch

from simclr_dist.data.workers import Loader
from simclr_dist.system.errors import DataError, RankError, WorkerError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


def fails_at_5(index: int) -> int:
    if index == 5:
        raise DataError("image 5: not an image")
    return index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_failure_is_one_error_in_its_place(workers: int, batch_size: int | None) -> None:
    loader: Loader[object] = Loader(fails_at_5, range(8), workers=workers, batch_size=batch_size, collate=torch.tensor)
    items: list[object] = []

    def read() -> None:
        for item in loader:
            items.extend(item.tolist() if isinstance(item, torch.Tensor) else [item])

    with pytest.raises(RankError, match=r"^image 5: not an image$"):
        read()
    assert items == [0, 1, 2, 3, 4][: 4 if batch_size else 5]
    assert loader.abandoned


def test_a_dead_worker_is_one_error() -> None:
    reader = os.getpid()

    def make(index: int) -> int:
        if index == 5:
            assert os.getpid() != reader
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    with pytest.raises(WorkerError, match="DataLoader worker died"):
        list(Loader(make, range(100), workers=1))
