"""Full state on disk, so that killed is the same as paused.

A checkpoint is `step-XXXXXXXX.pt` and, written only when that is safe on disk, its seal `step-XXXXXXXX.json` with its step,
size and sha256: a file without the second, or that does not match it, is not a checkpoint. Order of writing: temporary file,
fsync, rename, fsync of the folder; the same for the seal; only then are older ones removed.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from simclr_dist.system.errors import DataError, SaveError
from simclr_dist.system.files import write_atomically

State = dict[str, Any]
FORMAT = 1  # of the state; another number is refused when it is loaded


def save(
    folder: Path,
    step: int,
    state: State,
    *,
    keep_last: int = 3,
    keep_every: int = 0,
    allowed: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of `step` and remove those that need not be kept; returns its path.

    `state` holds tensors and plain values only (it is read back with weights_only=True). `keep_last` newest ones and those
    whose step is a multiple of `keep_every` stay; a whole one of this step that is there already stays as it is. `allowed` is
    called before anything is put in place or removed, and raises when another start has taken the run over: nothing of that
    one's is touched then. Raises SaveError when the disk does not take the checkpoint: no part of it is left, and the others
    are as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save({**state, "format": FORMAT}, buffer)
    content = buffer.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(_unsealed(folder), allowed)  # first: their space may be needed
        try:
            if not _is_whole(path):  # to replace a whole one would leave none for a moment
                write_atomically(path, content, allowed)
                seal = json.dumps(_seal(step, content)).encode()
                write_atomically(path.with_suffix(".json"), seal, allowed)
        except OSError:
            _remove(_unsealed(folder), allowed)
            raise
        _remove(_superseded(folder, step, keep_last, keep_every), allowed)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def saved_steps(folder: Path) -> list[int]:
    """Steps of the sealed checkpoints, oldest first."""
    return _steps(folder, ".json")


def load_newest(folder: Path, *, report: Callable[[str], None]) -> State | None:
    """The newest checkpoint that verifies, its tensors on the CPU; None when there is none at all.

    `report` is told of each newer one that had to be passed over. Raises DataError when there are sealed ones and none
    verifies, as starting anew would throw the run away, and when the checkpoint is of another format.
    """
    sealed = saved_steps(folder)
    for step in sorted({*sealed, *_steps(folder, ".pt")}, reverse=True):
        path = folder / f"step-{step:08d}.pt"
        try:
            content = _verified(path)
        except (OSError, ValueError) as error:
            report(f"{path}: damaged checkpoint passed over: {error}")
            continue
        state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (found := state.get("format")) != FORMAT:
            raise DataError(
                f"{path}: checkpoint format {found}, this simclr-dist reads {FORMAT}; go on with the one that wrote it"
            )
        return state
    if sealed:
        raise DataError(f"{folder}: none of its {len(sealed)} checkpoints is whole; move the folder away to start anew")
    return None


def _steps(folder: Path, suffix: str) -> list[int]:
    numbers = (path.stem.removeprefix("step-") for path in folder.glob(f"step-*{suffix}"))
    return sorted(int(number) for number in numbers if number.isdigit())


def _seal(step: int, content: bytes) -> State:
    return {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verified(path: Path) -> bytes:
    """The content of a checkpoint; raises OSError or ValueError when it is not what was sealed."""
    seal = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    if seal != _seal(int(path.stem.removeprefix("step-")), content):
        raise ValueError("its bytes are not those that were written")
    return content


def _is_whole(path: Path) -> bool:
    try:
        _verified(path)
    except (OSError, ValueError):
        return False
    return True


def _unsealed(folder: Path) -> list[Path]:
    """What kills have left: temporary files, and data that has no seal."""
    steps = set(_steps(folder, ".pt")) - set(_steps(folder, ".json"))
    return [*folder.glob(".step-*.tmp"), *(folder / f"step-{step:08d}.pt" for step in steps)]


def _superseded(folder: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """What need not be kept once `step` is saved; the seal first, since what is left half removed is no checkpoint then."""
    saved = saved_steps(folder)
    later = [old for old in saved if old > step]  # damaged ones that the run was not resumed from
    older = [old for old in saved[: len(saved) - len(later)][:-keep_last] if not (keep_every and old % keep_every == 0)]
    return [folder / f"step-{old:08d}{suffix}" for old in [*later, *older] for suffix in (".json", ".pt")]


def _remove(paths: Iterable[Path], allowed: Callable[[], None]) -> None:
    """Remove files that were listed before `allowed` was asked: none of them is what a start that takes over then writes."""
    allowed()
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it costs space, and no checkpoint
            print(f"WARNING: {path}: cannot be removed: {error.strerror}", file=sys.stderr, flush=True)
