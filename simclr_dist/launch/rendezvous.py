"""Find the address at which a run's machines meet. It is for machines that no scheduler brings together."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from simclr_dist.system.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """The machines of a run: the same values on each of them."""

    least: int
    most: int
    endpoint: str  # HOST:PORT of the machine that hosts the rendezvous
    wait_minutes: float = 30.0  # for the others to come, at the start and after each loss

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


def torchrun_options(nodes: Nodes) -> list[str]:
    """Return torchrun's options for several machines. Raises ConfigError when this one knows no way to the endpoint.

    torchrun would guess from this machine's name whether the rendezvous is here, and by which address the others reach us. The
    guess is wrong where the name stands for 127.0.1.1, as on Debian, or for nothing.
    """
    host, _, port = nodes.endpoint.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only looks for the way
            local = str(probe.getsockname()[0])
        is_host = _can_listen(family, address)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--rdzv-endpoint: {nodes.endpoint!r} is no HOST:PORT that can be used from here: {error}") from None
    if is_host and ipaddress.ip_address(address[0]).is_loopback:
        local = host  # the others have this name too, and will find a better address for it
    return [
        f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.endpoint}", "--rdzv-id=simclr_dist",
        f"--rdzv-conf=is_host={int(is_host)}", f"--local-addr={local}",
    ]  # fmt: skip


def _can_listen(family: int, address: Any) -> bool:
    """Return whether the address is this machine's. Raises OSError when its port is in use."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
        return True
