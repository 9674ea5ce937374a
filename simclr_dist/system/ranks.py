"""Read from the environment which rank this process is. torchrun, srun and platforms set the variables."""

import os
from dataclasses import dataclass

from simclr_dist.system.errors import RankError

TYPED = "SIMCLR_DIST_TYPED"  # variable with the command line that was typed, for the ranks it starts
TO_RUN_ALONE = "to run alone, unset RANK, WORLD_SIZE and LOCAL_RANK"
_CURE = f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT go together, torchrun sets them; {TO_RUN_ALONE}"


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks. `master` is where they meet; None for a process alone.

    `restarted`: torchrun or SLURM starts the ranks again after a crash, so what is amiss now may be right then.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    master: tuple[str, int] | None = None
    restarted: bool = False


def read_place() -> Place:
    """Return this process's place. Raises RankError for variables that do not go together."""
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return Place()
    size = _number("WORLD_SIZE", 1, 2**20)
    rank = _number("RANK", 0, size - 1, f", as WORLD_SIZE is {size}")
    local_rank = _number("LOCAL_RANK", 0, size - 1, f", as WORLD_SIZE is {size}") if os.environ.get("LOCAL_RANK") else 0
    host, port = _text("MASTER_ADDR"), _number("MASTER_PORT", 1, 2**16 - 1)
    restarted = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_JOB_ID" in os.environ
    return Place(rank, size, local_rank, (host, port), restarted)


def _text(name: str) -> str:
    if text := os.environ.get(name):
        return text
    others = (f"{other} is {os.environ[other]!r}" for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if os.environ.get(other))
    raise RankError(f"{name}: is not set, but {', '.join(others)}; {_CURE}")


def _number(name: str, least: int, most: int, why: str = "") -> int:
    text = _text(name)
    if not (text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise RankError(f"{name}: {text!r} is not a whole number from {least} to {most}{why}; {_CURE}")
    return int(text)
