"""Run the verb `plan`. It prints what a config will need, before it runs."""

import argparse
import json
from collections.abc import Sequence

from simclr_dist.cli.options import add_settings, settings_from
from simclr_dist.config.load import load_config
from simclr_dist.preflight.plan.settings import PlanSettings
from simclr_dist.system.signals import uncollected

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
    with uncollected():
        from simclr_dist.preflight.plan.report import make_plan, text

    plan = make_plan(config, world_size=settings.processes, samples=settings.samples, machines=machines)
    print(json.dumps(plan.values(), indent=2) if arguments.json else text(plan))
    return 0
