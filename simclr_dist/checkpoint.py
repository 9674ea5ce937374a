"""Full state on disk, so that killed is the same as paused.

A checkpoint is `step-XXXXXXXX.pt` and, written only when that is safe on disk, `step-XXXXXXXX.json` with its size and
sha256: a file without the second, or that does not match it, is not a checkpoint. Order of writing: temporary file, fsync,
rename, fsync of the folder; the same for the json; only then are older ones removed.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simclr_dist.atomic import write_atomically
from simclr_dist.errors import DataError

State = dict[str, Any]


def save(folder: Path, step: int, state: State, *, keep_last: int = 3, keep_every: int = 0) -> Path:
    """Write the checkpoint of `step` and remove those that need not be kept; returns its path.

    `state` holds tensors and plain values only (it is read back with weights_only=True). `keep_last` newest ones and those
    whose step is a multiple of `keep_every` stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, content)
    seal = {"step": step, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(path.with_suffix(".json"), json.dumps(seal).encode())
    saved = saved_steps(folder)
    later = [old for old in saved if old > step]  # damaged ones that the run was not resumed from
    for old in [*later, *saved[: len(saved) - len(later)][:-keep_last]]:
        if old in later or not (keep_every and old % keep_every == 0):
            for suffix in (".json", ".pt"):  # the seal first: what is left half removed is no checkpoint
                (folder / f"step-{old:08d}{suffix}").unlink(missing_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def saved_steps(folder: Path) -> list[int]:
    """Steps of the sealed checkpoints, oldest first."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.json"))


def load_newest(folder: Path, *, report: Callable[[str], None]) -> State | None:
    """The newest checkpoint that verifies, its tensors on the CPU; None when there is none at all.

    `report` is told of each newer one that had to be passed over. Raises DataError when there are checkpoints and none
    verifies: starting anew would throw the run away.
    """
    steps = saved_steps(folder)
    for step in reversed(steps):
        path = folder / f"step-{step:08d}.pt"
        try:
            seal = json.loads(path.with_suffix(".json").read_text())
            content = path.read_bytes()
            if len(content) != seal["size"] or hashlib.sha256(content).hexdigest() != seal["sha256"]:
                raise ValueError("its bytes are not those that were written")
            state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"{path}: damaged checkpoint passed over: {error}")
        else:
            return state
    if steps:
        raise DataError(f"{folder}: none of its {len(steps)} checkpoints is whole; move the folder away to start anew")
    return None
