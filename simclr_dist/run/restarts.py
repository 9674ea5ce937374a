"""Decide whether a run starts again. It is the one rule for the launcher and for SLURM, without files or clock."""

from collections.abc import Sequence
from dataclasses import dataclass

# Stops in a row that brought nothing new, as under a time limit that is shorter than the start takes.
MAX_IDLE_STOPS = 20


@dataclass(frozen=True)
class Ended:
    """A start that may be followed by another. It crashed or was stopped; `saved` is what the run had on disk then.

    `disk`: it crashed on a disk that is full, read-only or forbidden. `waited`: it had done all that there was to do.
    """

    crash: bool
    saved: int
    disk: bool = False
    waited: bool = False


@dataclass(frozen=True)
class Decision:
    """The answer of `decide`. `fruitless`: starts in a row that ended alike and brought nothing new, the last one included."""

    again: bool
    fruitless: int


def decide(ends: Sequence[Ended], max_restarts: int, *, before: int | None = None) -> Decision:
    """Decide whether another start follows the last of `ends`, oldest first.

    A crashed start is followed by another until more than `max_restarts` in a row have brought nothing new (0: no other
    follows). For stopped starts the limit is `MAX_IDLE_STOPS`; one that waited has brought all it could. A crash on a disk that
    refuses does not pass by itself, so there one that brought nothing new is the last. A start brought something new when
    `saved` differs from the end before. For the first one that is `before`; without it the first counts as fruitless.
    """
    last = ends[-1]
    saved_before = [ends[0].saved if before is None else before, *(end.saved for end in ends[:-1])]
    fruitless = 0
    for end, saved in zip(reversed(ends), reversed(saved_before), strict=True):
        if end.saved != saved or (end.waited and not last.crash):
            break
        fruitless += end.crash == last.crash
    limit = max_restarts if last.crash else MAX_IDLE_STOPS
    return Decision(limit > 0 and fruitless <= limit * (not last.disk), fruitless)


def pause_seconds(attempts: int) -> float:
    """Return the seconds to wait before the next start. They grow with the `attempts` in a row: 1, 2, 4 ... 30."""
    return float(min(2 ** min(attempts, 5), 30))
