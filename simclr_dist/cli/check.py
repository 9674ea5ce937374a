"""Run the verb `check`. It tries what training needs on these machines, on new ranks or on those of torchrun and srun."""

import argparse
import os
import re
from collections.abc import Sequence

from simclr_dist.cli.exits import under_torchrun
from simclr_dist.cli.options import at_least
from simclr_dist.cli.train import count_gpus, tell_start
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import read_yaml
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.check.findings import NAMES, OF_A_CONFIG
from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, LostRankError, reason_of, say

HELP = "try what training needs on these machines (also under torchrun or srun)"
_PASSED_ON = ("only", "loss", "loss_args", "loss_call")  # to the ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist check`, beside the config's keys."""
    add = parser.add_argument
    add("config", nargs="?", help="YAML file whose model, shards and folder are checked (default: a small model)")
    add("--only", choices=NAMES, help="one check instead of all")
    add("--processes", type=at_least(1), help="ranks on this machine (default: one a GPU, or 2; 4 for --loss)")
    add("--loss", metavar="MODULE:NAME", help="check a contrastive loss of others instead, a class or a function, on CPUs")
    add("--loss-args", metavar="A=1,B=true", default="", help="what it is given")
    takes = "what it takes: z_a and z_b (default), both stacked, or these and the images' numbers as labels"
    add("--loss-call", choices=("views", "stacked", "labels"), help=takes)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check these machines; return the exit code. Start ranks for it unless this process is one. Raises UserError."""
    if under_torchrun():
        signals.die_with_torchrun()  # there is nothing to save: Ctrl-C kills torchrun, and with it all ranks
    if overrides and arguments.config is None:
        raise ConfigError(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.only in OF_A_CONFIG and arguments.config is None:
        raise ConfigError(f"--only {arguments.only}: has nothing to look at without a CONFIG, which names it")
    if arguments.loss and (arguments.config or arguments.only):
        raise ConfigError("--loss: looks at that loss alone; leave CONFIG and --only out")
    if not arguments.loss and (arguments.loss_args or arguments.loss_call):
        raise ConfigError("--loss-args and --loss-call: are for a --loss MODULE:NAME, which is missing")
    if not re.fullmatch(r"[\w.]+:\w+", arguments.loss or "no:loss"):
        raise ConfigError(f"--loss {arguments.loss}: is not MODULE:NAME, such as lightly.loss:NTXentLoss")
    if not re.fullmatch(r"(\w+=[^,=]+(,(?=.)|$))*", arguments.loss_args):
        raise ConfigError(f"--loss-args {arguments.loss_args}: is not NAME=VALUE,NAME=VALUE")
    config = load_config(arguments.config, overrides) if arguments.config else None
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        import submitit

        from simclr_dist.launch.slurm.job import rank_variables

        os.environ["SUBMITIT_EXECUTOR"] = "slurm"  # as in submitit's own jobs: by this submitit knows where it is
        # It asks for the job's nodes, of which this step may have only some.
        os.environ |= {f"SLURM_JOB_{name}": os.environ[f"SLURM_STEP_{name}"] for name in ("NODELIST", "NUM_NODES")}
        os.environ |= rank_variables(submitit.JobEnvironment())
    if "WORLD_SIZE" in os.environ:
        return _as_rank(config, arguments)
    words = [f"--{key.replace('_', '-')}={value}" for key in _PASSED_ON if (value := getattr(arguments, key))]
    command = ["-m", "simclr_dist", "check", *([arguments.config] if arguments.config else []), *words, *overrides]
    processes = arguments.processes or (4 if arguments.loss else max(2, count_gpus(config or Config())))
    tell_start(processes)
    return torchrun(processes, command)


def _as_rank(config: Config | None, arguments: argparse.Namespace) -> int:
    with signals.uncollected():
        import torch.distributed as dist

        from simclr_dist.preflight.check.audit import ForeignLoss, audit_ranks
        from simclr_dist.preflight.check.checks import check_ranks

    try:
        if arguments.loss:
            settings = read_yaml(f"{{{arguments.loss_args.replace('=', ': ')}}}", "--loss-args")
            good, report = audit_ranks(ForeignLoss(arguments.loss, settings, arguments.loss_call or "views"))
        else:
            good, report = check_ranks(config, [arguments.only] if arguments.only else NAMES)
    except (dist.DistError, LostRankError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        say(f"rank {os.environ.get('RANK')}: the ranks do not meet at {where}: {reason_of(error)}")
        return 1
    if report:
        print(report, flush=True)
    return 0 if good else 1
