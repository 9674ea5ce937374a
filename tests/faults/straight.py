"""Images, and a run of them to which nothing happens: made once for all test modules that compare with it."""

import functools
from pathlib import Path

import training_runs as runs

STEPS = 40
EVERY = 5  # steps between checkpoints


@functools.cache
def images(base: Path) -> Path:
    """Shards below `base`, pytest's folder of this session."""
    (base / "images").mkdir()
    return runs.make_shards(base / "images", images=96)


@functools.cache
def run_on_2_ranks(base: Path) -> Path:
    """Its run folder."""
    folder = base / "straight"
    runs.write_config(folder, images(base), steps=STEPS)
    runs.train(folder, 2)
    return folder / "run"
