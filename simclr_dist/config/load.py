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
    values = read_settings(Path(path), "config", "write one: `simclr-dist train --help` lists its keys")
    config: Config = merge(Config(), values, str(path))
    defaults = dict(leaves(Config().to_dict()))
    typed = list(pairs(overrides))
    for key, value in typed:
        # Text stands for itself: a folder may be called 2024, or hold a # or a colon.
        nested: Any = value if isinstance(defaults.get(key), str) else read_yaml(value, f"command line: --{key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = merge(config, nested, "command line", options=options)
    if config.data.allow_pipe and "data.allow_pipe" not in dict(typed):
        why = "lets data.shards run shell commands, which no file may allow itself"
        raise ConfigError(f"{path}: data.allow_pipe: true {why}; if you trust them, add --data.allow_pipe true")
    check(config, f"{path} with the command line" if overrides else str(path))
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
