"""Read a sweep. It makes a run of each combination of values."""

import dataclasses
import hashlib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import pairs, spell
from simclr_dist.system.errors import ConfigError, UserError

MOST = 256  # runs: more are a mistake sooner than a wish
_LONGEST = 40, 150  # characters of a value in a name, and of the name
_FORM = "write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"


@dataclass(frozen=True)
class Member:
    """A run of a sweep. Its `name` is that of its folder, which lies in the sweep's and in `config`; `overrides` make it."""

    name: str
    overrides: tuple[str, ...]
    config: Config

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the run's name before the line of a user's mistake."""
        try:
            yield
        except UserError as error:
            raise type(error)(f"--sweep: {self.name}: {error}") from None


def read_sweep(
    path: str | Path, overrides: Sequence[str], sweeps: Sequence[str], *, options: Sequence[str] = ()
) -> list[Member]:
    """Return the runs of a sweep, checked as `load_config` checks one. Each of `sweeps` is KEY=VALUE,VALUE.

    The config's run_folder is the sweep's folder. A run's name has its values as they were read, so 0.10 and .1 are one name.
    Raises ConfigError, for a combination with its values before the line.
    """
    swept = _values(sweeps, dict(pairs(overrides)))
    if (count := math.prod(map(len, swept.values()))) > MOST:
        raise ConfigError(f"--sweep: {count} runs, and {MOST} are the most; leave out values, or split the sweep")
    members: dict[tuple[Any, ...], Member] = {}
    typed: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for texts in itertools.product(*swept.values()):
        words = [*overrides, *(f"--{key}={text}" for key, text in zip(swept, texts, strict=True))]
        try:
            config = load_config(path, words, options=options)
        except ConfigError as error:
            which = ", ".join(f"{key}={text}" for key, text in zip(swept, texts, strict=True))
            raise ConfigError(f"--sweep: {which}: {error}") from None
        values = tuple(operator.attrgetter(key)(config) for key in swept)
        if values in members:
            key, one, other = next(three for three in zip(swept, typed[values], texts, strict=True) if three[1] != three[2])
            raise ConfigError(f"--sweep: {key}: {one} and {other} are the same value; leave one out")
        name = _name(list(swept), values)
        folder = str(Path(config.run_folder, name))
        members[values] = Member(name, (*words, f"--run_folder={folder}"), dataclasses.replace(config, run_folder=folder))
        typed[values] = texts
    return list(members.values())


def _values(sweeps: Sequence[str], overrides: dict[str, str]) -> dict[str, list[str]]:
    """Return the texts of each key's values."""
    swept: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, values = text.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not key or not equals:
            raise ConfigError(f"--sweep: {text!r} names no values; {_FORM}")
        if key == "run_folder":
            raise ConfigError("--sweep: run_folder: each run gets a folder of its own in the sweep's; sweep another setting")
        if key in swept or key in overrides:
            raise ConfigError(f"--sweep: {key}: is set twice; name its values once, in --sweep alone")
        swept[key] = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]  # [0.2, 1.0] is one value
        if "" in swept[key]:
            raise ConfigError(f"--sweep: {text!r} has an empty value; {_FORM}")
        if len(set(swept[key])) < len(swept[key]):
            raise ConfigError(f"--sweep: {text!r} has a value twice; leave one out")
    return swept


def _name(keys: Sequence[str], values: Sequence[Any]) -> str:
    """Name a run's folder. Other values have another name, whatever cannot stand in one."""
    last = [key.rpartition(".")[2] for key in keys]
    shown = [part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)]
    name = "+".join(f"{key}={_plain(_spelled(value), _LONGEST[0])}" for key, value in zip(shown, values, strict=True))
    return _plain(name, _LONGEST[1], also="+=~")  # a comma would not do: a container's mounts stand between commas


def _spelled(value: Any) -> str:
    return "_".join(map(spell, value)) if isinstance(value, tuple) else spell(value)


def _plain(text: str, longest: int, also: str = "") -> str:
    """Replace what is no plain character of a name. Digits of a digest keep such texts, and long ones, apart."""
    plain = re.sub(rf"[^A-Za-z0-9._{also}-]+", "-", text)
    if plain == text and len(text) <= longest:
        return text
    return f"{plain[:longest]}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
