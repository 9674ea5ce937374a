"""Run the verb `plan`. It prints what a config will need, before it runs."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from simclr_dist.cli.exits import under_torchrun
from simclr_dist.cli.options import add_settings, settings_from
from simclr_dist.cli.train import tell_start
from simclr_dist.config.load import load_config
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.plan.settings import PlanSettings
from simclr_dist.system.signals import die_with_torchrun, uncollected

HELP = "what a config will need, before it runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist plan`, beside the config's keys."""
    parser.add_argument("config", help="YAML file")
    add_settings(parser, PlanSettings, gpu="NAME", bandwidth="RATE", latency="TIME", utilisation="SHARE")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print what the config needs; return the exit code. `overrides`: the config's `--key value`. Raises UserError."""
    settings = settings_from(PlanSettings, arguments)
    config = load_config(arguments.config, overrides)
    machines = settings.machines(config)
    if settings.measure and "WORLD_SIZE" not in os.environ:
        tell_start(settings.processes)
        return torchrun(settings.processes, ["-m", "simclr_dist", *sys.argv[1:]])
    if under_torchrun():
        die_with_torchrun()  # there is nothing to save
    with uncollected():
        from simclr_dist.preflight.plan.report import make_plan, text

    ranks = int(os.environ["WORLD_SIZE"]) if settings.measure else settings.processes
    plan = make_plan(config, world_size=ranks, samples=settings.samples, machines=machines)
    if settings.measure:
        from simclr_dist.method.distributed import lost_ranks_named, process_group
        from simclr_dist.preflight.plan.measure import measure

        with lost_ranks_named(), process_group(config.device, config.first_step_timeout_minutes) as world:
            plan = plan.on(dataclasses.replace(machines, measured=measure(plan, world)))
        if not world.is_main:
            return 0
    print(json.dumps(plan.values(), indent=2) if arguments.json else text(plan))
    return 0
