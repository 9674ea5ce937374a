"""What does each choice of SimCLR do? One setting at a time beside the recipe for CPUs, some seeds each, in tables.

    python benchmarks/ablations.py --train TRAIN.parquet --test TEST.parquet --folder runs/ablations --at-once 2
    python benchmarks/ablations.py        (the tables again, of what benchmarks/results/ablations.json holds)

Every run is `configs/cifar10_cpu.yaml` but for what its table varies, and sees as many images; an 18th of its steps warms up.
Its encoder is judged on the test images by kNN (k = 200) and a linear probe (l2 1e-3) that learn from the training images.
Where a setting wants a learning rate of its own, three are tried before, on nine tenths of the training images (seed 0), and
the best by kNN on the last tenth is taken. The file keeps these, too. Nothing is chosen on the test images.
Another optimizer than the recipe's has the momentum and the weight decay that are usual for it.

Batches beyond the recipe's are cut into micro-batches of its size, so that BatchNorm's group stays; in smaller ones it shrinks
with the batch. What the group and the negatives do alone, their own tables say.

The same command goes on where it was ended; a run that was interrupted begins again. CPU seconds are of the training's process,
its start included.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import small_runs
from loss import hardware
from small_runs import BENCHMARKS, RECIPE

from simclr_dist.config.load import config_from_dict
from simclr_dist.config.settings import Config, OptimConfig
from simclr_dist.config.strict_yaml import leaves, read_yaml, spell
from simclr_dist.encoder.names import encoder_path
from simclr_dist.run.status import read_status
from simclr_dist.system.files import write_atomically

Settings = dict[str, Any]  # by dotted key, beside the recipe
Results = dict[str, Any]  # what the file holds

LOCAL = "local_negatives"  # the one key that no config has: images that the loss compares
USUAL: dict[str, Settings] = {  # what each optimizer has where the recipe has another one; the rest is as by default
    "lars": {"weight_decay": 1e-6}, "sgd": {"weight_decay": 1e-4}, "adamw": {"weight_decay": 1e-4},
    "muon": {"weight_decay": 0.1, "momentum": 0.95},
}  # fmt: skip
DEFAULT = {key: getattr(OptimConfig, key) for key in ("momentum", "betas", "trust_coefficient")}
L2, WARMUP = 1e-3, 18


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    settings: Settings
    rates: Sequence[float] = ()  # the best is chosen on held-back images
    after: Settings = field(default_factory=dict)  # with the rate that was chosen without them


def factors(base: Config) -> dict[str, list[Row]]:
    """List what is varied, and the lines of each table. That of the recipe has no settings."""
    batch, group = base.global_batch_size, base.global_batch_size // base.micro_batches

    def one_by_one(key: str, recipe: Any, *others: Any) -> list[Row]:
        values = {value: spell(value).removesuffix(".0") for value in sorted({recipe, *others})}
        return [Row(f"{name}{', the recipe' * (value == recipe)}", {key: value}) for value, name in values.items()]

    batches = []
    for size in sorted({64, 256, 1024, 4096, batch}):
        pieces, rates = max(1, size // group), three(base.peak_lr * math.sqrt(size / batch))
        name = f"{size} in {pieces} micro-batches" if pieces > 1 else f"{size}"
        batches.append(Row(name, {"global_batch_size": size, "micro_batches": pieces}, rates))
    optimizers = [Row(name, optimizer(base, name), three(centre(base, name))) for name in USUAL]
    clips = one_by_one("optim.clip_norm", base.optim.clip_norm, 0.0, 0.1, 1.0)
    lars = optimizers[0]
    return {
        "batch size": [Row(f"{batch}, the recipe", {}), *batches],
        "negatives alone": [
            *(Row(f"{2 * (images - 1)}, in groups of {images}", {LOCAL: images}) for images in (16, 64, 256) if images < batch),
            Row(f"{2 * (batch - 1)}, the recipe", {}),
        ],
        "BatchNorm group": [
            *(Row(f"{images} images", {"micro_batches": batch // images}) for images in (16, 64, 256) if images < group),
            Row(f"{group} images, the recipe", {}),
        ],
        "temperature": one_by_one("loss.temperature", base.loss.temperature, 0.05, 0.1, 0.2, 0.5, 1.0),
        "optimizer": [Row(f"{base.optim.name} at {base.peak_lr:g}, the recipe", {}), *optimizers],
        "clipping": [
            *clips,
            *(Row(f"lars, {clip:g}", lars.settings, lars.rates, {"optim.clip_norm": clip})
              for clip in sorted({0.0, 1.0, base.optim.clip_norm})),
        ],
        "decoupled": one_by_one("loss.decoupled", base.loss.decoupled, not base.loss.decoupled),
    }  # fmt: skip


def three(rate: float) -> list[float]:
    """Its half, itself, its double."""
    return [float(f"{rate * times:.3g}") for times in (0.5, 1, 2)]


def centre(base: Config, name: str) -> float:
    """The middle rate of an optimizer: the recipe's, else what is usual (LARS: Chen et al. 2020, B.9)."""
    size = base.global_batch_size / 256
    return base.peak_lr if base.optim.name == name else {"lars": size, "sgd": 0.06 * size, "adamw": 5e-3, "muon": 2e-2}[name]


def optimizer(base: Config, name: str) -> Settings:
    """Set one with what is usual for it: the recipe's own decay and momentum were chosen for the recipe's."""
    own = {} if name == base.optim.name else DEFAULT | USUAL[name]
    return {"optim.name": name, **{f"optim.{key}": value for key, value in own.items()}}


def at_rate(base: Config, settings: Settings, rate: float) -> Settings:
    """Add a peak rate, unless the recipe has it by itself."""
    size = settings.get("global_batch_size", base.global_batch_size)
    own = dataclasses.replace(base, global_batch_size=size).peak_lr
    at = {} if math.isclose(rate, own, rel_tol=1e-2) else {"optim.lr_rule": "constant", "optim.base_lr": rate}
    return {**settings, **at}


def named(base: Config, settings: Settings) -> str:
    """What is not as in the recipe. Settings that say the same have one name, and one run."""
    recipe = dict(leaves(base.to_dict()))
    other = {key: value for key, value in sorted(settings.items()) if key not in recipe or recipe[key] != value}
    return " ".join(f"{key}={spell(value).replace(' ', '')}" for key, value in other.items()) or "recipe"


@dataclass(frozen=True)
class Run:
    """A training and what it is judged on. `tried`: for its rate, on held-back training images."""

    name: str
    settings: Settings
    seed: int = 0
    tried: bool = False

    @property
    def folder(self) -> str:
        """Its place below the folder of all runs."""
        return f"{'tried' if self.tried else f'seed-{self.seed}'}/{self.name.replace(' ', ',')}"


def runs_tried(base: Config, rows: Sequence[Row]) -> list[Run]:
    """Runs that choose the rows' rates."""
    settings = [at_rate(base, row.settings, rate) for row in rows for rate in row.rates]
    return [*{name: Run(name, each, tried=True) for each in settings for name in [named(base, each)]}.values()]


def chosen_rate(base: Config, row: Row, tried: dict[str, Any]) -> float:
    """The rate with the best kNN on held-back images. Raises KeyError where one was not tried."""
    return max(row.rates, key=lambda rate: tried[named(base, at_rate(base, row.settings, rate))].get("knn", 0))


def settled(base: Config, row: Row, tried: dict[str, Any]) -> Settings:
    """The row's settings with its rate."""
    at = at_rate(base, row.settings, chosen_rate(base, row, tried)) if row.rates else row.settings
    return {**at, **row.after}


def complete(base: Config, run: Run, images: int) -> Settings:
    """All that differs from the recipe, for a run that sees so many images, but for its paths."""
    steps = max(1, round(images / run.settings.get("global_batch_size", base.global_batch_size)))
    return {
        **run.settings, "seed": run.seed, "epochs": None, "steps": steps, "optim.warmup_steps": round(steps / WARMUP),
        "data.workers": 0, "checkpoint.every": steps, "log.every": max(1, steps // 20), "log.tensorboard": False,
    }  # fmt: skip


def measure(base: Config, run: Run, images: int, folder: Path) -> dict[str, Any]:
    """Train and judge; return accuracies in percent, and CPU seconds."""
    place, settings = folder / run.folder, complete(base, run, images)
    if place.exists():
        shutil.rmtree(place)  # it was interrupted, and its seconds would be those of a part
    voting, asking = (folder / name for name in (("most", "held-back") if run.tried else ("train", "test")))
    encoder = encoder_path(place, settings["steps"])
    settings |= {"data.shards": str(voting), "run_folder": str(place)}
    local = settings.pop(LOCAL, None)
    program = [str(BENCHMARKS / "local_negatives.py"), str(local)] if local else ["-m", "simclr_dist.train"]
    try:
        seconds = small_runs.train(settings, program)
    except subprocess.CalledProcessError:
        if read_status(place).get("state") != "diverged":
            raise
        return {"diverged": True}
    shutil.rmtree(place / "checkpoints")
    return {**small_runs.judged(encoder, voting, asking, L2), "cpu_seconds": round(seconds, 1)}


def begun(told: argparse.Namespace, recipe: Settings) -> Results:
    """The results that the file holds, or none yet. Exits where they are of other runs than these."""
    sets = {name: pq.read_metadata(file).num_rows for name, file in (("train", told.train), ("test", told.test))}
    of = {"recipe": recipe, "images": told.images, "sets": sets}
    if not told.results.exists():
        return {**of, "hardware": hardware("cpu", 1, ["torchvision"], f"{told.at_once} runs at once"), "tried": {}, "runs": {}}
    results: Results = json.loads(told.results.read_text())
    if other := [name for name, value in of.items() if results[name] != value]:
        sys.exit(f"{told.results}: was measured with other {' and '.join(other)}; name another file with --results")
    return results


def go_on(told: argparse.Namespace, results: Results, base: Config) -> None:
    """Do all runs that have no result: first those that choose rates, then seed by seed."""
    order = np.random.default_rng(0).permutation(results["sets"]["train"])
    tenth = len(order) // 10
    small_runs.write_parts(told.train, told.folder, {"train": order, "most": order[tenth:], "held-back": order[:tenth]})
    small_runs.write_parts(told.test, told.folder, {"test": np.arange(results["sets"]["test"])})
    rows = [row for name, of in factors(base).items() if name in told.only for row in of]

    def do(runs: Sequence[Run], keep: Callable[[Run, dict[str, Any]], None]) -> None:
        measured = small_runs.several(runs, told.at_once, lambda run: measure(base, run, told.images, told.folder))
        for number, (run, found) in enumerate(measured, 1):
            keep(run, found)
            write_atomically(told.results, (json.dumps(results, indent=1) + "\n").encode())
            print(f"{number} of {len(runs)}: {run.folder}: {json.dumps(found)}", flush=True)

    tried, done = results["tried"], results["runs"]
    do([run for run in runs_tried(base, rows) if run.name not in tried], lambda run, found: tried.update({run.name: found}))
    settings = {named(base, each): each for row in rows for each in [settled(base, row, tried)]}
    runs = [Run(name, each, seed) for seed in range(told.seeds) for name, each in settings.items()]
    do(
        [run for run in runs if str(run.seed) not in done.get(run.name, {})],
        lambda run, found: done.setdefault(run.name, {}).update({str(run.seed): found}),
    )


def tables(results: Results) -> Iterator[str]:
    """Yield the lines: a table for each factor, and one of the rates that were tried."""
    base, tried, images = config_from_dict(results["recipe"], "recipe"), results["tried"], results["images"]
    sets, steps = results["sets"], f"{images / base.global_batch_size:.0f}"
    yield f"A run sees {images} images ({steps} steps of the recipe), of {sets['train']}; {sets['test']} test images."
    yield "Top-1 in percent: the mean over n seeds, and their range."
    yield f"{results['hardware']}."
    rates: dict[str, tuple[str, dict[str, float | None], str]] = {}
    for factor, rows in factors(base).items():
        lines = []
        for row in rows:
            of_rates = [named(base, at_rate(base, row.settings, rate)) for rate in row.rates]
            if not all(name in tried for name in of_rates):
                continue
            name, rate = named(base, settled(base, row, tried)), f"{chosen_rate(base, row, tried):g}" if row.rates else ""
            if measured := [*results["runs"].get(name, {}).values()]:
                lines.append(f"| {row.name} | {rate} | {' | '.join(cells(measured))} |")
            if row.rates:
                cell = {f"{rate:g}": tried[of].get("knn") for rate, of in zip(row.rates, of_rates, strict=True)}
                rates.setdefault(json.dumps(row.settings), (f"{factor} {row.name}", cell, rate))
        if lines:
            yield f"\n| {factor} | rate chosen | n | kNN | linear probe | CPU s |\n|---|---|---|---|---|---|"
            yield from lines
    if rates:
        yield "\n| peak rates tried, kNN on held-back training images | half | middle | double | chosen |"
        yield "|---|---|---|---|---|"
    for row_name, cell, rate in rates.values():
        each = (f"{of}: diverged" if knn is None else f"{of}: {knn:.1f}" for of, knn in cell.items())
        at_edge = " (at the edge)" * (list(cell).index(rate) != 1)
        yield f"| {row_name} | {' | '.join(each)} | {rate}{at_edge} |"


def cells(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the number of seeds, accuracies by kNN and the linear probe, and CPU seconds."""
    whole = [run for run in runs if "diverged" not in run]
    yield f"{len(whole)}" + f", {len(runs) - len(whole)} diverged" * (len(whole) < len(runs))
    for protocol in ("knn", "linear"):
        values = [run[protocol] for run in whole]
        several = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        yield f"{statistics.fmean(values):.1f}{several}" if values else ""
    yield f"{statistics.fmean(run['cpu_seconds'] for run in whole):.0f}" if whole else ""


def main() -> None:
    """Train, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = read_yaml(RECIPE.read_text(), str(RECIPE))
    base = config_from_dict(recipe, str(RECIPE))
    names = list(factors(base))
    parser.add_argument("--train", type=Path, help="CIFAR-10's training images as Parquet")
    parser.add_argument("--test", type=Path, help="its test images")
    parser.add_argument("--folder", type=Path, help="where shards and runs go; without it the results are printed again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time, each a process of one thread")
    parser.add_argument("--images", type=int, default=115_200, help="that each run sees")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results" / "ablations.json")
    told = parser.parse_args()
    if told.folder:
        if not (told.train and told.test):
            parser.error("--folder: needs --train and --test")
        results = begun(told, recipe)
        for folder in (told.folder, told.results.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            go_on(told, results, base)
        except subprocess.CalledProcessError as error:
            sys.exit(f"a run ended with exit code {error.returncode}: {' '.join(error.cmd)}")
    elif told.results.exists():
        results = json.loads(told.results.read_text())
    else:
        parser.error(f"{told.results} does not exist: measure first, with --folder, --train and --test")
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
