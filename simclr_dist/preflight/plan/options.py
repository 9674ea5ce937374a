"""What `simclr-dist plan` can be told, and what it prints; quick to import."""

import argparse
import json

from simclr_dist.config.arguments import at_least
from simclr_dist.config.load import load_config
from simclr_dist.preflight.plan import hardware
from simclr_dist.system.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simclr-dist plan`."""
    add = parser.add_argument
    add("config", help="YAML file")
    add("--processes", type=at_least(1), default=1, help="ranks in all (default: %(default)s)")
    add("--samples", type=at_least(1), help="images in the data set, when its shards are not here")
    add("--gpu", metavar="NAME", help="h100, a100-40, v100-16, ...; or its memory alone, like 24GiB")
    add("--bandwidth", metavar="RATE", help="of the slowest link between the ranks, like 25Gbit")
    add("--latency", metavar="TIME", help="with --bandwidth: of a collective, a doubling of ranks (20us)")
    add("--utilisation", type=_share, metavar="SHARE", help="of the GPU's peak that is reached, like 0.3")
    add("--images-per-second", type=_above_zero, metavar="N", help="measured on one rank, instead of a share")
    add("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Do what `add_arguments` were told, with `--key value` of the config in `overrides`; returns the exit code."""
    config = load_config(arguments.config, overrides)
    if arguments.gpu is not None and config.device == "cpu":
        raise ConfigError(f"--gpu: {arguments.gpu!r} has no effect with device: cpu; leave it out, or set device to auto")
    gpu = None if arguments.gpu is None else hardware.gpu(arguments.gpu)
    bandwidth = None if arguments.bandwidth is None else hardware.bandwidth(arguments.bandwidth)
    if arguments.latency is not None and bandwidth is None:
        raise ConfigError(f"--latency: {arguments.latency!r} has no effect without --bandwidth; give both, or leave it out")
    latency = hardware.seconds("20us" if arguments.latency is None else arguments.latency)
    if arguments.utilisation is not None and (gpu is None or not gpu.peak):
        raise ConfigError("--utilisation: is a share of a GPU's peak; name the GPU by --gpu, like h100")
    if arguments.utilisation is not None and arguments.images_per_second is not None:
        raise ConfigError("--utilisation: has no effect with --images-per-second, which was measured; leave one of them out")
    from simclr_dist.preflight.plan.report import make_plan, text
    from simclr_dist.preflight.plan.scaling import Machines

    machines = Machines(
        gpu, bandwidth, latency, arguments.utilisation, arguments.images_per_second, on_cuda=config.device != "cpu"
    )
    made = make_plan(config, world_size=arguments.processes, samples=arguments.samples, machines=machines)
    print(json.dumps(made.values(), indent=2) if arguments.json else text(made))
    return 0


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _share(text: str) -> float:
    value = _above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: is a share, from above 0 to 1")
    return value
