"""What threads that wait cost: real runs with each setting, in turn, on a quiet machine and beside a busy process.

    python benchmarks/threads.py

Each setting has runs of its own (`simclr-dist train`, ResNet-10 at 64 pixels, batch 256, one loader worker a rank) that live
all the time and stand still (SIGSTOP) but for their turn, so that a round sees all of them within a minute or two: on a machine
that others use, believe the ratios of a round and not the images a second. The settings: the product's default; how long a
thread that waits spins (libgomp's own default is 300,000 turns); one thread a rank. The foreign process computes in one thread
without end.

Each run has a session of its own, and so has the foreign process, as programs of two terminals have: Linux shares the cores
between sessions first (autogroup). torchrun gives each of several ranks a session.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from processes import signal_all

from simclr_dist.convert.shards import write_shards
from simclr_dist.system.machine import cores

DEFAULT = "default"
SETTINGS = {
    DEFAULT: {},
    "passive": {"GOMP_SPINCOUNT": "0"},
    **{f"{turns:,} turns": {"GOMP_SPINCOUNT": str(turns)} for turns in (10_000, 50_000, 300_000)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CONFIG = {
    "global_batch_size": 256,
    "steps": 100_000,
    "device": "cpu",
    "data": {"workers": 1},
    "views": {"preset": "small", "image_size": 64},
    "model": {"encoder": "resnet10", "stem": "small_stride2", "projector_hidden": 256, "projector_dim": 64},
    "optim": {"name": "adamw", "base_lr": 1e-3, "lr_rule": "constant"},
    "checkpoint": {"every": 100_000},
    "log": {"every": 1, "tensorboard": False},
}


class Run:
    """A program that takes steps when it is its turn, and stands still otherwise. It writes a line of metrics after each."""

    def __init__(self, command: list[str], folder: Path, variables: dict[str, str]) -> None:
        self._metrics, self._output = folder / "metrics.jsonl", folder.with_suffix(".txt")
        with self._output.open("wb") as output:
            how: dict[str, Any] = {"env": {**os.environ, **variables}, "stdout": output, "stderr": output}
            self._parent = subprocess.Popen(command, start_new_session=True, **how)
        self._until(2)
        self._signal(signal.SIGSTOP)

    def speed(self, steps: int) -> float:
        """Take steps; return their images a second. The first, which has stood still, does not count."""
        begin = len(self._lines())
        self._signal(signal.SIGCONT)
        self._until(begin + 1 + steps)
        self._signal(signal.SIGSTOP)
        each = [json.loads(line)["timing"]["speed/images_per_second"] for line in self._lines()[begin + 1 : begin + 1 + steps]]
        return statistics.harmonic_mean(each)

    def end(self) -> None:
        """Kill all its processes."""
        self._signal(signal.SIGKILL)
        self._parent.wait()

    def _lines(self) -> list[str]:
        return self._metrics.read_text().split("\n")[:-1] if self._metrics.exists() else []

    def _until(self, lines: int) -> None:
        while len(self._lines()) < lines:
            if self._parent.poll() is not None:
                sys.exit(f"a run has ended: {self._output.read_text()}")
            time.sleep(0.05)

    def _signal(self, number: int) -> None:
        signal_all(self._parent.pid, number)


def training(folder: Path, shards: Path, ranks: int, config: dict[str, Any], variables: dict[str, str]) -> Run:
    """Start a real run with its run folder in `folder`."""
    config = {**config, "run_folder": str(folder), "data": {"shards": str(shards), **config["data"]}}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return Run([sys.executable, "-m", "simclr_dist", "train", str(file), "--processes", str(ranks)], folder, variables)


def random_images(folder: Path, side: int) -> Path:
    """Make shards of 2,048 JPEG images of noise."""
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for number in range(2048):
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.jpg")
    write_shards(folder / "images", folder / "shards", processes=1)
    return folder / "shards"


@contextlib.contextmanager
def busy_process(number: int) -> Iterator[None]:
    """Keep foreign processes computing beside what is measured."""
    program = [sys.executable, "-c", "while True: pass"]
    foreign = [subprocess.Popen(program, start_new_session=True) for _ in range(number)]
    try:
        yield
    finally:
        for process in foreign:
            process.kill()
            process.wait()


def main() -> None:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="that count, a turn")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run stays behind
    print(
        f"{platform.machine()}, {cores()} cores, torch {torch.__version__}; {told.rounds} rounds of {told.steps} steps a turn\n"
    )
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shards = random_images(folder, 96)
        runs: dict[tuple[int, str], Run] = {}
        for ranks, setting in ((ranks, setting) for ranks in (1, 2) for setting in SETTINGS):
            runs[ranks, setting] = training(folder / f"{ranks} {setting}", shards, ranks, CONFIG, SETTINGS[setting])
            stack.callback(runs[ranks, setting].end)
        for beside in (0, 1):
            speeds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
            for turn in range(told.rounds):
                with busy_process(beside):
                    for key in list(runs)[:: 1 if turn % 2 else -1]:
                        speeds[key].append(runs[key].speed(told.steps))
            print("beside a busy process" if beside else "quiet")
            for (ranks, setting), row in speeds.items():
                ratios = [x / y for x, y in zip(row, speeds[1, DEFAULT], strict=True)]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(
                    f"  {ranks} rank{'s' * (ranks > 1):1}, {setting:13}  {statistics.median(row):5.0f} images/s,"
                    f" {statistics.median(ratios):.2f} of one rank's default ({spread})"
                )


if __name__ == "__main__":
    main()
