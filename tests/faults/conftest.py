"""A disk of its own for a test that fills it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.small_disk import SmallDisk, why_not


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """64 pages; `@pytest.mark.parametrize("small_disk", [4096], indirect=True)` for another number."""
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "disk").mkdir()
    with SmallDisk(tmp_path / "disk", getattr(request, "param", 64)) as disk:
        yield disk
