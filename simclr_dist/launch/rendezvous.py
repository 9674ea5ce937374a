"""Find the address at which a run's machines meet. It is for machines that no scheduler brings together."""

import errno
import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import Any

from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, PassingError, StoppedError, reason_of, say
from simclr_dist.system.slurm_job import job_id

_SAY_SECONDS = 10.0


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
    """Return torchrun's options for several machines. Raises ConfigError for an endpoint that is none.

    Raises PassingError when this machine knows no way to it, or its port is in use here. Inside a SLURM job a way is looked for
    as long as the others may wait; a stop signal meanwhile raises StoppedError.
    """
    host, _, port = nodes.endpoint.rpartition(":")
    began, spoken = time.monotonic(), False
    while True:
        try:
            local, is_host = _way(host, int(port))
            break
        except (ValueError, OverflowError, PermissionError) as error:
            line = f"--rdzv-endpoint: {nodes.endpoint!r} is no HOST:PORT that can be used from here: {error}"
            raise ConfigError(line) from None
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            waited = time.monotonic() - began
            if in_use or job_id() is None or waited > 60 * nodes.wait_minutes:
                what = f"{reason_of(error)}; name the machine as all of them know it"
                if in_use:
                    what = "the port is in use on this machine; take another, on all of them, or end what has it"
                raise PassingError(f"--rdzv-endpoint: {nodes.endpoint!r}: {what}") from None
            if waited > _SAY_SECONDS and not spoken:
                spoken = True
                again = f"looked for again, {nodes.wait_minutes:g} minutes at most"
                say(f"--rdzv-endpoint: {nodes.endpoint!r}: {reason_of(error)}; {again}")
        if number := signals.requested():
            raise StoppedError(f"{signals.name(number)} before the machines had met")
        time.sleep(1.0)
    return [
        f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.endpoint}", "--rdzv-id=simclr_dist",
        f"--rdzv-conf=is_host={int(is_host)}", f"--local-addr={local}",
    ]  # fmt: skip


def _way(host: str, port: int) -> tuple[str, bool]:
    """Find this machine's address for the others. Return also whether it hosts the rendezvous.

    torchrun would guess both from this machine's name. The guess is wrong where the name stands for 127.0.1.1, as on Debian, or
    for nothing.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: it only looks for the way
        local = str(probe.getsockname()[0])
    is_host = _can_listen(family, address)
    # By the same name the others will find a better address.
    return host if is_host and ipaddress.ip_address(address[0]).is_loopback else local, is_host


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
