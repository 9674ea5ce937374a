"""A run's settings: frozen dataclasses, filled from a strict YAML file, then from the command line, and compared on resume.

Neither this nor `config_schema` and `config_checks` need torch, so that a typo answers at once and before any process starts.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr_dist.config.settings import (
    ENCODERS,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    ViewsConfig,
)
from simclr_dist.config.strict_yaml import leaves, merge, pairs, read_yaml
from simclr_dist.config.together import (
    CONTIGUOUS_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    THIRD_PARTY_OPTIMIZERS,
    TORCH_OPTIMIZERS,
    check,
    check_fits,
)
from simclr_dist.system.errors import ConfigError

# Whoever needs settings finds all of it here.
__all__ = [
    "CONTIGUOUS_OPTIMIZERS",
    "ENCODERS",
    "MAY_CHANGE_ON_RESUME",
    "REFUSED_OPTIMIZERS",
    "THIRD_PARTY_OPTIMIZERS",
    "TORCH_OPTIMIZERS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "ViewsConfig",
    "check_fits",
    "config_from_dict",
    "difference",
    "load_config",
]

_KEYS = tuple(key for key, _ in leaves(Config().to_dict()))

# What another start of the same run may set anew; everything else decides the result (the world size is not a setting).
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_folder",
        "epochs",
        "steps",
        "max_skipped_steps",
        "check_ranks_every",
        "timeout_minutes",
        "first_step_timeout_minutes",
        "data.shards",
        "data.workers",
        "data.max_bad_samples",
        "data.in_memory",
        "data.cache",
        "data.cache_gib",
        "data.retry_minutes",
        "data.allow_pipe",
    }
    | {"checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.export_every"}
    | {"log.every", "log.tensorboard", "log.views_every_epochs", "probe.every_epochs", "probe.shards", "probe.images"}
)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> Config:
    """Read a config file, then `--key value` pairs, and check the whole; raises ConfigError with one line.

    `options` are what the command itself takes, which somebody may have mistyped.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cure = ""
        if isinstance(error, FileNotFoundError):
            close = difflib.get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.yaml")], n=1)
            cure = "; write one: `simclr-dist train --help` lists its keys"
            if close:
                cure = f"; did you mean '{path.with_name(close[0])}.yaml'?"
        raise ConfigError(f"{path}: cannot read the config: {getattr(error, 'strerror', None) or error}{cure}") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    config: Config = merge(Config(), values, str(path), known=_KEYS)
    known = dict(leaves(Config().to_dict()))
    for key, value in pairs(overrides):
        # Text stands for itself: a folder may be called 2024, or hold a # or a colon.
        nested: Any = value if isinstance(known.get(key), str) else read_yaml(value, f"command line: --{key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = merge(config, nested, "command line", known=(*_KEYS, *options))
    check(config, f"{path} with the command line" if overrides else str(path))
    return config


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The Config that a checkpoint or run folder holds as a plain dict."""
    config: Config = merge(Config(), values, source, known=_KEYS)
    return config


def difference(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for each setting that differs and must not change on resume."""
    before, after = dict(leaves(old.to_dict())), dict(leaves(new.to_dict()))
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and key not in MAY_CHANGE_ON_RESUME
    ]
