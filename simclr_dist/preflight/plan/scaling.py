"""Predict a step's time on many GPUs. Find the number beyond which more do not help."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.preflight.plan.hardware import UTILISATION, Machines
from simclr_dist.preflight.plan.memory import Memory, rank_memory
from simclr_dist.preflight.plan.trace import Footprint
from simclr_dist.preflight.plan.traffic import Traffic, step_traffic

WORLD_SIZES = (1, 8, 64, 512)
CPU_WORLD_SIZES = (1, 2, 4, 8)
_BACKWARD_SHARE = 2 / 3  # of a micro-batch's time; DDP exchanges gradients beside it
_WORTH_IT = 0.5  # of the speed of one GPU times their number


@dataclass(frozen=True)
class Step:
    """A step on `ranks` ranks; None where a value is unknown."""

    ranks: int
    micro_batches: int
    images: int  # of a micro-batch on a rank
    memory: Memory
    traffic: list[Traffic]
    flops: float
    compute: float | None
    exchange: float | None

    @property
    def seconds(self) -> float | None:
        """Return the seconds of the step."""
        if self.compute is None or self.exchange is None:
            return None
        return self.compute + self.exchange


@dataclass(frozen=True)
class NoStep:
    """A number of ranks on which the config cannot run."""

    ranks: int
    why: str


def step_flops(config: Config, footprint: Footprint, ranks: int) -> float:
    """Count the floating-point operations of a rank's step, loss included."""
    views = 2 * config.global_batch_size // ranks
    passes = footprint.first.flops(views) + (footprint.without_graph.flops(views) if config.micro_batches > 1 else 0)
    # One process computes a tile for its rows and its columns, but for exact pieces.
    products = 4 if ranks == 1 and config.deterministic != "exact" else 6
    return passes + products * views * 2 * config.global_batch_size * footprint.embedding_size


def predict_step(config: Config, footprint: Footprint, ranks: int, machines: Machines, measured: Config | None = None) -> Step:
    """Predict a step on `ranks` ranks. `measured`: the config whose speed `machines` has, where it is another."""
    traffic = step_traffic(config, footprint, ranks, on_cuda=machines.on_cuda)
    flops = step_flops(config, footprint, ranks)
    gpu, compute, exchange = machines.gpu, None, None
    if (trial := machines.measured) is not None:  # which says nothing of other ranks or pieces
        if ranks == trial.ranks and measured in (None, config):
            compute, exchange = trial.seconds / trial.steps, 0.0
    elif machines.images_per_second is not None:  # one rank's, for the whole global batch
        flops_of_one = step_flops(measured or config, footprint, 1)
        compute = config.global_batch_size / machines.images_per_second * flops / flops_of_one
    elif gpu is not None and config.precision in gpu.peak:
        compute = flops / (gpu.peak[config.precision] * (machines.utilisation or UTILISATION[config.precision]))
    if ranks == 1:
        exchange = 0.0
    elif machines.bandwidth is not None:
        times = {part: part.seconds(machines.bandwidth, machines.latency, ranks) for part in traffic}
        hidden = sum(time for part, time in times.items() if part.hidden)
        beside = _BACKWARD_SHARE * (compute or 0) / config.micro_batches
        exchange = sum(times.values()) - min(hidden, beside)
    memory = rank_memory(config, footprint, ranks, on_cuda=machines.on_cuda)
    images = config.global_batch_size // (ranks * config.micro_batches)
    return Step(ranks, config.micro_batches, images, memory, traffic, flops, compute, exchange)


def predict_fitting_step(config: Config, footprint: Footprint, ranks: int, machines: Machines) -> Step | NoStep:
    """Predict a step with the fewest micro-batches that fit the GPU. Without a GPU: at least the config's number."""
    local, rest = divmod(config.global_batch_size, ranks * config.piece)
    if rest:
        by = f", {config.piece} at a time" if config.piece > 1 else ""
        return NoStep(ranks, f"{config.global_batch_size} images cannot be dealt to {ranks}{by}")
    for pieces in (pieces for pieces in range(1, local + 1) if local % pieces == 0):
        cut = dataclasses.replace(config, micro_batches=pieces)
        if machines.gpu is None:
            fits = pieces >= config.micro_batches
        else:
            fits = rank_memory(cut, footprint, ranks, on_cuda=machines.on_cuda).peak <= machines.gpu.usable
        if fits:
            return predict_step(cut, footprint, ranks, machines, config)
    return NoStep(ranks, f"does not fit {machines.gpu.name if machines.gpu else 'memory'} in any number of pieces")


def efficiency(one: Step, many: Step) -> float | None:
    """Return `many`'s speed as a share of linear scaling from `one`."""
    if one.seconds is None or many.seconds is None:
        return None
    return one.seconds / (many.seconds * many.ranks / one.ranks)


def verdict(steps: Sequence[Step | NoStep], machines: Machines) -> str:
    """Say where the config stops scaling, and why."""
    possible = [step for step in steps if isinstance(step, Step)]
    timed = [step for step in possible if step.seconds is not None]
    if len(timed) < 2:
        return _unknown(possible, machines)
    first = timed[0]
    last = [step for step in timed if (efficiency(first, step) or 0) >= _WORTH_IT][-1]
    beyond = next((step for step in steps if step.ranks > last.ranks), None)
    if beyond is None:
        share = 100 * (efficiency(first, last) or 0)
        return f"scales to {last.ranks}: {share:.0f} % of {last.ranks // first.ranks} x {first.ranks}"
    if isinstance(beyond, NoStep):
        return f"scales to {last.ranks}; {beyond.ranks}: {beyond.why}"
    assert machines.bandwidth is not None
    times = {part: part.seconds(machines.bandwidth, machines.latency, beyond.ranks) for part in beyond.traffic}
    worst = max(times, key=lambda part: times[part])
    of_bytes = worst.seconds(machines.bandwidth, 0.0, beyond.ranks)
    by_bytes = of_bytes > times[worst] - of_bytes
    what = "its bytes" if by_bytes else f"the latency of its {worst.calls} calls"
    share = 100 * (efficiency(first, beyond) or 0)
    return (
        f"stops after {last.ranks}: {beyond.ranks} reach {share:.0f} % of {beyond.ranks // first.ranks} x {first.ranks};"
        f" most of the exchange is {worst.name} ({what}), beside {beyond.images} images a rank and piece"
    )


def _unknown(possible: list[Step], machines: Machines) -> str:
    if machines.measured is not None:
        return "other numbers of ranks are not measured: --processes measures them"
    cures = []
    if all(step.compute is None for step in possible):
        cures.append("--gpu NAME or --images-per-second" if machines.on_cuda else "--images-per-second")
    if machines.bandwidth is None:
        cures.append("--bandwidth")
    if not cures:
        return "there is no other number of ranks to compare with"
    what = "speed and network are" if len(cures) > 1 else "network is" if cures == ["--bandwidth"] else "speed is"
    return f"{what} not known: {' and '.join(cures)} would say where it stops"
