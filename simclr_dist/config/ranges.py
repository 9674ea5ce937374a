"""Define types with a setting's range. They also tell whether a resumed run may change it."""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from simclr_dist.system.errors import ConfigError, shown

# Beyond these float64 has gaps between whole numbers, and float32, in which views and losses are computed, is at its end soon.
LARGEST, SMALLEST = 2**53, 2.0**-53
_LARGEST_FLOAT = 1e30
MAY_CHANGE = "may change on resume"  # a setting without this mark decides the result of a run


@dataclass(frozen=True)
class Range:
    """Limits of a number. `least` and `most` are inside, `above` and `below` outside.

    `largest` and `smallest` (of numbers above 0) are what machines and arithmetic can do, not what makes sense.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    meaning: str = ""
    largest: float = LARGEST
    smallest: float = SMALLEST

    def refusal(self, value: Any) -> str | None:
        """Say why a value outside is wrong; None for one inside."""
        every = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        limits = {word: limit for word, limit in every.items() if limit is not None}
        holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
        if all(holds[word](value, limit) for word, limit in limits.items()):
            if value > max(self.largest, self.below or 0):
                return f"is too large; the most is {self.largest}"
            is_tiny = 0 < value < self.smallest and self.above is not None
            return f"is too small; above 0 the least is {self.smallest:.2g}" if is_tiny else None
        if list(limits) == ["at least"]:
            return f"is too small; the least is {self.least}"
        return self.meaning or "must be " + " and ".join(f"{word} {limit}" for word, limit in limits.items())


@dataclass(frozen=True)
class Bounds:
    """Two numbers above 0 in order, the larger at most `most`. Both within what arithmetic can do."""

    most: float = LARGEST

    def refusal(self, value: Any) -> str | None:
        """Say why other values are wrong; None for two that fit."""
        if SMALLEST <= value[0] <= value[1] <= self.most:
            return None
        order = "must be two numbers with 0 < smallest <= largest" + (f" <= {self.most}" if self.most < LARGEST else "")
        return order if not 0 < value[0] <= value[1] or self.most < LARGEST else f"{order}, from {SMALLEST:.2g} to {LARGEST}"


Natural = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
NonNegative = Annotated[float, Range(least=0, largest=_LARGEST_FLOAT)]
Positive = Annotated[float, Range(above=0, largest=_LARGEST_FLOAT)]
Channels = Annotated[int, Range(least=1, most=64)]
Minutes = Annotated[float, Range(above=0, most=100_000, smallest=0.001)]
Workers = Annotated[int, Range(least=0, largest=4096)]
Share = Annotated[float, Range(above=0, most=1)]
Probability = Annotated[float, Range(least=0, most=1, meaning="is not a probability from 0 to 1")]


@functools.cache
def setting_types(cls: type) -> dict[str, Any]:
    """Map each setting's dotted key to its annotated type. Nested dataclasses are included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    flat: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[name]):
            flat |= {f"{name}.{key}": hint for key, hint in setting_types(hints[name]).items()}
        else:
            flat[name] = hints[name]
    return flat


def may_change(cls: type) -> frozenset[str]:
    """Return the dotted keys that a resumed run may change."""
    return frozenset(key for key, hint in setting_types(cls).items() if MAY_CHANGE in getattr(hint, "__metadata__", ()))


def out_of_range(settings: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and refusal of each setting out of range."""
    for key, hint in setting_types(settings.__class__).items():
        value = operator.attrgetter(key)(settings)
        if why := _refusal(value, hint):
            yield key, value, why


def check_ranges(settings: Any) -> None:
    """Raise ConfigError for the first setting out of range. For `__post_init__`."""
    for key, value, why in out_of_range(settings):
        raise ConfigError(f"{key}: {shown(value)} {why}")


def _refusal(value: Any, hint: Any) -> str | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin is Annotated:
        limits = [note for note in args[1:] if isinstance(note, Range | Bounds)]
        return _refusal(value, args[0]) or next((why for limit in limits if (why := limit.refusal(value))), None)
    if origin in (types.UnionType, Union):
        return _refusal(value, next(arg for arg in args if arg is not types.NoneType))
    if origin is tuple:
        of_each = itertools.repeat(args[0]) if args[1:] == (...,) else args
        return next((why for part, arg in zip(value, of_each, strict=False) if (why := _refusal(part, arg))), None)
    if origin is Literal:
        return None if value in args else f"is not one of {', '.join(map(str, args))}"
    return "is not a finite number" if isinstance(value, float) and not math.isfinite(value) else None


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
    """Map each setting's dotted key to its docstring. Nested and inherited dataclasses are included."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts = {key: text for base in cls.__bases__ if dataclasses.is_dataclass(base) for key, text in descriptions(base).items()}
    for field, after in itertools.pairwise(typing.cast(ast.ClassDef, definition).body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                texts[name] = " ".join(text.split())
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            texts |= {f"{name}.{key}": text for key, text in descriptions(typing.cast(type, hint)).items()}
    return texts
