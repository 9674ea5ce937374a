"""Run the verb `train`: start the ranks of a run. Also train as one of these ranks."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from simclr_dist.cli.exits import exit_code, under_torchrun
from simclr_dist.cli.options import add_keys, at_least
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.sweep import read_sweep
from simclr_dist.config.together import check_fits, check_machine
from simclr_dist.launch.rendezvous import Nodes
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.run.commands import printed
from simclr_dist.run.summary import is_run
from simclr_dist.run.sweep import check_sweep_folder, why_left
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError, PassingError, UserError, say
from simclr_dist.system.machine import wait_without_spinning
from simclr_dist.system.ranks import read_place
from simclr_dist.system.slurm_job import gpus_given
from simclr_dist.train.profiling import parse_profile, take_profile
from simclr_dist.train.session import PARENT

HELP = "pre-train an encoder (resumes by itself)"
_STOPPED = "simclr-dist: stopped by {signal} before the first step; the same command goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist train`, beside the config's keys."""
    add = parser.add_argument
    add("config", nargs="?", help="YAML file")
    add("-h", "--help", action="store_true", help="every setting, with its value in CONFIG")
    add("--processes", type=at_least(1), help="ranks on this machine (default: one a GPU, or 1)")
    add("--nnodes", type=_nodes, help="machines, N or MIN:MAX; the same command runs on each of them")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="with --nnodes: of the machine where they meet")
    add("--max-restarts", type=at_least(0), default=3, help="starts in a row without a new checkpoint before giving up (3)")
    add("--sweep", action="append", metavar="KEY=V,V", help="a run for each value, one after another; more give all pairs")
    add("--dry-run", action="store_true", help="with --sweep: check and list its runs, and start none")
    add("--profile", metavar="STEPS", help="trace 3 steps (or 10:13: 10 to 12) into RUN/profile, with a table")
    add("--profile-rank", default=None, metavar="R", help="with --profile: the rank, or all (default: 0)")
    parser.set_defaults(parser=parser)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Start the ranks on this machine; return the exit code. They start as often as the run needs. Raises UserError."""
    parser: argparse.ArgumentParser = arguments.parser
    if arguments.help:
        return _help(arguments.config, parser)
    if arguments.config is None:
        raise ConfigError("usage: simclr-dist train CONFIG [--processes N] [--key value ...]; --help lists every setting")
    read_place()  # one rank takes its place from the environment
    signals.listen()  # torch may be imported to count GPUs: seconds in which a signal would be the end
    if parent := os.environ.pop(PARENT, ""):  # which says in its own way what came of it
        signals.die_with(int(parent), signal.SIGTERM)
    if arguments.sweep:
        return _sweep(arguments, overrides)
    if arguments.dry_run:
        raise ConfigError("--dry-run: goes with --sweep, whose runs it lists; `simclr-dist plan CONFIG` says what one needs")
    return _checked(arguments, overrides, alone=arguments.nnodes is None and not parent)()


def _sweep(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train a sweep's runs one after another; return the highest exit code. What is done is passed over."""
    if arguments.nnodes is not None:
        raise ConfigError("--sweep: goes with one machine; for several, `simclr-dist submit --sweep` makes a job of each run")
    members = read_sweep(arguments.config, overrides, arguments.sweep, options=_options(arguments.parser))
    folder = Path(members[0].config.run_folder).parent
    check_sweep_folder(folder)
    starts = {}
    for member in members:
        if why := why_left(member.config):
            print(f"{member.name}: {why}")
        else:
            with member.named():
                starts[member.name] = _checked(arguments, member.overrides)
    if arguments.dry_run:
        for name in starts:
            print(folder / name)
        return 0
    worst = 0
    for number, (name, start) in enumerate(starts.items(), 1):
        print(f"run {number} of {len(starts)}: {name}", flush=True)
        if (code := start()) == PREEMPTED:
            return code
        worst = max(worst, code)
    from simclr_dist.evaluate.compare import compare, table

    runs = [run for member in members if is_run(run := Path(member.config.run_folder))]  # one may end before it has a folder
    if runs:
        print(table(compare(runs)))
    return worst


def _checked(arguments: argparse.Namespace, overrides: Sequence[str], *, alone: bool = False) -> Callable[[], int]:
    """Check all that can be refused; return what starts the ranks. A run `alone` tells what comes next. Raises UserError."""
    profile = parse_profile(arguments.profile, arguments.profile_rank)
    config = load_config(arguments.config, overrides, options=_options(arguments.parser))
    nodes = _meeting(arguments, config)
    from simclr_dist.data.views.draws import view_side
    from simclr_dist.run.folder import check_run_folder
    from simclr_dist.train.inputs import check_inputs

    check_run_folder(config, held=nodes is not None)  # the machines that this one joins may have begun
    machines = range(nodes.least, nodes.most + 1) if nodes else range(1, 2)
    samples = check_inputs(config, machines[0] * (arguments.processes or 1))  # before torch is imported to count GPUs
    gpus = count_gpus(config)
    given = gpus_given() if config.device != "cpu" else 0
    processes = arguments.processes or max(1, gpus, given)
    if gpus < processes <= given:
        what = f"{processes} ranks need a GPU each; of the {given} that SLURM gave, {gpus} are here"
        raise PassingError(f"device: {config.device!r}: {what}")
    if processes > gpus and (gpus or config.device == "cuda"):
        raise ConfigError(f"--processes: {processes} ranks need a GPU each, and this machine has {gpus}; or set device: cpu")
    for number in machines:
        check_fits(config, samples, number * processes)
        check_machine(config, view_side(config.views.preset, config.views.image_size), processes, number * processes)
    _check_shared_memory(config, machines[-1] * processes, processes, pinned=config.device != "cpu")
    command = ["-m", "simclr_dist.train", arguments.config, *(profile.options if profile else []), *overrides]

    def start() -> int:
        tell_start(processes)
        code = torchrun(processes, command, run := Path(config.run_folder), nodes=nodes, max_restarts=arguments.max_restarts)
        if alone and code != 2:  # the refusal has said what to do
            from simclr_dist.evaluate.compare import compare
            from simclr_dist.evaluate.status import next_commands

            with suppress(UserError, OSError):
                if commands := next_commands(compare([run]).rows[0]):
                    say(printed(*commands).removeprefix("\n"), "")
        return code

    return start


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name.removeprefix("--").replace("-", "_") for name in parser._option_string_actions if len(name) > 2]


def main(argv: Sequence[str]) -> int:
    """Train as one rank; return the exit code. `argv`: `CONFIG [--profile STEPS [--profile-rank R]] [--key value]`."""
    wait_without_spinning()
    return exit_code(lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    signals.listen()
    if under_torchrun():
        signals.die_with_torchrun()  # an agent that was killed leaves its ranks, with their GPUs, behind
    if not argv or argv[0].startswith("-"):
        raise ConfigError("usage: python -m simclr_dist.train CONFIG [--key value ...]")
    read_place()
    profile, overrides = take_profile(argv[1:])
    config = load_config(argv[0], overrides)
    # Under torchrun other ranks would wait for this one.
    with signals.uncollected() if under_torchrun() else signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.method.distributed import local_ranks, lost_ranks_named, process_group
        from simclr_dist.train.loop import train

    signals.listen()
    with lost_ranks_named(), process_group(config.device, config.first_step_timeout_minutes) as world:
        _check_shared_memory(config, world.size, local_ranks(), pinned=world.device.type == "cuda", warn=world.local_rank == 0)
        train(config, world, profile)
    return 0


def _check_shared_memory(config: Config, ranks: int, local_ranks: int, *, pinned: bool, warn: bool = False) -> None:
    """Refuse a machine whose shared memory is too small for a step."""
    from simclr_dist.preflight.shared_memory import compare

    finding = compare(config, ranks, local_ranks, pinned=pinned)
    if finding.level == "failure":
        raise ConfigError(f"{finding.seen}; {finding.cure}")
    if finding.level == "warning" and warn:
        say(f"WARNING: {finding.seen}; {finding.cure}")


def _nodes(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of machines nor MIN:MAX")
    return int(least), int(most)


def _meeting(arguments: argparse.Namespace, config: Config) -> Nodes | None:
    """Return where the machines of a run meet; None for one machine."""
    if arguments.nnodes is None:
        if arguments.rdzv_endpoint is not None:
            raise ConfigError("--rdzv-endpoint goes with --nnodes: say how many machines there are")
        return None
    if arguments.rdzv_endpoint is None:
        raise ConfigError("--nnodes needs --rdzv-endpoint HOST:PORT: one of the machines, and a free port there")
    least, most = arguments.nnodes
    return Nodes(least, most, arguments.rdzv_endpoint, config.first_step_timeout_minutes)


def count_gpus(config: Config) -> int:
    """Return the number of this machine's GPUs. It is 0 for a run on the CPU."""
    if config.device == "cpu":
        return 0
    with signals.uncollected():
        import torch

    return torch.cuda.device_count()


def tell_start(processes: int) -> None:
    """Print on a terminal that ranks are starting. Nothing else comes for as long as torch takes to load."""
    if sys.stderr.isatty():
        print(f"starting {processes} process{'es' * (processes > 1)}; loading torch takes a while", file=sys.stderr)


def _help(path: str | None, parser: argparse.ArgumentParser) -> int:
    """Print the options, then every setting. A setting has its values, its value in the config of `path`, and its meaning."""
    settings = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, formatter_class=parser.formatter_class)
    add_keys(settings, load_config(path) if path else Config(), spelled=lambda key: key.replace("_", "-"))
    parser.usage = "simclr-dist train CONFIG [options] [--key value ...]"
    examples, parser.epilog = parser.epilog, None
    print(parser.format_help())
    print("Settings, as YAML keys or --key value, the value as in YAML (true, null, '[0.2, 1.0]').")
    print(f"The defaults shown are {f'what {path} says' if path else 'those of an empty config'}.\n")
    print(settings.format_help().strip("\n"), examples, sep="\n\n")
    return 0
