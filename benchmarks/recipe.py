"""What does `configs/cifar10_cpu.yaml` reach, and for how much work? Beside the recipe that it was before.

    python benchmarks/recipe.py --train TRAIN.parquet --test TEST.parquet --folder runs/recipe --at-once 2
    python benchmarks/recipe.py        (the table again, of what benchmarks/results/recipe.json holds)

Some seeds of each: the old recipe (AdamW at 5e-3, fp32, temperature 0.2, 1800 steps of 512), half of the recipe's steps, and
the recipe. In turn, each run a process of one thread; CPU seconds are all of it, its start and decoding included. The last
encoder is judged on the test images by kNN (k = 200) and a linear probe (l2 1e-3) that learn from the training images.
Nothing was chosen on the test images: docs/log.md says on which training images the recipe was.
The same command goes on where it was ended, while recipe and machine are the same; a run that was interrupted begins again.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import small_runs
from loss import hardware
from small_runs import BENCHMARKS, OLD, RECIPE

from simclr_dist.config.strict_yaml import read_yaml
from simclr_dist.encoder.names import encoders
from simclr_dist.system.files import write_atomically

# What would cost CPU seconds beside the training.
QUIET: dict[str, Any] = {"data.workers": 0, "log.tensorboard": False, "checkpoint.every": 4500}
BEFORE: dict[str, Any] = {**OLD, "global_batch_size": 512, "steps": 1800, "optim.warmup_steps": 100}
HALF: dict[str, Any] = {"steps": 2250, "optim.warmup_steps": 125}
RECIPES = {"the old recipe": BEFORE, "half of the steps": HALF, "the recipe": {}}
L2 = 1e-3


def measure(run: tuple[str, int], told: argparse.Namespace) -> dict[str, float]:
    """Train and judge; return accuracies in percent, and CPU seconds."""
    name, seed = run
    place = told.folder / f"{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(place, ignore_errors=True)  # it was interrupted, and its seconds would be those of a part
    settings = {**QUIET, **RECIPES[name], "seed": seed, "run_folder": str(place), "data.shards": str(told.folder / "train")}
    seconds = small_runs.train(settings)
    accuracies = small_runs.judged(encoders(place)[-1], told.folder / "train", told.folder / "test", L2)
    return {**accuracies, "cpu_seconds": round(seconds, 1)}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield its lines."""
    yield f"{results['hardware']}\n\n| | n | CPU s | kNN | linear probe |\n|---|---|---|---|---|"
    for name, runs in results["runs"].items():
        of = {key: [run[key] for run in runs.values()] for key in ("cpu_seconds", "knn", "linear")}
        cells = [f"{statistics.fmean(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"
                 for each, digits in zip(of.values(), (0, 1, 1), strict=True)]  # fmt: skip
        yield f"| {name} | {len(runs)} | {' | '.join(cells)} |"


def main() -> None:
    """Train, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="CIFAR-10's training images as Parquet")
    parser.add_argument("--test", type=Path, help="its test images")
    parser.add_argument("--folder", type=Path, help="where shards and runs go; without it the results are printed again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time, each a process of one thread")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results" / "recipe.json")
    told = parser.parse_args()
    results: dict[str, Any] = {"runs": {}}
    if told.results.exists():
        results = json.loads(told.results.read_text())
    if told.folder:
        if not (told.train and told.test):
            parser.error("--folder: needs --train and --test")
        machine = hardware("cpu", 1, ["torchvision"], f"{told.at_once} runs at once")
        measured = {"hardware": machine, "recipe": read_yaml(RECIPE.read_text(), str(RECIPE))}
        for what, now in measured.items():
            if results.setdefault(what, now) != now:
                parser.error(f"{told.results}: was measured with another {what}; name another file with --results, and folder")
        for name, file in (("train", told.train), ("test", told.test)):
            small_runs.write_parts(file, told.folder, {name: np.arange(pq.read_metadata(file).num_rows)})
        runs = [(name, seed) for seed in range(told.seeds) for name in RECIPES]
        left = [(name, seed) for name, seed in runs if str(seed) not in results["runs"].get(name, {})]
        for (name, seed), found in small_runs.several(left, told.at_once, lambda run: measure(run, told)):
            results["runs"].setdefault(name, {})[str(seed)] = found
            told.results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(told.results, (json.dumps(results, indent=1) + "\n").encode())
            print(f"{name}, seed {seed}: {json.dumps(found)}", flush=True)
    elif not results["runs"]:
        parser.error(f"{told.results} does not exist: measure first, with --folder, --train and --test")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
