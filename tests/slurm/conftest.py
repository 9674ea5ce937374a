"""A SLURM cluster of its own for each test: it takes a second, and no test can leave another a sick node."""

from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster, why_not


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes; `@pytest.mark.parametrize("cluster", [{"grace": 5}], indirect=True)` changes what Cluster takes."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(**getattr(request, "param", {})) as started:
        yield started


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the cluster is slow."""
    for item in items:
        if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
