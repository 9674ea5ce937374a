"""Complete words in a shell: verbs, their options, and files. Also every config key with its values."""

import argparse
from collections.abc import Mapping, Sequence

from simclr_dist.cli.options import add_keys, complete_with, key_values
from simclr_dist.cli.submit import ACTIONS, VERBS
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves

SHELLS = ("bash", "zsh", "fish")
_TAKE_SETTINGS = ("train", "plan", "check", "submit")  # verbs with `--key value` behind the config
# Of options that take text, whose type lists no values.
_VALUES: dict[str, Sequence[str]] = {
    "layer": ("h", "z", "projector.1"), "start": ("encoder", "random", "projector.1"),
    "sweep": [f"{key}=" for key, _ in leaves(Config().to_dict()) if key != "run_folder"],
}  # fmt: skip


def script(shell: str) -> str:
    """Return the script by which `shell`, one of SHELLS, completes `simclr-dist`."""
    from argcomplete.shell_integration import shellcode

    return shellcode(["simclr-dist"], True, shell)


def complete(parser: argparse.ArgumentParser, verbs: Mapping[str, argparse.ArgumentParser]) -> None:
    """Answer a shell that asks for the next words. That ends the process; return only when no shell asks."""
    import argcomplete
    from argcomplete.completers import FilesCompleter

    configs = FilesCompleter(allowednames=("yaml", "yml"))
    completers = {"submit": lambda **context: [*ACTIONS, *VERBS, *configs(**context)]}
    texts = {**_VALUES, "arch": key_values("model.encoder")}
    for name, verb in verbs.items():
        if name in _TAKE_SETTINGS:
            add_keys(verb, Config())
        for action in verb._actions:
            if action.dest == "config" and not action.option_strings:
                complete_with(action, completers.get(name, configs))
            elif action.dest in texts:
                complete_with(action, texts[action.dest])
    argcomplete.autocomplete(parser, always_complete_options=False)
