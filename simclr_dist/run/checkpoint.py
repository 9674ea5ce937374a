"""Full state on disk, so that killed is the same as paused.

A checkpoint is `step-XXXXXXXX.pt` and its seal `step-XXXXXXXX.json`, with step, size and sha256. The seal is written only when
the data is safe on disk: data without a seal, or that does not match it, is not a checkpoint. Order of writing: temporary file,
fsync, rename, fsync of the folder; the same for the seal; only then are older ones removed.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from simclr_dist.run.steps import step_name, step_of, steps_in
from simclr_dist.system.errors import DamagedError, DataError, SaveError, say
from simclr_dist.system.files import read_object, write_atomically

State = dict[str, Any]
FORMAT = 1  # of the state; another number is refused when it is loaded


def save(
    folder: Path, step: int, state: State,
    *, keep_last: int = 3, keep_every: int = 0, allowed: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` and return its path. Remove those that need not be kept.

    `state` holds tensors and plain values only (it is read back with weights_only=True). The `keep_last` newest ones stay, and
    those whose step is a multiple of `keep_every`. `allowed` is called before anything is put in place or removed. It raises
    when another start has taken the run over: then nothing of that start is touched. Raises SaveError when the disk does not
    take the checkpoint: then no part of it is left, and the others are as they were.
    """
    path = folder / step_name(step, ".pt")
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT}, buffer)
    content = buffer.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(_unsealed(folder), allowed)  # first: their space may be needed
        try:
            if not _is_whole(path):  # to replace a whole one would leave none for a moment
                write_atomically(path, content, allowed)
                write_atomically(path.with_suffix(".json"), json.dumps(_seal(step, content)).encode(), allowed)
        except OSError:
            _remove(_unsealed(folder), allowed)
            raise
        _remove(_superseded(folder, step, keep_last, keep_every), allowed)
    except OSError as error:
        raise SaveError(path, error) from error
    return path


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the sealed checkpoints, oldest first."""
    return steps_in(folder, ".json")


def load_newest(folder: Path, *, report: Callable[[str], None]) -> State | None:
    """Load the newest whole checkpoint, its tensors on the CPU. Return None when there is none at all.

    `report` gets a line for each newer one that is passed over. Raises DataError when the checkpoint is of another format, and
    when there are sealed ones and none is whole: starting anew would throw the run away.
    """
    sealed = saved_steps(folder)
    for step in sorted({*sealed, *steps_in(folder, ".pt")}, reverse=True):
        try:
            return load(folder / step_name(step, ".pt"))
        except DamagedError as error:
            report(f"{error}; passed over")
    if sealed:
        raise DataError(f"{folder}: none of its {len(sealed)} checkpoints is whole; move the folder away to start anew")
    return None


def load(path: Path) -> State:
    """Load one checkpoint, its tensors on the CPU. Raises DamagedError, and DataError for a whole one that is not ours."""
    try:
        content = _verified(path)
    except (OSError, ValueError, DamagedError) as error:
        raise DamagedError(f"{path}: damaged checkpoint: {error}") from None
    # It is what was sealed. An older one in its place would throw work away, and the next save remove it.
    try:
        state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        number = state.get("format")
    except Exception as error:  # of a foreign file torch may raise anything
        raise misfit(path, f"is no checkpoint of simclr-dist ({type(error).__name__})") from None
    if number != FORMAT:
        why = f"checkpoint format {number}, this simclr-dist reads {FORMAT}"
        raise DataError(f"{path}: {why}; go on with the one that wrote it")
    if state.get("step") != step_of(path):
        raise misfit(path, f"holds step {state.get('step')!r:.40}, not that of its name")
    return state


def misfit(path: Path, why: str) -> DataError:
    """Make the refusal of a whole checkpoint that does not fit."""
    return DataError(f"{path}: {why}; move it and its .json elsewhere, and the run goes on from the one before")


def _seal(step: int | None, content: bytes) -> State:
    return {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verified(path: Path) -> bytes:
    """Return a checkpoint's content. Raises OSError, ValueError or DamagedError when it is not what was sealed."""
    seal = read_object(path.with_suffix(".json"), {})
    if not seal:
        raise ValueError("it has no seal")
    content = path.read_bytes()
    if seal != _seal(step_of(path), content):
        raise ValueError("its bytes are not those that were written")
    return content


def _is_whole(path: Path) -> bool:
    with suppress(OSError, ValueError, DamagedError):
        return bool(_verified(path))
    return False


def _unsealed(folder: Path) -> list[Path]:
    """List what kills have left: temporary files, and data without a seal."""
    steps = set(steps_in(folder, ".pt")) - set(steps_in(folder, ".json"))
    return [*folder.glob(".step-*.tmp"), *(folder / step_name(step, ".pt") for step in steps)]


def _superseded(folder: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """List what need not be kept once `step` is saved. Seals come first: what is half removed is no checkpoint."""
    saved = saved_steps(folder)
    later = [old for old in saved if old > step]  # damaged ones that the run was not resumed from
    older = [old for old in saved[: len(saved) - len(later)][:-keep_last] if not (keep_every and old % keep_every == 0)]
    return [folder / step_name(old, suffix) for old in [*later, *older] for suffix in (".json", ".pt")]


def _remove(paths: Iterable[Path], allowed: Callable[[], None]) -> None:
    """Remove files that were listed before `allowed` is called. None of them is by a start that takes over later."""
    allowed()
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it costs space, and no checkpoint
            say(f"{path}: cannot be removed: {error.strerror}", "WARNING: ")
