"""How fast a step is on 1 to many GPUs, and where more of them stop to help."""

import dataclasses
from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.preflight.plan.hardware import UTILISATION, Gpu
from simclr_dist.preflight.plan.memory import Memory, fewest_micro_batches, rank_memory
from simclr_dist.preflight.plan.trace import Footprint
from simclr_dist.preflight.plan.traffic import Traffic, embedding_size, step_traffic

WORLD_SIZES = (1, 8, 64, 512)
CPU_WORLD_SIZES = (1, 2, 4, 8)
_BACKWARD_SHARE = 2 / 3  # of a piece's time, beside which DDP exchanges gradients
_WORTH_IT = 0.5  # of the speed of one GPU times their number


@dataclass(frozen=True)
class Machines:
    """What the plan is made for, and the assumptions; bytes, seconds."""

    gpu: Gpu | None = None
    bandwidth: float | None = None  # of the slowest link of the ring
    latency: float = 20e-6
    utilisation: float | None = None  # None: hardware.UTILISATION
    images_per_second: float | None = None  # measured on one rank, with the config's own micro-batches
    on_cuda: bool = True
    threads: int = 1

    def compute_seconds(self, config: Config, flops: float, flops_measured: float, images_measured: int) -> float | None:
        """Of one rank's step; None when nothing is known of its speed."""
        if self.images_per_second is not None:
            return images_measured / self.images_per_second * flops / flops_measured
        if self.gpu is None or config.precision not in self.gpu.peak:
            return None
        return flops / (self.gpu.peak[config.precision] * (self.utilisation or UTILISATION[config.precision]))


@dataclass(frozen=True)
class Scale:
    """A step on `ranks` ranks; None is what is not known."""

    ranks: int
    micro_batches: int | None  # None: the batch cannot be cut for so many, or does not fit
    images: int  # of a piece on a rank
    memory: Memory | None
    traffic: list[Traffic]
    flops: float
    compute: float | None
    exchange: float | None
    why: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a step."""
        if self.compute is None or self.exchange is None:
            return None
        return self.compute + self.exchange


def step_flops(config: Config, found: Footprint, ranks: int) -> float:
    """Floating-point operations of one rank in a step: encoder and projector, and the products of the loss."""
    views = 2 * config.global_batch_size // ranks
    passes = found.first.flops(views) + (found.without_graph.flops(views) if config.micro_batches > 1 else 0)
    products = 4 if ranks == 1 else 6  # one process computes a tile for its rows and its columns
    return passes + products * views * 2 * config.global_batch_size * embedding_size(config, found)


def scale(config: Config, found: Footprint, side: int, ranks: int, machines: Machines, measured: Config | None = None) -> Scale:
    """The config as it is, on `ranks` ranks, which must divide its pieces; `measured` is that of the images_per_second."""
    traffic = step_traffic(config, found, ranks, on_cuda=machines.on_cuda)
    flops = step_flops(config, found, ranks)
    alone = config.global_batch_size
    compute = machines.compute_seconds(config, flops, step_flops(measured or config, found, 1), alone)
    exchange = None
    if ranks == 1:
        exchange = 0.0
    elif machines.bandwidth is not None:
        times = {part: part.seconds(machines.bandwidth, machines.latency, ranks) for part in traffic}
        hidden = sum(time for part, time in times.items() if part.hidden)
        beside = _BACKWARD_SHARE * (compute or 0) / config.micro_batches
        exchange = sum(times.values()) - min(hidden, beside)
    memory = rank_memory(config, found, side, ranks, on_cuda=machines.on_cuda, threads=machines.threads)
    images = config.global_batch_size // (ranks * config.micro_batches)
    return Scale(ranks, config.micro_batches, images, memory, traffic, flops, compute, exchange)


def fit(config: Config, found: Footprint, side: int, ranks: int, machines: Machines) -> Scale:
    """With the fewest pieces that fit the GPU, or where that is not known with the config's own."""
    batch = config.global_batch_size
    if batch % ranks:
        return Scale(ranks, None, 0, None, [], 0.0, None, None, f"{batch} images cannot be dealt to {ranks}")

    def fits(pieces: int) -> bool:
        if machines.gpu is None:
            return pieces >= config.micro_batches
        cut = dataclasses.replace(config, micro_batches=pieces)
        memory = rank_memory(cut, found, side, ranks, on_cuda=machines.on_cuda, threads=machines.threads)
        return memory.peak <= machines.gpu.usable

    pieces = fewest_micro_batches(config, ranks, fits)
    if pieces is None:
        where = machines.gpu.name if machines.gpu else "memory"
        return Scale(ranks, None, 0, None, [], 0.0, None, None, f"does not fit {where} in any number of pieces")
    return scale(dataclasses.replace(config, micro_batches=pieces), found, side, ranks, machines, config)


def efficiency(one: Scale, many: Scale) -> float | None:
    """Speed of `many` over that of `one`, a GPU."""
    if one.seconds is None or many.seconds is None:
        return None
    return one.seconds / (many.seconds * many.ranks / one.ranks)


def verdict(scales: list[Scale], machines: Machines) -> str:
    """Where it stops scaling, and why."""
    known = [found for found in scales if found.seconds is not None]
    if len(known) < 2:
        cures = []
        if all(found.compute is None for found in scales):
            cures.append("--gpu NAME or --images-per-second" if machines.on_cuda else "--images-per-second")
        if machines.bandwidth is None:
            cures.append("--bandwidth")
        if not cures:
            return "there is no other number of ranks to compare with"
        what = "speed and network are" if len(cures) > 1 else "network is" if cures == ["--bandwidth"] else "speed is"
        return f"{what} not known: {' and '.join(cures)} would say where it stops"
    first = known[0]
    good = [found for found in known if (efficiency(first, found) or 0) >= _WORTH_IT]
    last = good[-1]
    beyond = next((found for found in scales if found.ranks > last.ranks), None)
    if beyond is None:
        share = 100 * (efficiency(first, last) or 0)
        return f"scales to {last.ranks}: {share:.0f} % of {last.ranks // first.ranks} x {first.ranks}"
    if beyond.seconds is None:
        return f"scales to {last.ranks}; {beyond.ranks}: {beyond.why}"
    assert machines.bandwidth is not None
    worst = max(beyond.traffic, key=lambda part: part.seconds(machines.bandwidth or 1, machines.latency, beyond.ranks))
    bytes_time = worst.seconds(machines.bandwidth, 0.0, beyond.ranks)
    waits = worst.seconds(machines.bandwidth, machines.latency, beyond.ranks) - bytes_time
    what = "its bytes" if bytes_time > waits else f"the latency of its {worst.calls} calls"
    share = 100 * (efficiency(first, beyond) or 0)
    return (
        f"stops after {last.ranks}: {beyond.ranks} reach {share:.0f} % of {beyond.ranks // first.ranks} x {first.ranks};"
        f" most of the exchange is {worst.name} ({what}), beside {beyond.images} images a rank and piece"
    )
