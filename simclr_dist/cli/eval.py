"""Run the verb `eval`. It measures an encoder, or each of a run as it comes, also on ranks that torchrun has started."""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from simclr_dist.cli.options import add_device, add_settings, settings_from
from simclr_dist.encoder.names import PATTERN, RESULT_PATTERN, Foreign, check_is_file, encoder_of, result_path
from simclr_dist.evaluate.settings import POLL, Settings, check_val, check_watch
from simclr_dist.run.commands import command, printed
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED, ConfigError, say
from simclr_dist.system.ranks import read_place

HELP = "measure an encoder: kNN and linear probe beside baselines"
_STOPPED = "simclr-dist: stopped by {signal}; the same command starts the evaluation again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `simclr-dist eval`."""
    add = parser.add_argument
    several = f"an encoder, or a run (its newest): {PATTERN}; of several the first against each"
    add("encoder", nargs="*", metavar="ENCODER", type=encoder_of, help=several)
    rival = "an encoder to beat: torchvision/resnet50 or timm/NAME (published weights), ARCH=FILE, or a file; may come again"
    add("--rival", action="append", default=[], metavar="NAME", help=rival)
    add("--watch", metavar="RUN", help="evaluate every encoder of this run once, as it is exported, until the run has ended")
    add("--poll", type=float, metavar="SECONDS", help=f"with --watch: how often to look for encoders (default: {POLL:g})")
    train = "shards that kNN and the probe learn from; without any label: signals alone"
    add("--train", required=True, metavar="SHARDS", help=train)
    add("--val", metavar="SHARDS", help="shards that choose what is not set: k, temperature, l2, learning rate, epoch")
    add("--test", required=True, metavar="SHARDS", help="shards that the accuracy is measured on")
    add_settings(parser, Settings, features="FOLDER", layer="LAYER", protocols="NAMES", labels="SHARES")
    add_settings(
        parser, Foreign, all_optional=True, arch="NAME", weights="FILE", prefix="PREFIX", mean="NUMBERS", std="NUMBERS"
    )
    add_device(parser)
    out = f"the result's file (default: {RESULT_PATTERN}); an older one of other settings is kept"
    add("--out", metavar="JSON", help=out)


def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    """Evaluate encoders; return the exit code. Raises UserError, and SystemExit(75) at a stop signal: nothing to save."""
    read_place()
    foreign, settings, path = checked(arguments)
    if arguments.watch is None:
        return _evaluate(arguments, foreign, settings, path)
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.evaluate.watch import watch
        from simclr_dist.launch.slurm.status import note_end
    return watch(
        arguments.watch, arguments.train, arguments.test, settings, val=arguments.val,
        poll=POLL if arguments.poll is None else arguments.poll, device=arguments.device,
        say=partial(print, flush=True), note_end=note_end,
    )  # fmt: skip


def checked(arguments: argparse.Namespace) -> tuple[Foreign | None, Settings, Path]:
    """Check what is typed. Return the published checkpoint, if one is meant, settings, and the file that is written."""
    foreign = _foreign(arguments)
    _check_what(arguments, foreign)
    settings = settings_from(Settings, arguments)
    check_val(settings, arguments.val)
    for file in arguments.encoder:
        check_is_file(file)
    several = len(arguments.encoder) + len(arguments.rival) > 1 or settings.labels is not None
    first = foreign.weights if foreign else [*arguments.encoder, arguments.watch][0]  # with --watch nobody asks for the path
    return foreign, settings, result_path(first, arguments.out, settings.layer, several=several)


def _evaluate(arguments: argparse.Namespace, foreign: Foreign | None, settings: Settings, path: Path) -> int:
    """Evaluate one encoder, or compare several. The table is printed also when the disk does not take the result."""
    with signals.importing(PREEMPTED, _STOPPED):
        from simclr_dist.encoder.published import rival
        from simclr_dist.evaluate.job import evaluate
        from simclr_dist.evaluate.result.file import UnwrittenError
        from simclr_dist.evaluate.result.report import table
        from simclr_dist.evaluate.rivals import compare_encoders, comparison_table
    encoders = [foreign] if foreign else [*arguments.encoder, *map(rival, arguments.rival)]
    several = len(encoders) > 1 or settings.labels is not None
    encoder: Any = encoders if several else encoders[0]
    work: Any = compare_encoders if several else evaluate
    shown = comparison_table if several else table
    try:
        result = work(
            encoder, arguments.train, arguments.test, val=arguments.val, out=arguments.out,
            device=arguments.device, say=partial(say, before=""), **vars(settings),
        )  # fmt: skip
    except UnwrittenError as error:
        print((shown if "verdicts" in error.result else table)(error.result))
        raise
    if result:
        print(shown(result))
        after = "" if foreign or several else printed(command("export", encoder, f"{path.stem}-hub/"))
        print(f"written: {path} and {path.with_suffix('.html').name}{after}")
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
    encoder, watch = [*arguments.encoder, *arguments.rival], arguments.watch
    if foreign is not None and (encoder or watch is not None):
        raise ConfigError(f"--weights {foreign.weights!r}: name no ENCODER, no --rival and no --watch beside it")
    if foreign is None and not arguments.encoder and watch is None:
        raise ConfigError("eval: name an ENCODER, or a run with --watch RUN")
    if watch is None:
        if arguments.poll is not None:
            raise ConfigError(f"--poll: {arguments.poll:g}: goes with --watch only")
    elif encoder:
        raise ConfigError(f"eval: {encoder[0]!r} and --watch {watch!r}: name one encoder, or one run")
    elif arguments.out is not None:
        raise ConfigError(f"--out: {arguments.out!r}: not with --watch, which writes {RESULT_PATTERN}")
    else:
        check_watch(watch, POLL if arguments.poll is None else arguments.poll)
