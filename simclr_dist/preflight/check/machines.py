"""The machines of a world seen from each other: versions, names and ports, speed of the network, clocks.

Every function is called on all ranks and returns the same findings on all.
"""

import importlib.metadata
import os
import platform
import socket
import statistics
import time
from collections import defaultdict
from contextlib import closing
from typing import Any

import torch

from simclr_dist import __version__
from simclr_dist.method.distributed import World, all_gather, all_gather_objects
from simclr_dist.preflight.check.findings import Finding

_PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "pillow", "torch-optimizer", "safetensors")
_PAYLOAD_BYTES = 4 * 2**20
_CONNECT_SECONDS = 5.0
_SKEW_SECONDS = 1.0


def versions(here: World) -> list[Finding]:
    """Of Python and of all that decides a bit of the result, and the kind of device."""
    mine = {"simclr_dist": __version__, "python": platform.python_version()}
    mine |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    mine["device"] = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else platform.machine()
    findings = []
    every = all_gather_objects((_host(here), mine))
    for name in mine:
        holders = defaultdict(list)
        for host, seen in every:
            holders[seen[name]].append(host)
        if len(holders) > 1:
            said = "; ".join(f"{version} on {_few(hosts)}" for version, hosts in holders.items())
            cure = (
                "devices of one kind, or results differ" if name == "device" else "install the same constraints.txt everywhere"
            )
            findings.append(Finding("versions", "failure", f"{name}: {said}", cure))
    same = f"the same on {here.size} ranks: torch {mine['torch']}, simclr_dist {mine['simclr_dist']}, {mine['device']}"
    return findings or [Finding("versions", "ok", same)]


def network(here: World) -> list[Finding]:
    """Each host's name is known to all, a rank's port can be reached by its neighbour, and how fast all ranks gather."""
    if here.size == 1:
        return [Finding("network", "ok", "one process: nothing to exchange")]
    findings = _names(here) + _ports(here)
    return [*findings, _speed(here)]


def clock(here: World) -> list[Finding]:
    """Clocks against rank 0's: timestamps of ledger, heartbeat and logs come from all of them."""
    differences: list[list[float]] = [[] for _ in range(here.size)]
    for _ in range(5):
        all_gather_objects(None)  # all ranks come out of it at nearly the same time
        now = all_gather_objects(time.time())
        for rank, time_there in enumerate(now):
            differences[rank].append(time_there - now[0])
    hosts = all_gather_objects(_host(here))
    skew, host = max((abs(statistics.median(seen)), host) for seen, host in zip(differences, hosts, strict=True))
    if skew > _SKEW_SECONDS:
        return [Finding("clock", "warning", f"{host} is {skew:.1f} s away from {hosts[0]}", "set the clocks by NTP (chrony)")]
    return [Finding("clock", "ok", f"at most {1e3 * skew:.0f} ms apart")]


def _names(here: World) -> list[Finding]:
    hosts = sorted(set(all_gather_objects(socket.gethostname())))
    unknown = []
    for host in hosts if len(hosts) > 1 else ():
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except OSError as error:
            unknown.append(f"{socket.gethostname()} does not know {host} ({error.strerror})")
            continue
        if host == socket.gethostname() and all(address.startswith("127.") for address in addresses):
            unknown.append(f"{host} takes itself for {' '.join(sorted(addresses))}")
    said = sorted({line for lines in all_gather_objects(unknown) for line in lines})
    if not said:
        return [Finding("network", "ok", f"names of {len(hosts)} machine{'s' * (len(hosts) > 1)}: {_few(hosts)}")]
    cure = "names in DNS or in every /etc/hosts; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the device between the machines"
    # The ranks have met all the same, by an address.
    return [Finding("network", "warning", line, cure) for line in said]


def _ports(here: World) -> list[Finding]:
    """Rank r connects to a port that rank r + 1 has just opened: what a firewall would refuse, NCCL and gloo need."""
    with closing(socket.create_server(("", 0))) as listener:
        listener.settimeout(_CONNECT_SECONDS)
        address = (_own_address(), listener.getsockname()[1])
        addresses: list[Any] = all_gather_objects(address)
        there = addresses[(here.rank + 1) % here.size]
        problem = None
        try:
            with socket.create_connection(there, timeout=_CONNECT_SECONDS):
                pass
        except OSError as error:
            problem = f"{_host(here)} cannot reach {there[0]}:{there[1]} ({error.strerror or error})"
        problems = [said for said in all_gather_objects(problem) if said is not None]
    cure = "open the ports above 1024 between the machines, or name the right device by NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME)"
    if problems:
        return [Finding("network", "failure", line, cure) for line in problems]
    return [Finding("network", "ok", f"ports: each of {here.size} ranks reaches the next")]


def _own_address() -> str:
    """The address by which rank 0's machine is reached; this machine's name where that is not known."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((master, 9))  # sends nothing: it only looks for the way
            found = str(probe.getsockname()[0])
        # On rank 0's own machine the way there is the loopback device, which the others do not reach.
        return socket.gethostbyname(master) if found.startswith("127.") else found
    except OSError:
        return socket.gethostname()


def _speed(here: World) -> Finding:
    small, large = torch.zeros(1, device=here.device), torch.zeros(_PAYLOAD_BYTES // 4, device=here.device)
    latency, time_of_large = _seconds(small, here, 20), _seconds(large, here, 5)
    rate = (here.size - 1) * _PAYLOAD_BYTES / max(time_of_large - latency, 1e-9) * 8 / 1e9
    doublings = max(1, (here.size - 1).bit_length())
    return Finding(
        "network",
        "ok",
        f"all-gather of 4 MiB a rank: {1e3 * time_of_large:.1f} ms, {rate:.2f} Gbit/s into each rank; of 4 bytes:"
        f" {1e6 * latency:.0f} us (`plan --bandwidth {rate:.2g}Gbit --latency {1e6 * latency / doublings:.0f}us`)",
    )


def _seconds(tensor: torch.Tensor, here: World, times: int) -> float:
    """Of an all-gather, the slowest rank's median."""
    seconds = []
    for _ in range(times + 2):
        begin = time.perf_counter()
        all_gather(tensor)
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return float(max(all_gather_objects(statistics.median(seconds[2:]))))


def _host(here: World) -> str:
    return f"{socket.gethostname()} (rank {here.rank})"


def _few(hosts: list[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
