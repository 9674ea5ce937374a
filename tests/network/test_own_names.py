"""Machines that take themselves for 127.0.1.1, as Debian's installer writes it into /etc/hosts."""

import os
import sys
from pathlib import Path

import pytest

from network.namespaces import Network

NAMES = ("n1", "n2")


@pytest.mark.slow
def test_check_reaches_them_all_the_same(network: Network, tmp_path: Path) -> None:
    """The next rank is reached by the address by which this machine knows the other."""
    command = [sys.executable, "-m", "simclr_dist", "check", "--only", "network"]
    meeting = {"MASTER_ADDR": "n1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0", "WORLD_SIZE": "4"}
    nodes = []
    for rank in range(4):
        name, other = NAMES[rank // 2], NAMES[1 - rank // 2]
        if rank % 2 == 0:
            (tmp_path / name).write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{network.addresses[other]} {other}\n")
            network.call(name, "mount", "--bind", tmp_path / name, "/etc/hosts")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "OMP_NUM_THREADS": "1"}
        nodes.append(network.run(name, *command, env={**os.environ, **meeting, **place}))
    printed = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0] * 4, printed
    assert "ports: each of 4 ranks reaches the next" in printed[0][0]
    assert "n1 takes itself for 127.0.1.1" in printed[0][0]
