"""Run the verb `eval`. It measures an encoder, or each of a run as it comes, also on ranks that torchrun has started."""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, RESULT_PATTERN, Foreign, result_path
from simclr_dist.evaluate.settings import POLL, Settings, check_watch
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError, say
from simclr_dist.system.ranks import read_place

HELP = "measure an encoder: kNN and linear probe beside baselines"
_STOPPED = "simclr-dist: stopped by {signal}; the same command starts the evaluation again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist eval`."""
    add = parser.add_argument
    add("encoder", nargs="?", metavar="ENCODER", help=f"an exported encoder: {PATTERN}")
    add("--watch", metavar="RUN", help="evaluate every encoder of this run once, as it is exported, until the run has ended")
    add("--poll", type=float, metavar="SECONDS", help=f"with --watch: how often to look for encoders (default: {POLL:g})")
    train = "shards that kNN and the probe learn from; without any label: signals alone"
    add("--train", required=True, metavar="SHARDS", help=train)
    add("--test", required=True, metavar="SHARDS", help="shards that the accuracy is measured on")
    add_settings(parser, Settings, features="FOLDER", layer="LAYER", protocols="NAMES")
    add_settings(parser, Foreign, all_optional=True, arch="NAME", weights="FILE", prefix="PREFIX")
    add_device(parser)
    out = f"the result's file (default: {RESULT_PATTERN}); an older one of other settings is kept"
    add("--out", metavar="JSON", help=out)


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Evaluate encoders; return the exit code. Raises UserError, and SystemExit(75) at a stop signal: nothing to save."""
    read_place()
    foreign = _foreign(arguments)
    _check_what(arguments, foreign)
    settings = settings_from(Settings, arguments)
    if foreign is not None and settings.layer != "h":
        raise ConfigError(f"--layer: {settings.layer!r}: a published checkpoint has h alone")
    if arguments.watch is None:
        return _evaluate(arguments, foreign, settings)
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.watch import watch
        from simclr_dist.launch.slurm.status import note_end
    return watch(
        arguments.watch, arguments.train, arguments.test, settings, poll=POLL if arguments.poll is None else arguments.poll,
        device=arguments.device, say=partial(print, flush=True), note_end=note_end,
    )  # fmt: skip


def _evaluate(arguments: argparse.Namespace, foreign: Foreign | None, settings: Settings) -> int:
    """Evaluate one encoder. The table is printed also when the disk does not take the result."""
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.job import evaluate
        from simclr_dist.evaluate.result.file import UnwrittenError
        from simclr_dist.evaluate.result.report import table
    try:
        result = evaluate(
            foreign or arguments.encoder, arguments.train, arguments.test, out=arguments.out, device=arguments.device,
            say=partial(say, before=""), **vars(settings),
        )  # fmt: skip
    except UnwrittenError as error:
        print(table(error.result))
        raise
    if result:
        path = result_path(foreign.weights if foreign else arguments.encoder, arguments.out, settings.layer)
        print(table(result))
        print(f"written: {path} and {path.with_suffix('.html').name}")
    return 0


def _foreign(arguments: argparse.Namespace) -> Foreign | None:
    """Read `--arch`, `--weights` and the options that go with them. Return None without them."""
    if hasattr(arguments, "arch") != hasattr(arguments, "weights"):
        raise ConfigError("--arch and --weights go together")
    if hasattr(arguments, "weights"):
        return settings_from(Foreign, arguments)
    for field in dataclasses.fields(Foreign):
        if hasattr(arguments, field.name):
            option = f"--{field.name.replace('_', '-')}: {getattr(arguments, field.name)}"
            raise ConfigError(f"{option}: goes with --weights only; an ENCODER knows its own")
    return None


def _check_what(arguments: argparse.Namespace, foreign: Foreign | None) -> None:
    """Refuse a command line that does not name one thing to evaluate."""
    encoder, watch = arguments.encoder, arguments.watch
    if foreign is not None and (encoder is not None or watch is not None):
        raise ConfigError(f"--weights {foreign.weights!r}: name no ENCODER and no --watch beside it")
    if foreign is None and encoder is None and watch is None:
        raise ConfigError("eval: name an ENCODER, or a run with --watch RUN")
    if watch is None:
        if arguments.poll is not None:
            raise ConfigError(f"--poll: {arguments.poll:g}: goes with --watch only")
    elif encoder is not None:
        raise ConfigError(f"eval: {encoder!r} and --watch {watch!r}: name one encoder, or one run")
    elif arguments.out is not None:
        raise ConfigError(f"--out: {arguments.out!r}: not with --watch, which writes {RESULT_PATTERN}")
    else:
        check_watch(watch, POLL if arguments.poll is None else arguments.poll)
