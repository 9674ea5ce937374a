"""The plan of a config, as text or as plain values; answers without a GPU and without allocating the model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits
from simclr_dist.data.collection import load_collection, names_tars
from simclr_dist.data.remote.fetch import is_url
from simclr_dist.data.views.draws import PRESETS
from simclr_dist.preflight.plan.hardware import GAPS, GIB, RESERVED_BYTES, UTILISATION
from simclr_dist.preflight.plan.memory import checkpoint_bytes
from simclr_dist.preflight.plan.scaling import CPU_WORLD_SIZES, WORLD_SIZES, Machines, Scale, efficiency, fit, scale, verdict
from simclr_dist.preflight.plan.trace import Footprint, footprint
from simclr_dist.preflight.plan.traffic import log_traffic
from simclr_dist.system.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """What was found for a config on `world_size` ranks, and on others."""

    config: Config
    machines: Machines
    world_size: int
    samples: int
    shards: int | None  # bytes; None: not here
    side: int
    found: Footprint
    own: Scale
    fitting: Scale | None  # on as many ranks, with the fewest pieces that fit; None without a GPU
    scales: list[Scale]

    @property
    def total_steps(self) -> int:
        """Of the run."""
        return self.config.total_steps(self.samples)

    def values(self) -> dict[str, Any]:
        """Plain values for --json; bytes, seconds, FLOPs."""
        config, own, memory = self.config, self.own, self.own.memory
        assert memory is not None
        return {
            "world_size": self.world_size,
            "images": self.samples,
            "steps": self.total_steps,
            "steps_an_epoch": config.steps_per_epoch(self.samples),
            "warmup_steps": config.warmup_steps(self.samples),
            "peak_learning_rate": config.peak_lr,
            "global_batch_size": config.global_batch_size,
            "micro_batches": config.micro_batches,
            "negatives_an_anchor": 2 * (config.global_batch_size - 1),
            "parameters": {"encoder": self.found.encoder_parameters, "projector": self.found.projector_parameters},
            "flops_a_step_and_rank": own.flops,
            "memory": {**dataclasses.asdict(memory), "peak": memory.peak, "highest": memory.highest},
            "traffic": [dataclasses.asdict(part) for part in own.traffic],
            "traffic_at_log_steps": log_traffic(config, self.found, self.world_size).sent,
            "seconds_a_step": own.seconds,
            "compute_seconds": own.compute,
            "exchange_seconds": own.exchange,
            "fewest_micro_batches": self.fitting.micro_batches if self.fitting else None,
            "disk": {"shards": self.shards, "a_checkpoint": checkpoint_bytes(config, self.found)},
            "scales": [_scale_values(found, self) for found in self.scales],
            "verdict": verdict(self.scales, self.machines),
        }


def make_plan(config: Config, *, world_size: int = 1, samples: int | None = None, machines: Machines | None = None) -> Plan:
    """For `world_size` ranks; `samples` when the shards are not here.

    Raises ConfigError when the config cannot run (batch larger than the data, or not divided).
    """
    machines = machines or Machines(on_cuda=config.device != "cpu")
    where = config.data.shards
    here = Path(where).exists()
    samples = config.data.samples if samples is None else samples
    if samples is None:
        if not (here or is_url(where) or names_tars(where)):
            raise ConfigError(f"data.shards: {config.data.shards!r} is not here; give the number of images by --samples N")
        samples = len(load_collection(where))
    check_fits(config, samples, world_size)
    side = config.views.image_size or PRESETS[config.views.preset].image_size
    found = footprint(config, side)
    others = WORLD_SIZES if machines.on_cuda else CPU_WORLD_SIZES
    return Plan(
        config,
        machines,
        world_size,
        samples,
        sum(path.stat().st_size for path in Path(where).glob("*.tar")) if here else None,
        side,
        found,
        scale(config, found, side, world_size, machines),
        fit(config, found, side, world_size, machines) if machines.gpu else None,
        [fit(config, found, side, ranks, machines) for ranks in sorted({*others, world_size})],
    )


def plan(config: Config, *, world_size: int = 1, samples: int | None = None, machines: Machines | None = None) -> str:
    """The plan as plain text; `make_plan` says what it takes and raises."""
    return text(make_plan(config, world_size=world_size, samples=samples, machines=machines))


def text(made: Plan) -> str:
    """A table for people."""
    rows = [*_run_rows(made), *_memory_rows(made), *_traffic_rows(made), *_speed_rows(made), *_disk_rows(made)]
    return "\n".join([*(f"{name:28s}{value}" for name, value in rows), "", *_scale_lines(made)])


def _run_rows(made: Plan) -> list[tuple[str, str]]:
    config, samples, world_size, found = made.config, made.samples, made.world_size, made.found
    batch = config.global_batch_size
    piece = batch // config.micro_batches
    total, an_epoch = made.total_steps, config.steps_per_epoch(samples)
    warmup = config.warmup_steps(samples)
    return [
        ("images", f"{samples}; {an_epoch} steps an epoch, {samples % batch} left over (others every epoch)"),
        (
            "global batch",
            f"{batch} = {_count(config.micro_batches, 'micro-batch', 'es')} x {_count(world_size, 'rank')}"
            f" x {piece // world_size}",
        ),
        ("negatives an anchor", f"{2 * (batch - 1)}"),
        ("BatchNorm group", f"{piece} images, both views: one micro-batch over all ranks"),
        ("steps", f"{total} = {total / an_epoch:.1f} epochs, the first {warmup} warm-up"),
        ("peak learning rate", f"{config.peak_lr:.6g} ({config.optim.base_lr} by the {config.optim.lr_rule} rule)"),
        (
            "parameters",
            f"{found.parameters / 1e6:.2f} M (encoder {found.encoder_parameters / 1e6:.2f} M,"
            f" projector {found.projector_parameters / 1e6:.2f} M)",
        ),
    ]


def _memory_rows(made: Plan) -> list[tuple[str, str]]:
    config, memory = made.config, made.own.memory
    assert memory is not None
    piece = 2 * config.global_batch_size // (config.micro_batches * made.world_size)
    number = 8 if config.precision == "fp64" else 4
    rows = 2 * config.global_batch_size
    matrix = f" (the whole {rows} x {rows} matrix would be {_size(rows * rows * number)})"
    kept = ", blocks' inputs alone (activation_checkpointing)" if config.activation_checkpointing else ""
    lines = [
        ("weights", _size(memory.weights)),
        ("gradients", _size(memory.gradients) + (" (DDP's buckets included)" if made.world_size > 1 else "")),
        ("optimizer", f"not known for {config.optim.name}" if memory.optimizer is None else _size(memory.optimizer)),
        ("loss", f"{_size(memory.loss)}{matrix if rows * rows * number > memory.loss else ''}"),
        ("views", f"{_size(memory.views)}, as float32, of one step"),
        ("activations", f"{_size(memory.activations)} kept for the backward of {_count(piece, 'view')} at a time{kept}"),
        ("peak", f"{_size(memory.peak)}, in: {memory.highest}" + (" (compile may need less)" if config.compile else "")),
    ]
    table = [(f"memory a rank: {name}", value) for name, value in lines]
    if made.machines.gpu is not None:
        table.append((f"fits {made.machines.gpu.name}", _fit_text(made)))
    workers = config.data.workers
    saving = f"; rank 0 another {_size(memory.host_saving)} while it saves" if memory.host_saving else ""
    table.append(("ordinary memory a rank", f"{_size(memory.host)} of crops made ahead by {_count(workers, 'worker')}{saving}"))
    return table


def _fit_text(made: Plan) -> str:
    gpu, memory, fitting, own = made.machines.gpu, made.own.memory, made.fitting, made.config.micro_batches
    assert gpu is not None
    assert memory is not None
    assert fitting is not None
    assumed = f"assumed: {_size(RESERVED_BYTES)} for CUDA and NCCL, {100 * GAPS:.0f} % gaps"
    room = f"{_size(gpu.usable)} of {_size(gpu.memory)} ({assumed})"
    answer = "yes" if memory.peak <= gpu.usable else "NO"
    if fitting.micro_batches is None:
        return f"{answer}: {fitting.why}; {room}"
    other = (
        "" if fitting.micro_batches == own else f" (BatchNorm group {made.config.global_batch_size // fitting.micro_batches})"
    )
    return f"{answer}, with {own} micro_batches; the fewest that fit: {fitting.micro_batches}{other}; {room}"


def _traffic_rows(made: Plan) -> list[tuple[str, str]]:
    own, machines = made.own, made.machines
    if not own.traffic:
        return []
    table = []
    for part in own.traffic:
        text = f"{_size(part.sent):>11s} in {_count(part.calls, 'call')}"
        if machines.bandwidth is not None:
            text += f", {_time(part.seconds(machines.bandwidth, machines.latency, own.ranks))}"
        table.append((f"sent: {part.name}", text + (", beside the backward" if part.hidden else "")))
    table.append(("sent a step by each rank", f"{_size(sum(part.sent for part in own.traffic)):>11s}"))
    extra = log_traffic(made.config, made.found, own.ranks)
    table.append(("sent besides", f"{_size(extra.sent):>11s} at each log step (every {made.config.log.every})"))
    return table


def _speed_rows(made: Plan) -> list[tuple[str, str]]:
    own, machines, config = made.own, made.machines, made.config
    table = [("FLOPs a step and rank", f"{own.flops:.3e}")]
    if own.compute is not None:
        if machines.images_per_second is not None:
            why = f"as measured: {machines.images_per_second:g} images/s of one rank"
        else:
            assert machines.gpu is not None
            share = machines.utilisation or UTILISATION[config.precision]
            peak = machines.gpu.peak[config.precision] / 1e12
            why = f"assumed: {100 * share:g} % of {machines.gpu.name}'s {peak:g} TFLOP/s in {config.precision}"
        table.append(("time a step: compute", f"{_time(own.compute)} ({why})"))
    if own.exchange is not None and machines.bandwidth is not None and own.traffic:
        rate, latency = machines.bandwidth * 8 / 1e9, _time(machines.latency)
        table.append(
            ("time a step: exchange", f"{_time(own.exchange)} (a ring at {rate:g} Gbit/s, {latency} a call and doubling)")
        )
    if (seconds := own.seconds) is not None:
        speed, total = config.global_batch_size / seconds, made.total_steps
        table.append(("speed", f"{speed:.0f} images/s; {seconds * total / 3600:.1f} hours for {total} steps"))
        each = speed / own.ranks / max(config.data.workers, 1)
        table.append(("data", f"{_readers(config.data.workers)} must read and crop {each:.0f} images/s"))
    elif machines.gpu is not None and machines.gpu.peak and config.precision not in machines.gpu.peak:
        table.append(("speed", f"not known: {machines.gpu.name} has no {config.precision}; take fp16"))
    return table


def _disk_rows(made: Plan) -> list[tuple[str, str]]:
    keep, each = made.config.checkpoint, checkpoint_bytes(made.config, made.found)
    shards = "not known: they are not here" if made.shards is None else _size(made.shards)
    if each is None:
        return [("disk: shards", shards), ("disk: checkpoints", f"not known for {made.config.optim.name}")]
    saves = -(-made.total_steps // keep.every)
    kept = min(keep.keep_last, saves) + (made.total_steps // keep.keep_every if keep.keep_every else 0)
    exports = 1 + (made.total_steps // keep.export_every if keep.export_every else 0)
    encoder = made.found.parameters * (8 if made.config.precision == "fp64" else 4)
    return [
        ("disk: shards", shards),
        ("disk: checkpoints", f"{_size((kept + 1) * each)} at most: {kept} of {_size(each)}, and one that is being written"),
        ("disk: encoders", f"{_size(exports * encoder)}: {exports} of {_size(encoder)}"),
    ]


def _scale_lines(made: Plan) -> list[str]:
    where = f"the fewest pieces that fit {made.machines.gpu.name}" if made.machines.gpu else "the config's own pieces"
    lines = [f"on other numbers of ranks, with {where}:"]
    known = [found for found in made.scales if found.memory is not None]
    table = {name: [cell(found, made) for found in known] for name, cell in _COLUMNS.items()}
    table = {name: cells for name, cells in table.items() if _tells(name, cells)}
    widths = {name: max(len(name), *(len(cell) for cell in cells)) for name, cells in table.items()}
    lines.append("  ".join(["ranks", *(f"{name:>{width}s}" for name, width in widths.items())]))
    for found in made.scales:
        if found.memory is None:
            lines.append(f"{found.ranks:5d}  {found.why}")
            continue
        row = known.index(found)
        lines.append("  ".join([f"{found.ranks:5d}", *(f"{table[name][row]:>{width}s}" for name, width in widths.items())]))
    return [*lines, verdict(made.scales, made.machines)]


def _tells(name: str, cells: list[str]) -> bool:
    """Whether a column says more than what needs no knowing: one rank exchanges nothing, and is all of itself."""
    trivial = {"exchange": "0 ms", "of linear": "100 %"}.get(name)
    return any(cell not in ("?", trivial) for cell in cells) or "?" not in cells


def _scale_values(found: Scale, made: Plan) -> dict[str, Any]:
    if found.memory is None or found.micro_batches is None:
        return {"ranks": found.ranks, "why_not": found.why}
    batch, seconds = made.config.global_batch_size, found.seconds
    return {
        "ranks": found.ranks,
        "micro_batches": found.micro_batches,
        "images": found.images,
        "batch_norm_group": batch // found.micro_batches,
        "memory": found.memory.peak,
        "sent": sum(part.sent for part in found.traffic),
        "compute_seconds": found.compute,
        "exchange_seconds": found.exchange,
        "images_per_second": None if seconds is None else batch / seconds,
        "of_linear": efficiency(next((first for first in made.scales if first.seconds is not None), found), found),
        "hours": None if seconds is None else seconds * made.total_steps / 3600,
    }


_COLUMNS: dict[str, Callable[[Scale, Plan], str]] = {
    "pieces": lambda found, made: str(found.micro_batches),
    "images": lambda found, made: str(found.images),
    "group": lambda found, made: str(_scale_values(found, made)["batch_norm_group"]),
    "memory": lambda found, made: _size(_scale_values(found, made)["memory"]),
    "sent a step": lambda found, made: _size(_scale_values(found, made)["sent"]),
    "compute": lambda found, made: _time(found.compute),
    "exchange": lambda found, made: _time(found.exchange),
    "images/s": lambda found, made: _round(_scale_values(found, made)["images_per_second"]),
    "of linear": lambda found, made: _percent(_scale_values(found, made)["of_linear"]),
    "hours": lambda found, made: _round(_scale_values(found, made)["hours"]),
}


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending * (number != 1)}"


def _readers(workers: int) -> str:
    return f"each of a rank's {workers} workers" if workers > 1 else "a rank's one worker" if workers else "each rank"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"


def _size(size: float) -> str:
    if size < 2**10:
        return f"{size:.0f} B"
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < GIB else f"{size / GIB:.2f} GiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _round(number: float | None) -> str:
    return "?" if number is None else f"{number:.1f}" if number < 100 else f"{number:.0f}"
