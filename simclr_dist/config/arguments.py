"""Values of command-line options."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that takes an integer from `least` on."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: the least is {least}")
        return value

    parse.__name__ = "int"  # argparse names it in its message
    return parse
