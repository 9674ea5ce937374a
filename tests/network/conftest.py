"""Two machines on one, for one test."""

from collections.abc import Iterator

import pytest

from network.namespaces import Network, why_not


@pytest.fixture
def network() -> Iterator[Network]:
    """Nodes n1 and n2 on one switch, up in a tenth of a second."""
    if reason := why_not():
        pytest.skip(reason)
    with Network() as nodes:
        yield nodes
