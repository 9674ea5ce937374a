"""Make options from dataclasses of settings. Names, types, values and help are those of the fields."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from simclr_dist.config.networks import encoder_names
from simclr_dist.config.ranges import Range, descriptions, setting_types
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves, spell
from simclr_dist.config.together import optimizer_names

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Parser that refuses in one line, without the usage."""

    def print_help(self, file: Any = None) -> None:
        """Print the help. Raise where the pipe is closed: argparse's own method passes over that."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"simclr-dist: {message}; see `{self.prog} --help`\n")


def add_settings(parser: argparse.ArgumentParser, cls: type, *, all_optional: bool = False, **metavars: str) -> None:
    """Add an option for each field of a dataclass. A field without a default must be typed, unless `all_optional`.

    What is not typed is not in the namespace: only the dataclass holds defaults. It alone holds ranges too. It refuses a value
    of the command line with the same words as a value from Python.
    """
    for field in dataclasses.fields(cls):
        hint, text = setting_types(cls)[field.name], _help_of(cls, field.name)
        option = f"--{field.name.replace('_', '-')}"
        how: dict[str, Any] = {"action": "store_true"}
        if plain_type(hint) is not bool:
            required = field.default is dataclasses.MISSING
            how = {"type": reader(hint), "metavar": metavars.get(field.name) or _metavar(hint)}
            how["required"] = required and not all_optional
            text += "" if required or field.default is None else f" (default: {_typed(field.default)})"
        elif field.default:
            option = option.replace("--keep-", "--").replace("--", "--no-")
            how, text = {"action": "store_false"}, f"turn off: {text[0].lower()}{text[1:]}"
        action = parser.add_argument(option, dest=field.name, default=argparse.SUPPRESS, help=text, **how)
        complete_with(action, () if plain_type(hint) is bool else values(hint))


def add_keys(parser: argparse.ArgumentParser, config: Config, *, spelled: Callable[[str], str] = str) -> None:
    """Add an option for each config key that has none yet. `spelled` names it; the help shows its section and value."""
    taken = set(parser._option_string_actions)
    sections: dict[str, argparse._ArgumentGroup] = {}
    for key, value in leaves(config.to_dict()):
        section, _, _ = key.rpartition(".")
        if section not in sections:
            about = getattr(config, section) if section else config
            sections[section] = parser.add_argument_group(section or "settings", about.__doc__)
        if (option := f"--{spelled(key)}") not in taken:
            hint, shown = setting_types(Config)[key], "''" if value == "" else _typed(value)
            text = f"{_help_of(Config, key)} (default: {shown})"
            metavar = _metavar(hint) or "TEXT"
            action = sections[section].add_argument(option, default=argparse.SUPPRESS, metavar=metavar, help=text)
            complete_with(action, key_values(key))


def key_values(key: str) -> Sequence[str]:
    """List the values of a config's key as they are typed. Return () where they cannot be listed."""
    if key == "model.encoder":
        return encoder_names()
    return optimizer_names() if key == "optim.name" else values(setting_types(Config)[key])


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    where = "where to compute (default: %(default)s)"
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help=where)


def settings_from(cls: type[T], arguments: argparse.Namespace) -> T:
    """Make the settings from what was typed. Raises ConfigError for the first value out of its range."""
    names = setting_types(typing.cast(type, cls))
    return cls(**{name: value for name, value in vars(arguments).items() if name in names})


def at_least(least: int) -> Callable[[str], int]:
    """Return the `type` of an option: a whole number from `least` on. It is for options that are no settings."""

    def read(text: str) -> int:
        value = int(text)
        if why := Range(least=least).refusal(value):
            raise argparse.ArgumentTypeError(f"{value} {why}")
        return value

    read.__name__ = "int"  # argparse names it in its message
    return read


def values(hint: Any) -> Sequence[str]:
    """List the values of a setting's type as they are typed. Return () where they cannot be listed."""
    plain = plain_type(hint)
    if typing.get_origin(plain) is tuple:
        plain = plain_type(typing.get_args(plain)[0])
    if typing.get_origin(plain) is Literal:
        return tuple(map(str, typing.get_args(plain)))
    return ("true", "false") if plain is bool else ()


def plain_type(hint: Any) -> Any:
    """Strip a setting's type of its range and of None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return plain_type(args[0])
    if origin in (types.UnionType, Union):
        return plain_type(next(arg for arg in args if arg is not types.NoneType))
    return hint


def reader(hint: Any) -> Callable[[str], Any]:
    """Return a function that reads a word as this type. It does not look at the range."""
    plain = plain_type(hint)
    origin, args = typing.get_origin(plain), typing.get_args(plain)
    if origin is not tuple:
        return typing.cast(Callable[[str], Any], type(args[0]) if origin is Literal else plain)
    # What stands between the values of a tuple: `knn,linear`, but `0.8/0.2`.
    one, between = reader(args[0]), "/" if plain_type(args[0]) is float else ","

    def read(text: str) -> tuple[Any, ...]:
        return tuple(map(one, text.split(between)))

    read.__name__ = f"{between}-separated"  # argparse names it in its message
    return read


def complete_with(action: argparse.Action, words: Sequence[str] | Callable[..., Sequence[str]]) -> None:
    """Have argcomplete offer these words for an option's value. A function makes them when a shell asks."""
    if words:  # argcomplete looks for an attribute that argparse does not know
        action.completer = words if callable(words) else lambda **_: words  # type: ignore[attr-defined]  # argcomplete reads it


def _help_of(cls: type, key: str) -> str:
    return descriptions(cls)[key].removesuffix(".").replace("%", "%%")


def _typed(value: Any) -> str:
    """Spell a value as it is typed. null, true and lists are as in YAML; words have commas between them."""
    return ",".join(value) if isinstance(value, tuple) and isinstance(value[0], str) else spell(value)


def _metavar(hint: Any) -> str | None:
    plain = plain_type(hint)
    if typing.get_origin(plain) is tuple:
        return f"[{', '.join('...' if part is ... else _metavar(part) or '' for part in typing.get_args(plain))}]"
    if words := values(plain):
        return f"{{{','.join(words)}}}"
    return {int: "N", float: "X"}.get(plain)
