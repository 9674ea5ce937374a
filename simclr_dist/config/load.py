"""Read a run's settings, without torch. A typo is answered at once, before any process starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr_dist.config.ranges import may_change
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves, merge, pairs, read_settings, read_yaml
from simclr_dist.config.together import check
from simclr_dist.system.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> Config:
    """Read a config file and `--key value` pairs. Raises ConfigError, which may suggest one of `options`.

    A file may come from anywhere: only a pair may set `data.allow_pipe`.
    """
    config = _of_file(path)
    defaults = dict(leaves(Config().to_dict()))
    typed = list(pairs(overrides))
    for key, value in typed:
        # Text stands for itself: a folder may be called 2024, or hold a # or a colon.
        plain = value if isinstance(defaults.get(key), str) else read_yaml(value, f"command line: --{key}")
        config = merge(config, _nested(key, plain), "command line", options=options)
    _refuse_commands(config, path, allowed="data.allow_pipe" in dict(typed))
    check(config, f"{path} with the command line" if overrides else str(path))
    return config


def config_of(given: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> Config:
    """Make a run's config from what Python code gives. Raises ConfigError, as `load_config` does.

    Keys of a mapping may be dotted, or have mappings below them. A file may not allow itself `data.allow_pipe` here either.
    """
    if isinstance(given, str | Path):
        config, source = _of_file(given), str(given)
    else:
        config, source = Config(), "config"
        for key, value in (given.to_dict() if isinstance(given, Config) else given).items():
            config = merge(config, _nested(key, value), source)
    of_overrides = Config()
    for key, value in overrides.items():
        config = merge(config, _nested(key, value), "overrides")
        of_overrides = merge(of_overrides, _nested(key, value), "overrides")
    if isinstance(given, str | Path):
        _refuse_commands(config, given, allowed=of_overrides.data.allow_pipe)
    check(config, f"{source} with overrides" if overrides else source)
    return config


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Build a Config from a plain dict of a run's files."""
    config: Config = merge(Config(), values, source)
    return config


def difference(old: Config, new: Config) -> list[str]:
    """List `key: old -> new` of settings that a resume must keep."""
    before, after = dict(leaves(old.to_dict())), dict(leaves(new.to_dict()))
    return [
        f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key] and key not in may_change(Config)
    ]


def _of_file(path: str | Path) -> Config:
    values = read_settings(Path(path), "config", "write one: `simclr-dist train --help` lists its keys")
    config: Config = merge(Config(), values, str(path))
    return config


def _refuse_commands(config: Config, path: str | Path, *, allowed: bool) -> None:
    if config.data.allow_pipe and not allowed:
        why = "lets data.shards run shell commands, which no file may allow itself"
        raise ConfigError(f"{path}: data.allow_pipe: true {why}; if you trust them, add --data.allow_pipe true")


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Put a value below the parts of its dotted key."""
    nested = value
    for part in reversed(str(key).split(".")):
        nested = {part: nested}
    return dict(nested)
