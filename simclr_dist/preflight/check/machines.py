"""Check a run's machines against each other. Call on all ranks; all get the same findings."""

import importlib.metadata
import os
import platform
import socket
import statistics
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import replace

import torch

from simclr_dist import __version__
from simclr_dist.config.settings import Config
from simclr_dist.data.views.compiled import compile_colour
from simclr_dist.method.distributed import World, all_gather, all_gather_objects, local_ranks
from simclr_dist.method.precision import precision_problem
from simclr_dist.preflight import shared_memory
from simclr_dist.preflight.check.findings import Finding, place_of
from simclr_dist.system.errors import ConfigError, reason_of
from simclr_dist.train.learner import kernel_problem

_PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "pillow", "torch-optimizer", "safetensors")
_PAYLOAD_BYTES = 4 * 2**20
_CONNECT_SECONDS = 5.0
_SKEW_SECONDS = 1.0


def versions(world: World) -> list[Finding]:
    """Check that all ranks have the same Python, packages and device."""
    mine = {"simclr_dist": __version__, "python": platform.python_version()}
    mine |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    mine["device"] = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    findings = []
    gathered = all_gather_objects((place_of(world.rank), mine))
    for name in mine:
        hosts_of = defaultdict(list)
        for host, theirs in gathered:
            hosts_of[theirs[name]].append(host)
        if len(hosts_of) > 1:
            versions = "; ".join(f"{version} on {_few(hosts)}" for version, hosts in hosts_of.items())
            cure = "take devices of one kind" if name == "device" else "install the same constraints.txt everywhere"
            findings.append(Finding("versions", "failure", f"{name}: {versions}", cure))
    same = f"the same on {world.size} ranks: torch {mine['torch']}, simclr_dist {mine['simclr_dist']}, {mine['device']}"
    return findings or [Finding("versions", "ok", same)]


def compiler(config: Config, world: World) -> list[Finding]:
    """Compile on every machine what `compile: true` does there. Colour in C++ for CPUs, a kernel for a GPU."""
    problem, on_cpu = "", world.device.type == "cpu"
    try:
        if on_cpu:
            compile_colour()
        else:
            kernel_problem(config, 0, world)
    except ConfigError as error:
        problem = str(error)
    seen = [f"{place}: {problem}" for place, problem in all_gather_objects((place_of(world.rank), problem)) if problem]
    return [Finding("versions", "failure", line) for line in seen] or [
        Finding("versions", "ok", f"{'C++' if on_cpu else 'Triton'} compiles")
    ]


def precision(config: Config, world: World) -> list[Finding]:
    """Find the ranks whose device cannot compute as the config says."""
    problems = all_gather_objects((place_of(world.rank), precision_problem(config.precision, world.device)))
    return [Finding("versions", "failure", f"{place}: {problem}") for place, problem in problems if problem]


def network(world: World) -> list[Finding]:
    """Check names and ports of the hosts, and measure the all-gather."""
    if world.size == 1:
        return [Finding("network", "ok", "one process: nothing to exchange")]
    small, large = torch.zeros(1, device=world.device), torch.zeros(_PAYLOAD_BYTES // 4, device=world.device)
    findings = _names(world) + _ports(world)
    latency, time_of_large = _seconds(small, world, 20), _seconds(large, world, 5)
    rate = (world.size - 1) * _PAYLOAD_BYTES / max(time_of_large - latency, 1e-9) * 8 / 1e9
    doublings = max(1, (world.size - 1).bit_length())
    speed = (
        f"all-gather of 4 MiB a rank: {1e3 * time_of_large:.1f} ms, {rate:.2f} Gbit/s into each rank; of 4 bytes:"
        f" {1e6 * latency:.0f} us (`plan --bandwidth {rate:.2g}Gbit --latency {1e6 * latency / doublings:.0f}us`)"
    )
    return [*findings, Finding("network", "ok", speed)]


def clock(world: World) -> list[Finding]:
    """Compare clocks with rank 0's: all machines write timestamps."""
    rounds = []
    for _ in range(5):
        all_gather_objects(None)  # all ranks leave it at nearly the same time
        times = all_gather_objects(time.time())
        rounds.append([seconds - times[0] for seconds in times])
    hosts = all_gather_objects(place_of(world.rank))
    skew, host = max((abs(statistics.median(skews)), host) for *skews, host in zip(*rounds, hosts, strict=True))
    if skew > _SKEW_SECONDS:
        return [Finding("clock", "warning", f"{host} is {skew:.1f} s away from {hosts[0]}", "set the clocks by NTP (chrony)")]
    return [Finding("clock", "ok", f"at most {1e3 * skew:.0f} ms apart")]


def memory(config: Config, world: World) -> list[Finding]:
    """Compare each machine's shared memory with what its workers need."""
    finding = shared_memory.compare(config, world.size, local_ranks(), pinned=world.device.type == "cuda")
    findings = all_gather_objects((place_of(world.rank), finding))
    place, worst = max(findings, key=lambda pair: ("ok", "warning", "failure").index(pair[1].level))
    return [worst if worst.level == "ok" else replace(worst, seen=f"{place}: {worst.seen}")]


def _names(world: World) -> list[Finding]:
    hosts = sorted(set(all_gather_objects(socket.gethostname())))
    unknown = []
    for host in hosts if len(hosts) > 1 else ():
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except OSError as error:
            unknown.append(f"{socket.gethostname()} does not know {host} ({reason_of(error)})")
            continue
        if host == socket.gethostname() and all(address.startswith("127.") for address in addresses):
            unknown.append(f"{host} takes itself for {' '.join(sorted(addresses))}")
    problems = sorted({line for lines in all_gather_objects(unknown) for line in lines})
    if not problems:
        return [Finding("network", "ok", f"names of {len(hosts)} machine{'s' * (len(hosts) > 1)}: {_few(hosts)}")]
    cure = "names in DNS or in every /etc/hosts; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the device between the machines"
    # Only a warning: the ranks have met, by an address.
    return [Finding("network", "warning", line, cure) for line in problems]


def _ports(world: World) -> list[Finding]:
    """Connect to a port of the next rank. NCCL and gloo do so too."""
    with closing(socket.create_server(("", 0))) as listener:
        listener.settimeout(_CONNECT_SECONDS)
        addresses = all_gather_objects((_address(), listener.getsockname()[1]))
        host, port = addresses[(world.rank + 1) % world.size]
        # That is rank 0's machine, by a name that stands for 127.0.1.1 there, as on Debian. From here it has an address.
        neighbour = (_master() if host.startswith("127.") else host, port)
        problem = None
        try:
            socket.create_connection(neighbour, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            problem = f"{place_of(world.rank)} cannot reach {neighbour[0]}:{neighbour[1]} ({reason_of(error)})"
        problems = [line for line in all_gather_objects(problem) if line is not None]
    cure = "open the ports above 1024 between the machines, or name the right device by NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME)"
    if problems:
        return [Finding("network", "failure", line, cure) for line in problems]
    return [Finding("network", "ok", f"ports: each of {world.size} ranks reaches the next")]


def _address() -> str:
    """Return this machine's address towards rank 0, or its name."""
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((_master(), 9))  # sends nothing: it only picks the network device
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _master() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _seconds(tensor: torch.Tensor, world: World, times: int) -> float:
    """Measure an all-gather: median seconds on the slowest rank."""
    seconds = []
    for _ in range(times + 2):
        begin = time.perf_counter()
        all_gather(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return float(max(all_gather_objects(statistics.median(seconds[2:]))))


def _few(hosts: list[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
