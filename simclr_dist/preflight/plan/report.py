"""Report the plan of a config, as text or as plain values."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits
from simclr_dist.data.collection import expand, load_collection, names_tars
from simclr_dist.data.remote.fetch import is_url
from simclr_dist.data.views.draws import view_side
from simclr_dist.preflight.plan import scaling, trace
from simclr_dist.preflight.plan.hardware import GAPS, GIB, RESERVED_BYTES, UTILISATION, Gpu, Machines
from simclr_dist.preflight.plan.memory import checkpoint_bytes
from simclr_dist.preflight.plan.scaling import NoStep, Step, predict_fitting_step, predict_step
from simclr_dist.preflight.plan.traffic import log_traffic
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.state import saved_bytes


@dataclass(frozen=True)
class Plan:
    """Needs of a config on `world_size` ranks, and on other numbers."""

    config: Config
    machines: Machines
    world_size: int
    samples: int
    shards: int | None  # bytes; None: not on this machine
    footprint: trace.Footprint
    step: Step
    fitting: Step | NoStep | None  # on as many ranks, with the fewest micro-batches that fit; None without a GPU
    scales: list[Step | NoStep]

    def on(self, machines: Machines) -> "Plan":
        """Return the plan for other machines."""
        config, footprint, ranks = self.config, self.footprint, self.world_size
        others = scaling.WORLD_SIZES if machines.on_cuda else scaling.CPU_WORLD_SIZES
        return dataclasses.replace(
            self,
            machines=machines,
            step=predict_step(config, footprint, ranks, machines),
            fitting=predict_fitting_step(config, footprint, ranks, machines) if machines.gpu else None,
            scales=[predict_fitting_step(config, footprint, number, machines) for number in sorted({*others, ranks})],
        )

    @property
    def total_steps(self) -> int:
        """Return the steps of the run."""
        return self.config.total_steps(self.samples)

    def values(self) -> dict[str, Any]:
        """Return plain values for --json; bytes, seconds, FLOPs."""
        config, step, footprint, machines, gpu = self.config, self.step, self.footprint, self.machines, self.machines.gpu
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
            "parameters": {"encoder": footprint.encoder_parameters, "projector": footprint.projector_parameters},
            "flops_a_step_and_rank": step.flops,
            "memory": {**dataclasses.asdict(step.memory), "peak": step.memory.peak, "highest": step.memory.highest},
            "gpu": None if gpu is None else {"name": gpu.name, "budget": gpu.usable, "sheet": gpu.sheet},
            "measured": None if machines.measured is None else dataclasses.asdict(machines.measured),
            "traffic": [dataclasses.asdict(part) for part in step.traffic],
            "traffic_at_log_steps": log_traffic(config, footprint, self.world_size).sent,
            "seconds_a_step": step.seconds,
            "compute_seconds": step.compute,
            "exchange_seconds": step.exchange,
            "fewest_micro_batches": self.fitting.micro_batches if isinstance(self.fitting, Step) else None,
            "disk": {"shards": self.shards, "a_checkpoint": checkpoint_bytes(config, footprint)},
            "scales": [_scale_values(step, self) for step in self.scales],
            "verdict": scaling.verdict(self.scales, machines),
        }


def make_plan(config: Config, *, world_size: int = 1, samples: int | None = None, machines: Machines | None = None) -> Plan:
    """Plan a config. Give `samples` when the shards are not on this machine.

    Raises ConfigError when the config cannot run (batch larger than the data, or not divided).
    """
    machines = machines or Machines(on_cuda=config.device != "cpu")
    shards = config.data.shards
    samples = config.data.samples if samples is None else samples
    if samples is None and not (Path(shards).exists() or is_url(shards) or names_tars(shards)):
        raise ConfigError(f"data.shards: {shards!r} is not here; give the number of images by --samples N")
    samples = len(load_collection(shards, kind=config.data.kind)) if samples is None else samples
    check_fits(config, samples, world_size)
    footprint = trace.footprint(config, view_side(config.views.preset, config.views.image_size))
    step = predict_step(config, footprint, world_size, machines)
    return Plan(config, machines, world_size, samples, _shard_bytes(shards), footprint, step, None, []).on(machines)


def _shard_bytes(shards: str) -> int | None:
    """Return the size of the tars that `data.shards` names. None where they are not here."""
    tars = map(Path, expand(shards)) if names_tars(shards) else Path(shards).glob("*.tar")
    try:
        return sum(tar.stat().st_size for tar in tars) or None
    except OSError:
        return None


def text(plan: Plan) -> str:
    """Format a plan as a table for people."""
    rows = [*_run_rows(plan), *_memory_rows(plan), *_traffic_rows(plan), *_speed_rows(plan), *_disk_rows(plan)]
    return "\n".join([*(f"{name:28s}{value}" for name, value in rows), "", *_scale_lines(plan)])


_NO_NORM = "none: any number of micro-batches is the same gradient"


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    config, samples, world_size, footprint = plan.config, plan.samples, plan.world_size, plan.footprint
    batch = config.global_batch_size
    micro_batch, norms = batch // config.micro_batches, footprint.block_norms or footprint.other_norms
    total, an_epoch = plan.total_steps, config.steps_per_epoch(samples)
    warmup = config.warmup_steps(samples)
    return [
        ("images", f"{samples}; {an_epoch} steps an epoch, {samples % batch} left over (others every epoch)"),
        (
            "global batch",
            f"{batch} = {_count(config.micro_batches, 'micro-batch', 'es')} x {_count(world_size, 'rank')}"
            f" x {micro_batch // world_size}",
        ),
        ("negatives an anchor", f"{2 * (batch - 1)}"),
        ("BatchNorm group", f"{micro_batch} images, both views: one micro-batch over all ranks" if norms else _NO_NORM),
        ("steps", f"{total} = {total / an_epoch:.1f} epochs, the first {warmup} warm-up"),
        ("peak learning rate", f"{config.peak_lr:.6g} ({config.optim.base_lr} by the {config.optim.lr_rule} rule)"),
        (
            "parameters",
            f"{footprint.parameters / 1e6:.2f} M (encoder {footprint.encoder_parameters / 1e6:.2f} M,"
            f" projector {footprint.projector_parameters / 1e6:.2f} M)",
        ),
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    config, memory = plan.config, plan.step.memory
    views = 2 * config.global_batch_size // (config.micro_batches * plan.world_size)
    rows = 2 * config.global_batch_size
    matrix_bytes = rows * rows * config.number_bytes
    matrix = f" (the whole {rows} x {rows} matrix would be {_size(matrix_bytes)})"
    kept = ", blocks' inputs alone (activation_checkpointing)" if config.activation_checkpointing else ""
    less = " (compile may need less)" if config.compile else ""
    beside = "" if plan.machines.on_cuda else "; in the log Python and torch are in it, too"
    lines = [
        ("weights", _size(memory.weights)),
        ("gradients", _size(memory.gradients) + (" (DDP's buckets included)" if memory.gradients > memory.weights else "")),
        ("optimizer", f"not known for {config.optim.name}" if memory.optimizer is None else _size(memory.optimizer)),
        ("loss", f"{_size(memory.loss)}{matrix if matrix_bytes > memory.loss else ''}"),
        ("views", f"{_size(memory.views)}, as float32, of one step"),
        ("activations", f"{_size(memory.activations)} kept for the backward of {_count(views, 'view')} at a time{kept}"),
        ("peak", f"{_size(memory.peak)}, in: {memory.highest}{less}{beside}"),
    ]
    table = [(f"memory a rank: {name}", value) for name, value in lines]
    if plan.machines.gpu is not None:
        table.append((f"fits {plan.machines.gpu.name}", _fit_text(plan, plan.machines.gpu)))
    workers = config.data.workers
    saving = f"; rank 0 another {_size(memory.host_saving)} while it saves" if memory.host_saving else ""
    table.append(("ordinary memory a rank", f"{_size(memory.host)} of crops made ahead and in hand{saving}"))
    table.append(("shared memory a rank", f"{_size(memory.shared)} of it at most in /dev/shm, by {_count(workers, 'worker')}"))
    return table


def _fit_text(plan: Plan, gpu: Gpu) -> str:
    config, fitting = plan.config, plan.fitting
    less = f"{_size(RESERVED_BYTES)} for CUDA and NCCL, and {100 * GAPS:.0f} % of gaps: assumed"
    room, peak = f"the budget is its {_size(gpu.memory)} less {less}", plan.step.memory.peak
    need = f"{'yes' if peak <= gpu.usable else 'NO'}: needs {_size(peak)} of a budget of {_size(gpu.usable)}"
    if isinstance(fitting, NoStep):
        return f"{need}; {fitting.why}; {room}"
    assert fitting is not None
    fewest = str(fitting.micro_batches)
    if fitting.micro_batches != config.micro_batches:
        fewest += f" (BatchNorm group {config.global_batch_size // fitting.micro_batches})"
    return f"{need}, with {_count(config.micro_batches, 'micro-batch', 'es')}; the fewest that fit: {fewest}; {room}"


def _traffic_rows(plan: Plan) -> list[tuple[str, str]]:
    step, machines = plan.step, plan.machines
    if not step.traffic:
        return []
    table = []
    for part in step.traffic:
        text = f"{_size(part.sent):>11s} in {_count(part.calls, 'call')}"
        if machines.bandwidth is not None:
            text += f", {_time(part.seconds(machines.bandwidth, machines.latency, step.ranks))}"
        table.append((f"sent: {part.name}", text + (", beside the backward" if part.hidden else "")))
    table.append(("sent a step by each rank", f"{_size(sum(part.sent for part in step.traffic)):>11s}"))
    extra = log_traffic(plan.config, plan.footprint, step.ranks)
    table.append(("sent besides", f"{_size(extra.sent):>11s} at each log step (every {plan.config.log.every})"))
    return table


def _speed_rows(plan: Plan) -> list[tuple[str, str]]:
    step, machines, config = plan.step, plan.machines, plan.config
    table = [("FLOPs a step and rank", f"{step.flops:.3e}")]
    if step.compute is not None and machines.measured is None:
        if machines.images_per_second is not None:
            why = f"as measured: {machines.images_per_second:g} images/s of one rank"
        else:
            assert machines.gpu is not None
            share = machines.utilisation or UTILISATION[config.precision]
            peak = machines.gpu.peak[config.precision] / 1e12
            why = f"assumed: {100 * share:g} % of the {peak:g} TFLOP/s in {config.precision} of {machines.gpu.sheet}"
        table.append(("time a step: compute", f"{_time(step.compute)} ({why})"))
    if step.exchange is not None and machines.bandwidth is not None and step.traffic:
        rate, latency = machines.bandwidth * 8 / 1e9, _time(machines.latency)
        table.append(
            ("time a step: exchange", f"{_time(step.exchange)} (a ring at {rate:g} Gbit/s, {latency} a call and doubling)")
        )
    if (seconds := step.seconds) is not None:
        speed, total = config.global_batch_size / seconds, plan.total_steps
        shown = f"{_round(speed)} images/s"
        if (measured := machines.measured) is not None:
            views = "the shards" if plan.shards is not None else "random views, which nobody has to read or augment"
            who = f"{_count(measured.steps, 'step')} by {_count(measured.ranks, 'rank')} on {measured.where}, with {views}"
            shown = f"measured {shown} over {measured.seconds:.0f} s ({who})"
        table.append(("speed", f"{shown}: {_time(seconds * total)} for {_count(total, 'step')}"))
        workers = config.data.workers
        readers = f"each of a rank's {workers} workers" if workers > 1 else "a rank's one worker" if workers else "each rank"
        table.append(("data", f"{readers} must read and crop {speed / step.ranks / max(workers, 1):.0f} images/s"))
    elif machines.gpu is not None and machines.gpu.peak and config.precision not in machines.gpu.peak:
        table.append(("speed", f"not known: {machines.gpu.name} has no {config.precision}; take fp16"))
    return table


def _disk_rows(plan: Plan) -> list[tuple[str, str]]:
    each = checkpoint_bytes(plan.config, plan.footprint)
    shards = "not known: they are not here" if plan.shards is None else _size(plan.shards)
    if each is None:
        return [("disk: shards", shards), ("disk: checkpoints", f"not known for {plan.config.optim.name}")]
    kept, exports = plan.config.files_kept(plan.total_steps)
    _, encoder = saved_bytes(plan.config)
    return [
        ("disk: shards", shards),
        ("disk: checkpoints", f"{_size(kept * each)} at most: {kept} of {_size(each)}, with one that is being written"),
        ("disk: encoders", f"{_size(exports * encoder)}: {exports} of {_size(encoder)}"),
    ]


def _scale_lines(plan: Plan) -> list[str]:
    where = f"the fewest pieces that fit {plan.machines.gpu.name}" if plan.machines.gpu else "the config's own pieces"
    rows = [_scale_values(step, plan) for step in plan.scales]
    possible = [row for row in rows if "why_not" not in row]
    table = {}
    for name, (key, show) in _COLUMNS.items():
        cells = ["?" if row[key] is None else show(row[key]) for row in possible]
        trivial = {"exchange": "0 ms", "of linear": "100 %"}.get(name)  # of one rank
        if any(cell not in ("?", trivial) for cell in cells) or (cells and "?" not in cells):
            table[name] = cells
    widths = [max(map(len, [name, *cells])) for name, cells in table.items()]
    lines = ["  ".join(["ranks", *(f"{name:>{width}s}" for name, width in zip(table, widths, strict=True))])]
    for row in rows:
        cells = [cells[possible.index(row)] for cells in table.values()] if row in possible else []
        shown = [f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=False)] or [row["why_not"]]
        lines.append("  ".join([f"{row['ranks']:5d}", *shown]))
    return [f"on other numbers of ranks, with {where}:", *lines, scaling.verdict(plan.scales, plan.machines)]


def _scale_values(step: Step | NoStep, plan: Plan) -> dict[str, Any]:
    if isinstance(step, NoStep):
        return {"ranks": step.ranks, "why_not": step.why}
    batch, seconds = plan.config.global_batch_size, step.seconds
    first = next((other for other in plan.scales if isinstance(other, Step) and other.seconds is not None), step)
    return {
        "ranks": step.ranks,
        "micro_batches": step.micro_batches,
        "images": step.images,
        "batch_norm_group": batch // step.micro_batches,
        "memory": step.memory.peak,
        "sent": sum(part.sent for part in step.traffic),
        "compute_seconds": step.compute,
        "exchange_seconds": step.exchange,
        "images_per_second": None if seconds is None else batch / seconds,
        "of_linear": scaling.efficiency(first, step),
        "hours": None if seconds is None else seconds * plan.total_steps / 3600,
    }


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending * (number != 1)}"


def _size(size: float) -> str:
    if size < 2**10:
        return f"{size:.0f} B"
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < GIB else f"{size / GIB:.2f} GiB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{_round(seconds / 3600)} hours"


def _round(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


# Of the last table: heading, key of `_scale_values`, and how a value that is known is shown.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "pieces": ("micro_batches", str),
    "images": ("images", str),
    "group": ("batch_norm_group", str),
    "memory": ("memory", _size),
    "sent a step": ("sent", _size),
    "compute": ("compute_seconds", _time),
    "exchange": ("exchange_seconds", _time),
    "images/s": ("images_per_second", _round),
    "of linear": ("of_linear", lambda share: f"{100 * share:.0f} %"),
    "time": ("hours", lambda hours: _time(3600 * hours)),
}
