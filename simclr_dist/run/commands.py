"""Spell the commands that come next. They are typed as they stand, in the current folder."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simclr_dist.config.settings import Config


def typed(program: str, folder: Path | None = None) -> str:
    """Return how to type a program beside this Python in `folder`. Its name, or its path outside PATH."""
    beside = Path(sys.executable).with_name(program)
    on_path = shutil.which(program)
    # By folders: a virtual environment's python is a link to that of the system, which lacks its packages.
    if not beside.exists() or (on_path and Path(on_path).parent.resolve() == beside.parent.resolve()):
        return program
    folder = folder or Path.cwd()
    return shlex.quote(str(beside.relative_to(folder) if beside.is_relative_to(folder) else beside))


def command(*words: object, folder: Path | None = None, program: str = "simclr-dist") -> str:
    """Return a command of this program, as it is typed in `folder`."""
    return f"{typed(program, folder)} {shlex.join(map(str, words))}"


def printed(*commands: str) -> str:
    """Return the end of a verb's output."""
    return "\n  ".join(["\n\nNext:", *commands])


def beginning_of(run: Path, config: Config) -> Path | None:
    """Return the folder in which a run was started. None for a copy, and for one that was moved."""
    places = (Path.cwd(), *Path(os.path.normpath(run.absolute())).parents)
    return next((place for place in places if (place / config.run_folder).resolve() == run.resolve()), None)


def train_again(run: Path, config: Config, start: Mapping[str, Any], *more: object) -> str:
    """Return the command by which a run goes on. With `more` settings another begins. `start`: its last, of the ledger."""
    beginning, change = beginning_of(run, config), ""
    if beginning is None:
        more = more or ("--run_folder", run)
    elif beginning != Path.cwd():  # its settings may have paths from there
        change, run = f"cd {shlex.quote(str(beginning))} && ", Path(config.run_folder)
    words = [*more, *["--data.allow_pipe", "true"] * config.data.allow_pipe]  # which no file may set
    nodes, size = max(1, start.get("nodes", 1)), start.get("world_size")
    ranks = size // nodes if isinstance(size, int) else 1
    each, meet = (["--processes", ranks] if ranks > 1 else []), ["--nnodes", nodes, "--rdzv-endpoint", "HOST:PORT"]
    if nodes == 1:
        return change + command("train", run / "config.yaml", *each, *words, folder=beginning)
    where = f"  # on each of its {nodes} machines"
    if start.get("by") != "torchrun":
        return change + command("train", run / "config.yaml", *meet, *each, *words, folder=beginning) + where
    meet += ["--rdzv-backend", "c10d", "--nproc-per-node", ranks, "-m", "simclr_dist"]
    return change + command(*meet, "train", run / "config.yaml", *words, folder=beginning, program="torchrun") + where


def evaluate(encoder: str | Path, config: Config | None = None) -> str:
    """Return the command that measures an encoder. It names the labelled shards of `shard --split`, where there are some."""
    train = Path(config.data.shards if config else "")
    split = train.name == "train" and train.with_name("test").is_dir()
    shards = (train, train.with_name("test")) if split else ("SHARDS", "SHARDS")
    val = ["--val", train.with_name("val")] if split and train.with_name("val").is_dir() else []
    return command("eval", encoder, "--train", shards[0], *val, "--test", shards[1])
