"""A disk of its own for a test that fills it; images, and a run on them to which nothing happens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.small_disk import SmallDisk, why_not
from faults.straight import images, run_on_2_ranks


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """64 pages; `@pytest.mark.parametrize("small_disk", [4096], indirect=True)` for another number."""
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "disk").mkdir()
    with SmallDisk(tmp_path / "disk", getattr(request, "param", 64)) as disk:
        yield disk


@pytest.fixture
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `straight`."""
    return images(tmp_path_factory.getbasetemp())


@pytest.fixture
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run to which nothing happens."""
    return run_on_2_ranks(tmp_path_factory.getbasetemp())
