"""Shell completion: verbs, their options, every config key with its values, and files."""

import argparse
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from simclr_dist.config.settings import ENCODERS, Config
from simclr_dist.config.strict_yaml import leaves
from simclr_dist.config.together import THIRD_PARTY_OPTIMIZERS, TORCH_OPTIMIZERS

SHELLS = ("bash", "zsh", "fish")
TAKE_SETTINGS = ("train", "plan", "check", "submit")  # verbs with `--key value` behind the config

_OPTIMIZERS = ("lars", *TORCH_OPTIMIZERS, *(f"torch_optimizer.{name}" for name in THIRD_PARTY_OPTIMIZERS))
_ACTIONS = ("status", "logs", "cancel", "resume")
_VALUES: dict[str, Sequence[str]] = {  # of options whose parser does not list them
    "arch": tuple(name for name in ENCODERS if name != "resnet10"),
    "layer": ("h", "z", "projector.1"),
    "protocols": ("knn", "linear", "sgd", "mlp"),
    "start": ("encoder", "random", "projector.1"),
    "stem": ("imagenet", "small", "small_stride2"),
}


def script(shell: str) -> str:
    """What `shell`, one of SHELLS, has to read to complete `simclr-dist`."""
    from argcomplete.shell_integration import shellcode

    return shellcode(["simclr-dist"], True, shell)


def complete(parser: argparse.ArgumentParser, verbs: Mapping[str, argparse.ArgumentParser]) -> None:
    """Answer a shell that asks for the words that may come next, and end the process; return when none asks."""
    import argcomplete
    from argcomplete.completers import FilesCompleter

    configs = FilesCompleter(allowednames=("yaml", "yml"))
    for name, verb in verbs.items():
        if name in TAKE_SETTINGS:
            _add_settings(verb)
        for action in verb._actions:
            if action.dest == "config" and not action.option_strings:
                _set(action, _first(_ACTIONS, configs) if name == "submit" else configs)
            elif action.dest in _VALUES and action.choices is None:
                _set(action, _words(_VALUES[action.dest]))
    argcomplete.autocomplete(parser, always_complete_options=False)


def _add_settings(verb: argparse.ArgumentParser) -> None:
    taken = set(verb._option_string_actions)
    for key, values, default in settings():
        if f"--{key}" not in taken:
            option = verb.add_argument(f"--{key}", help=f"config key (default: {default})", default=argparse.SUPPRESS)
            if values:
                _set(option, _words(values))


def settings() -> list[tuple[str, Sequence[str], Any]]:
    """Each config key with the values that it may have ('()' where these cannot be listed) and its default."""
    return [(key, _values(key), default) for key, default in leaves(Config().to_dict())]


def _values(key: str) -> Sequence[str]:
    if key == "optim.name":
        return _OPTIMIZERS
    hint: Any = Config
    for part in key.split("."):
        hint = typing.get_type_hints(hint)[part]
    options = [hint, *typing.get_args(hint)] if typing.get_origin(hint) is not typing.Literal else [hint]
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            return tuple(map(str, typing.get_args(option)))
    return ("true", "false") if hint is bool else ()


def _set(action: argparse.Action, completer: Callable[..., Iterable[str]]) -> None:
    action.completer = completer  # type: ignore[attr-defined]


def _words(words: Sequence[str]) -> Callable[..., Iterable[str]]:
    return lambda **_: words


def _first(words: Sequence[str], others: Callable[..., Iterable[str]]) -> Callable[..., Iterable[str]]:
    return lambda **asked: [*words, *others(**asked)]
