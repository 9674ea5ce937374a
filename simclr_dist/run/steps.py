"""Name the files that belong to a step: step-XXXXXXXX and a suffix."""

from pathlib import Path


def step_name(step: int, suffix: str = "") -> str:
    """Return the name of a step's file."""
    return f"step-{step:08d}{suffix}"


def step_of(path: Path) -> int | None:
    """Return the step that a file's name says; None for another name."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def steps_in(folder: Path, suffix: str) -> list[int]:
    """Return the steps of the files with this suffix in `folder`, ascending."""
    steps = map(step_of, folder.glob(f"step-*{suffix}"))
    return sorted(step for step in steps if step is not None)
