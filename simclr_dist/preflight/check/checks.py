"""Run every check in turn, on all ranks, into one table."""

import os
from collections.abc import Sequence

import torch

from simclr_dist.config.settings import Config
from simclr_dist.launch.slurm import settings
from simclr_dist.method.distributed import World, all_gather_objects, process_group
from simclr_dist.preflight.check import disks, machines
from simclr_dist.preflight.check.findings import NAMES, Finding, failed, table
from simclr_dist.preflight.check.gradient import SMALL, check_loss, gradient_report
from simclr_dist.train.state import saved_bytes


def run_checks(config: Config | None, world: World, only: Sequence[str] = NAMES) -> tuple[list[Finding], str]:
    """Run the checks in `only` for `config`. Returns (findings, table of gradients), the same on all ranks."""
    findings: list[Finding] = []
    details = ""
    for name, check in (("versions", machines.versions), ("network", machines.network), ("clock", machines.clock)):
        if name in only:
            findings += check(world)
    if config is not None and "versions" in only:
        findings += machines.precision(config, world)
    if config is not None and config.compile and "versions" in only:
        findings += machines.compiler(config, world)
    if "gradient" in only:
        details, exact = gradient_report(config or SMALL, world)
        findings += [_gradient(world, exact), check_loss(config or SMALL, world)]
    if config is not None and "shards" in only:
        findings += disks.shards(config, world)
    if config is not None and "memory" in only:
        findings += machines.memory(config, world)
    seconds = 0.0
    if config is not None and ("folder" in only or "slurm" in only):
        of_folder, seconds = disks.folder(config, world, *saved_bytes(config))
        findings += of_folder if "folder" in only else []
    if "slurm" in only:
        findings += all_gather_objects(_slurm(seconds) if world.is_main else [])[0]
    return findings, details


def _gradient(world: World, exact: bool) -> Finding:
    if not exact:
        cure = "a driver, a library or a device computes wrongly here: compare `--only gradient --processes 2` on each machine"
        return Finding("gradient", "failure", "the distributed gradient is not one process's", cure)
    if world.size == 1:
        cure = "start it with --processes 2, under torchrun or srun"
        return Finding("gradient", "warning", "one process: nothing is distributed", cure)
    return Finding("gradient", "ok", "the distributed gradient is one process's")


def _slurm(checkpoint_seconds: float) -> list[Finding]:
    place, dangers = settings.dangers(checkpoint_seconds)
    if not place:
        return [Finding("slurm", "ok", "no SLURM here")]
    if not dangers:
        enough = f"{place}: a stop leaves time for a checkpoint ({checkpoint_seconds:.0f} s), and requeues"
        return [Finding("slurm", "ok", enough)]
    return [Finding("slurm", "failure" if d.fatal else "warning", f"{place}: {d.problem}", d.cure) for d in dangers]


def check_ranks(config: Config | None, only: Sequence[str]) -> tuple[bool, str]:
    """Run the checks on all ranks. Returns (all is well, rank 0's report, else ''). Raises UserError and torch's DistError."""
    chosen = config or SMALL
    device = chosen.device
    if device == "auto" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        device = "cpu"  # more ranks than GPUs prove the same
    with process_group(device, chosen.timeout_minutes) as world:
        findings, details = run_checks(config, world, only)
        report = f"{details}\n\n{table(findings)}" if details else table(findings)
        return not failed(findings), report if world.is_main else ""
