"""Compare a run's shared memory with what this machine has. Quick to import."""

from typing import Literal

from simclr_dist.config.settings import Config
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.data.portions import MORE_SHARED_MEMORY, SHARED_MEMORY, Cut, shared_memory
from simclr_dist.data.views.draws import view_side
from simclr_dist.preflight.check.findings import Finding

_MIB = 2**20


def cut(config: Config, ranks: int) -> Cut:
    """Return the portions of a step on one of `ranks` ranks."""
    micro_batch = config.global_batch_size // (config.micro_batches * ranks)
    side, pixel_bytes = view_side(config.views.preset, config.views.image_size), Kind(*config.data.kind).pixel_bytes
    return Cut(config.micro_batches, micro_batch, side, pixel_bytes)


def compare(config: Config, ranks: int, local_ranks: int, *, pinned: bool) -> Finding:
    """Compare what workers share with what is there.

    `local_ranks` of all `ranks` are on this machine. A failure cannot work; a warning may.
    """
    least, most = (local_ranks * size for size in cut(config, ranks).shared_bytes(config.data.workers, pinned=pinned))
    size, free = shared_memory()
    need = f"{local_ranks} x {config.data.workers} workers share up to {most / _MIB:.1f} MiB"
    if most <= free:
        return Finding("memory", "ok", f"data.workers: {need}, which {SHARED_MEMORY} has")
    level: Literal["warning", "failure"] = "failure" if least > size else "warning"
    there = f"{SHARED_MEMORY} has {size / _MIB:.1f} MiB, {free / _MIB:.1f} of them free"
    seen = f"data.workers: {need}, {least / _MIB:.1f} MiB at least; {there}"
    return Finding("memory", level, seen, MORE_SHARED_MEMORY)
