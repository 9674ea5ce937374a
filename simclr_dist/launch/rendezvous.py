"""Where the machines of a run meet, without a scheduler."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from simclr_dist.system.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """The machines of a run; every one of them is given the same values."""

    least: int
    most: int
    endpoint: str  # HOST:PORT of the machine that hosts the rendezvous
    wait_minutes: float = 30.0  # for the others to come, at the start and after each loss

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


def torchrun_options(nodes: Nodes) -> list[str]:
    """torchrun's options for a run of several machines.

    Whether the rendezvous is here, and by which address the others know us, torchrun would guess from this machine's name:
    wrong where that stands for 127.0.1.1, as Debian has it, or for nothing. Raises ConfigError when the endpoint is no address
    that this machine knows a way to.
    """
    host, _, port = nodes.endpoint.rpartition(":")
    try:
        family, _, _, _, there = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing: it only looks for the way
            here = str(probe.getsockname()[0])
        is_host = _can_listen(family, there)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--rdzv-endpoint: {nodes.endpoint!r} is no HOST:PORT that can be used from here: {error}") from None
    if is_host and ipaddress.ip_address(there[0]).is_loopback:
        here = host  # the others were given this name too, and will have a better address for it
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={nodes.endpoint}",
        "--rdzv-id=simclr_dist",
        f"--rdzv-conf=is_host={int(is_host)}",
        f"--local-addr={here}",
    ]


def _can_listen(family: int, address: Any) -> bool:
    """Whether the address is one of this machine; OSError when its port is in use."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
        return True
