"""kill -9 at random moments of a loop that saves checkpoints: `python killed_saves.py FOLDER KILLS SEED` prints a line of JSON.

Set OMP_NUM_THREADS=1: the loops are forks of this process, so it must have no threads.
"""

import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from simclr_dist.run.checkpoint import load_newest, save, saved_steps

SIZE = 500_000  # numbers in a checkpoint: 2 MB
LONGEST = 0.12  # seconds from the first save of a loop to its end
_STEP = struct.Struct("q")


def state_of(step: int) -> dict[str, Any]:
    """A checkpoint's content, which follows from its step."""
    return {"step": step, "weight": torch.randn(SIZE, generator=torch.Generator().manual_seed(step))}


def kill_saves(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` loops, each of which goes on in `folder` from where the one before was killed.

    Returns `kills`; `unloadable`, how often the newest sealed checkpoint then was not what had been written; `lost`, how often
    a save that the loop had finished was not there; `saves`, finished ones; and `cut_off`, kills that left a part of a save.
    """
    moments = random.Random(seed)
    found = {"kills": kills, "unloadable": 0, "lost": 0, "saves": 0, "cut_off": 0}
    for _ in range(kills):
        finished = _run_and_kill(folder, moments.uniform(0, LONGEST))
        found["saves"] += len(finished)
        if not folder.exists():
            continue
        sealed = saved_steps(folder)
        found["cut_off"] += any(path.suffix == ".tmp" or not path.with_suffix(".json").exists() for path in folder.iterdir())
        if finished and (not sealed or sealed[-1] < finished[-1]):
            found["lost"] += 1
        state = load_newest(folder, report=lambda _: None) if sealed else None
        if sealed and (state is None or state["step"] != sealed[-1] or not _as_written(state)):
            found["unloadable"] += 1
    return found


def _as_written(state: dict[str, Any]) -> bool:
    return torch.equal(state["weight"], state_of(state["step"])["weight"])


def _run_and_kill(folder: Path, seconds: float) -> list[int]:
    """The steps that a loop reported as saved before it was killed, `seconds` after it had begun to save."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        _save_for_ever(folder, writes)
    os.close(writes)
    try:
        os.read(reads, _STEP.size)  # it has resumed
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the loop ended by itself"
    with os.fdopen(reads, "rb") as pipe:
        return [step for (step,) in _STEP.iter_unpack(pipe.read())]


def _save_for_ever(folder: Path, report: int) -> None:
    """Resume, then save every step and say so once that is done; never returns."""
    try:
        state = load_newest(folder, report=lambda _: None)
        step = 0 if state is None else int(state["step"])
        os.write(report, _STEP.pack(step))
        while True:
            step += 1
            save(folder, step, state_of(step), keep_last=2)
            os.write(report, _STEP.pack(step))
    except BaseException:
        traceback.print_exc()
    finally:  # nothing else of the process that was forked may run
        os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_saves(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
