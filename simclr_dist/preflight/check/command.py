"""Every check in turn, on all ranks, and one table."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.launch.slurm import settings
from simclr_dist.method.distributed import World, all_gather_objects, world
from simclr_dist.method.model import build_simclr
from simclr_dist.preflight.check import disks, machines
from simclr_dist.preflight.check.findings import NAMES, OF_A_CONFIG, Finding, failed, table
from simclr_dist.preflight.check.gradient import SMALL, gradient_report
from simclr_dist.preflight.plan.memory import OPTIMIZER_BUFFERS
from simclr_dist.system import signals, stdout
from simclr_dist.system.errors import LAST_WORD, ConfigError, RankError, UserError


def run_checks(config: Config | None, here: World, only: Sequence[str] = NAMES) -> tuple[list[Finding], str]:
    """(findings, the table of gradients), the same on all ranks. Shards and run folder are those of `config`."""
    findings: list[Finding] = []
    details = ""
    for name, look in (("versions", machines.versions), ("network", machines.network), ("clock", machines.clock)):
        if name in only:
            findings += look(here)
    if "gradient" in only:
        details, exact = gradient_report(config or SMALL, here)
        findings.append(_gradient(here, exact))
    if config is not None and "shards" in only:
        findings += disks.shards(config, here)
    seconds = 0.0
    if config is not None and ("folder" in only or "slurm" in only):
        seen, seconds = disks.folder(config, here, _checkpoint_bytes(config))
        findings += seen if "folder" in only else []
    if "slurm" in only:
        findings += all_gather_objects(_slurm(seconds) if here.is_main else [])[0]
    return findings, details


def _gradient(here: World, exact: bool) -> Finding:
    if not exact:
        cure = "a driver, a library or a device computes wrongly here: compare `--only gradient --processes 2` on each machine"
        return Finding("gradient", "failure", "the distributed gradient is not one process's", cure)
    if here.size == 1:
        cure = "start it with --processes 2, under torchrun or srun"
        return Finding("gradient", "warning", "one process: nothing is distributed", cure)
    return Finding("gradient", "ok", "the distributed gradient is one process's")


def _slurm(checkpoint_seconds: float) -> list[Finding]:
    looked, dangers = settings.dangers(checkpoint_seconds)
    if not looked:
        return [Finding("slurm", "ok", "no SLURM here")]
    if not dangers:
        return [
            Finding("slurm", "ok", f"{looked}: a stop leaves time for a checkpoint ({checkpoint_seconds:.0f} s), and requeues")
        ]
    return [Finding("slurm", "failure" if d.fatal else "warning", f"{looked}: {d.found}", d.cure) for d in dangers]


def _checkpoint_bytes(config: Config) -> float:
    with torch.device("meta"):
        model = build_simclr(**config.model.shape)
    number = 8 if config.precision == "fp64" else 4
    return float(sum(p.numel() for p in model.parameters()) * number * (1 + OPTIMIZER_BUFFERS.get(config.optim.name, 2)))


def main(argv: Sequence[str]) -> int:
    """`[CONFIG] [--only NAME] [--key value ...]`; returns the exit code: 0, or 1 when a check has failed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.die_with(os.getppid())  # there is nothing to save: Ctrl-C kills torchrun, and with it all ranks
    parser = argparse.ArgumentParser(prog="simclr-dist check", allow_abbrev=False, add_help=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--only", choices=NAMES)
    known, overrides = parser.parse_known_args(argv)
    try:
        if known.config is None and (overrides or known.only in OF_A_CONFIG):
            raise ConfigError(f"{' '.join(argv)}: has no effect without a CONFIG")
        config = load_config(known.config, overrides) if known.config else None
        asked = config or SMALL
        device = asked.device
        if device == "auto" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            device = "cpu"  # more ranks than GPUs prove the same
        with stdout.checked(), world(device, asked.timeout_minutes) as here:
            findings, details = run_checks(config, here, [known.only] if known.only else NAMES)
            if here.is_main:
                print(f"{details}\n\n{table(findings)}" if details else table(findings), flush=True)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"simclr-dist: {error}", file=sys.stderr)
        return _final(2)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = str(error).splitlines()[0]
        print(f"simclr-dist: rank {os.environ.get('RANK')}: the ranks do not meet at {where}: {said}", file=sys.stderr)
        return 1
    return _final(1 if failed(findings) else 0)


def _final(code: int) -> int:
    """The launcher, if there is one, is told by a file: to torchrun any code but 0 is a crash, which it reports at length."""
    if code and (path := os.environ.get(LAST_WORD)):
        Path(path).write_text(str(code))
        return 0
    return code
