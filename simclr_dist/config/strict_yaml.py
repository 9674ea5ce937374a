"""Strict reading of settings into frozen dataclasses: from YAML, and from `--key value` pairs."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from simclr_dist.system.errors import ConfigError

_SHOWN = 60  # characters of a line that is not YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and numbers (PyYAML reads 3e-4 as text, `no` as False, 010 as 8, 1:30 as 90), no key twice."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_FLOAT: Any = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """Quotes text like 1e5, which _Loader would take for a number."""


_Dumper.add_implicit_resolver(*_FLOAT)


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads back as it was."""
    # Plain lists for tuples: safe YAML knows no others.
    return str(yaml.dump(json.loads(json.dumps(values)), Dumper=_Dumper, sort_keys=False))


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML strictly; `source` (a file or "command line") begins the ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        index = mark.index if mark else 0
        raise ConfigError(
            f"{source}: {_place(text, index)}not valid YAML: {_one_line(error.problem or error.context)}"
        ) from None
    except yaml.reader.ReaderError as error:
        what = f"character #x{ord(text[error.position]):04x} is not allowed"
        raise ConfigError(f"{source}: {_place(text, error.position)}not valid YAML: {what}") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # the others of `!!int x` and deep nesting
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from None


def _place(text: str, index: int) -> str:
    """Line and column (from 1) of a character, and its line; nothing for a text of one line: a value on the command line."""
    if "\n" not in text:
        return ""
    before = text[:index].split("\n")
    line = text.split("\n")[len(before) - 1]
    shown = "".join(character if character.isprintable() else " " for character in line).strip()
    if len(shown) > _SHOWN:
        shown = shown[: _SHOWN - 3] + "..."
    return f"line {len(before)}, column {len(before[-1]) + 1}{f' (`{shown}`)' if shown else ''}: "


def _one_line(said: object) -> str:
    return " ".join(str(said).split())


def merge(config: Any, values: Any, source: str, *, known: Sequence[str], prefix: str = "") -> Any:
    """The dataclass `config` with `values` (nested dicts) put in, every key and type checked; ConfigError if not.

    `known` are all dotted keys, to suggest the right one from.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix[:-1]}: expected settings below it, found {values!r}")
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{source}: {name}: unknown key{suggest(name, known)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            changes[key] = merge(current, value, source, known=known, prefix=f"{name}.")
        else:
            changes[key] = _convert(value, hints[key], f"{source}: {name}")
    return dataclasses.replace(config, **changes)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}{suggest(str(value), args)}")
        return value
    if origin in (types.UnionType, typing.Union):  # the latter of `Literal[...] | None`
        return None if value is None else _convert(value, next(a for a in args if a is not types.NoneType), where)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ConfigError(f"{where}: {value!r} is not a list of {len(args)} numbers")
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
        raise ConfigError(f"{where}: {value!r} is not {kind}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {value!r} is not a finite number")
    return value


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--key value` and `--key=value`."""
    rest = list(overrides)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"command line: {option!r}: expected --key value")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: --{key}: its value is missing")
            value = rest.pop(0)
        yield key.replace("-", "_"), value


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of nested dicts as (dotted key, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What others call it.
_ELSEWHERE = {
    "arch": "encoder", "backbone": "encoder", "batch_size": "global_batch_size", "learning_rate": "base_lr", "lr": "base_lr",
    "max_epochs": "epochs", "max_steps": "steps", "num_workers": "workers", "tau": "temperature", "wd": "weight_decay",
}  # fmt: skip


def suggest(word: str, known: Sequence[Any]) -> str:
    """`; did you mean ...?` for the nearest of the known words, or nothing."""
    names = [str(k) for k in known]
    ours = _ELSEWHERE.get(word.rpartition(".")[2].replace("-", "_"))
    if same := [name for name in names if name.rpartition(".")[2] == ours]:
        return f"; did you mean '{same[0]}'?"
    close = difflib.get_close_matches(word, names, n=1)
    if not close:  # the right name in the wrong section
        close = [name for name in names if name.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"; did you mean '{close[0]}'?" if close else ""
