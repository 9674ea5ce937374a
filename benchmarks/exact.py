"""What the same bits at any number of ranks cost: real runs with `deterministic: exact` against true, in turn.

    python benchmarks/exact.py

The runs are those of step.py: the network and optimizer of configs/cifar10_cpu.yaml, on JPEG images of 32 pixels. With
`exact` a rank has one thread; otherwise the ranks share the cores. All live all the time and stand still but for their turn (as
in threads.py), so that a round sees them within a minute.
"""

import argparse
import contextlib
import platform
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from step import EVERY, RANKS, recipe
from threads import Run, random_images, training

from simclr_dist.system.machine import cores


def main() -> None:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="that count, a turn")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--encoder", default="resnet10:small_stride2", metavar="ENCODER:STEM", help="(%(default)s)")
    parser.add_argument("--pieces", type=int, nargs="+", default=[16, 32, 64], help="images of a piece (%(default)s)")
    parser.add_argument("--precision", default="fp32")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run stays behind
    about = f"{told.encoder}, {told.precision}, batch {told.batch}; {told.rounds} rounds of {told.steps} steps a turn"
    print(f"{platform.machine()}, {cores()} cores, torch {torch.__version__}; {about}")
    forms = {"true": {"deterministic": True}}
    forms |= {f"exact, {size}": {"deterministic": "exact", "exact_piece": size} for size in told.pieces}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shards, config = random_images(folder, 32), recipe(told.batch, told.encoder) | {"precision": told.precision}
        runs: dict[tuple[int, str], Run] = {}
        for ranks, form in ((ranks, form) for ranks in RANKS for form in forms):
            runs[ranks, form] = training(folder / f"{ranks} {form}", shards, ranks, config | forms[form], {})
            stack.callback(runs[ranks, form].end)
        speeds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
        for turn in range(told.rounds):
            for key in list(runs)[:: 1 if turn % 2 else -1]:
                speeds[key].append(runs[key].speed(-(-told.steps // EVERY)))
        for (ranks, form), row in speeds.items():
            times = [y / x for x, y in zip(row, speeds[ranks, "true"], strict=True)]
            spread = f"{min(times):.2f} to {max(times):.2f}"
            print(
                f"  {ranks} rank{'s' * (ranks > 1):1}, {form:9}  {statistics.median(row):5.0f} images/s,"
                f" {statistics.median(times):.2f} times the time of true ({spread})"
            )


if __name__ == "__main__":
    main()
