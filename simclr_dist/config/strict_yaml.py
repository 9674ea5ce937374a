"""Read settings strictly, from YAML and `--key value` pairs."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from simclr_dist.config.ranges import setting_types
from simclr_dist.system.errors import ConfigError, reason_of, shown

_MOST = 1 << 18  # characters of a file; PyYAML takes some seconds for them


class _Loader(yaml.SafeLoader):
    """Reader of YAML 1.2's values that refuses double keys and aliases.

    PyYAML alone reads 3e-4 as text, `no` as False, 010 as 8, 1:30 as 90; and a few lines of aliases to aliases fill any memory.
    """

    # The stubs call it a variable of the instance.
    yaml_implicit_resolvers: typing.ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # types-PyYAML lacks it
            raise yaml.composer.ComposerError(None, None, "an alias; write the value itself", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            keys.add(key)
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
    """Writer that quotes text like 1e5, which _Loader reads as a number."""


_Dumper.add_implicit_resolver(*_FLOAT)


def write_yaml(values: Mapping[str, Any]) -> str:
    """Write YAML that `read_yaml` reads back unchanged."""
    # Through JSON, for lists in place of tuples: safe YAML has no tuples.
    return str(yaml.dump(json.loads(json.dumps(values)), Dumper=_Dumper, sort_keys=False))


def spell(value: Any) -> str:
    """Spell a setting's value as YAML has it, in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def read_settings(path: Path, kind: str, cure: str) -> dict[str, Any]:
    """Read a YAML file. ConfigError names its `kind`; `cure` follows where no file has a similar name."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error)
        if isinstance(error, FileNotFoundError):
            close = difflib.get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.yaml")], n=1)
            reason += f"; did you mean '{path.with_name(close[0])}.yaml'?" if close else f"; {cure}"
        raise ConfigError(f"{path}: cannot read the {kind}: {reason}") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML strictly; `source` (a file or "command line") begins the ConfigError."""
    if len(text) > _MOST:
        raise ConfigError(f"{source}: is larger than {_MOST >> 10} KiB, the most that is read of settings; is it another file?")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place, why = _place(text, mark.index if mark else 0), str(error.problem or error.context)
    except yaml.reader.ReaderError as error:
        place, why = _place(text, error.position), f"character #x{ord(text[error.position]):04x} is not allowed"
    except RecursionError:
        place, why = "", "it is nested too deeply"
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # the last two: `!!int x`
        place, why = "", str(error)
    raise ConfigError(f"{source}: {place}not valid YAML: {' '.join(why.split())}")


def _place(text: str, index: int) -> str:
    """Name line and column (from 1) of a character. Empty for a command line's value."""
    if "\n" not in text:
        return ""
    before = text[:index].split("\n")
    line = text.split("\n")[len(before) - 1]
    shown = "".join(character if character.isprintable() else " " for character in line).strip()
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"line {len(before)}, column {len(before[-1]) + 1}{f' (`{shown}`)' if shown else ''}: "


def merge(settings: Any, values: Any, source: str, *, options: Sequence[str] = ()) -> Any:
    """Copy `settings` with nested `values` put in. Raises ConfigError, which may suggest one of `options`."""
    return _merge(settings, values, source, [*setting_types(settings.__class__), *options])


def _merge(settings: Any, values: Any, source: str, suggestions: Sequence[str], prefix: str = "") -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix[:-1]}: expected settings below it, found {shown(values)}")
    hints = typing.get_type_hints(type(settings))
    changes = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            name = next(leaves({name: value}), (name,))[0]  # below a misspelt section: as far as a setting
            raise ConfigError(f"{source}: {name}: unknown key{suggest(name, suggestions)}")
        current = getattr(settings, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, value, source, suggestions, f"{name}.")
        else:
            changes[key] = _convert(value, hints[key], f"{source}: {name}")
    return dataclasses.replace(settings, **changes)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(f"{where}: {shown(value)} is not one of {', '.join(map(spell, args))}{suggest(str(value), args)}")
        return value
    if origin in (types.UnionType, typing.Union):  # the latter of `Literal[...] | None`
        return None if value is None else _convert(value, next(a for a in args if a is not types.NoneType), where)
    if origin is tuple:
        if args[1:] == (...,) and isinstance(value, list | tuple) and value:
            args = args[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ConfigError(f"{where}: {shown(value)} is not a list of {'' if ... in args else f'{len(args)} '}numbers")
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if hint is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
        raise ConfigError(f"{where}: {shown(value)} is not {kind}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {shown(value)} is not a finite number")
    return value


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Split `--key value` and `--key=value` into (key, value)."""
    words = iter(overrides)
    for option in words:
        if not option.startswith("--"):
            raise ConfigError(f"command line: {option!r}: expected --key value")
        key, equals, value = option[2:].partition("=")
        if (text := value if equals else next(words, None)) is None:
            raise ConfigError(f"command line: --{key}: its value is missing")
        yield key.replace("-", "_"), text


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested dicts to (dotted key, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Other programs' names of settings.
_SYNONYMS = {
    "amp": "precision", "arch": "encoder", "backbone": "encoder", "batch": "global_batch_size",
    "batch_size": "global_batch_size", "batchsize": "global_batch_size", "learning_rate": "base_lr", "lr": "base_lr",
    "max_epochs": "epochs", "max_steps": "steps", "num_workers": "workers", "tau": "temperature", "wd": "weight_decay",
}  # fmt: skip


def suggest(word: str, names: Sequence[Any]) -> str:
    """Return `; did you mean ...?` with the nearest name, or nothing.

    What stands behind the last dot must be near: one begins with the other, or a typo lies between them. The section then
    decides among several.
    """
    typed = word.rpartition(".")[2].lower()
    synonym = _SYNONYMS.get(typed.replace("-", "_"))

    def nearness(name: str) -> tuple[bool, bool, bool, float]:
        last = name.rpartition(".")[2].lower()
        longer = len(last) > 2 and re.match(rf"{re.escape(last)}(?!\d)", typed) is not None
        begins = longer or (len(typed) > 2 and last.startswith(typed))
        ratio = max(_ratio(typed, last), _ratio(typed, last[: len(typed) + 1]))
        least = 0.8 if re.search(r"\d", last) else 0.7  # what has a number is soon another thing: an a6000 is no a100
        misspelt = ratio > least or sorted(typed) == sorted(last)
        return last == synonym, last == typed, begins, _ratio(word, name) if begins or misspelt else 0.0

    best = max(map(str, names), key=nearness, default="")
    return f"; did you mean '{best}'?" if any(nearness(best)) else ""


def _ratio(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word, name).ratio()
