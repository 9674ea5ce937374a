"""Which signal that needs no labels tells a good encoder from a bad one? Rank correlations with accuracy, over small runs.

    python benchmarks/signals.py --cifar FILE.parquet --folder runs/signals       (an hour of a core; it goes on)
    python benchmarks/signals.py --results benchmarks/results/signals.json        (the tables again, of what is measured)

Runs on 16,000 CIFAR-10 training images, of `configs/cifar10_cpu.yaml`'s shape and about 10 epochs, differ in one setting each:
seed, temperature, learning rate, crops, colour, batch, size of z, loss, number of images. One learns from pairs that show
different images, and one decays its weights to nothing: neither works. Each leaves three encoders: after a third, two thirds,
all steps. Accuracy is by kNN and a linear probe (l2 1e-2) from 6,000 of those images to 4,000 training images that no run
has seen; the test set is not looked at. Signals of h and z are of these 4,000 without their labels: those of the package, and

    alpha-ReQ  Agrawal et al. 2022: the exponent with which the eigenvalues of h's covariance fall; distance from 1 counts
    NESum      He and Ozay 2022: the sum of these eigenvalues over the largest
    LiDAR      Thilak et al. 2024: the effective rank of the scatter between images, whitened by that within them;
               of 8 views of 500 images

A signal's sign is set so that more should be better. Spearman's rho, and the 95 % interval of a bootstrap over runs.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import small_runs
import torch
from scipy.stats import spearmanr
from small_runs import BENCHMARKS
from torch import Tensor

from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.names import encoder_path
from simclr_dist.evaluate.features import views
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.signals import alignment, effective_rank, pairs
from simclr_dist.run.folder import read_metrics

BASE: dict[str, object] = {
    **small_runs.OLD, "global_batch_size": 256, "steps": 600, "data.workers": 0, "optim.warmup_steps": 60,
    "checkpoint.every": 600, "log.every": 10, "log.tensorboard": False,
}  # fmt: skip
IMAGES, VOTING, ASKING, SMALL = 16_000, 6_000, 4_000, 1_000
CONTROL = "shuffled pairs"
VIEWS, ANCHORS = 8, 500
RUNS: dict[str, dict[str, object]] = {
    "base": {},
    "no colour": {"views.jitter": 0, "views.gray": 0},
    "temperature 1": {"loss.temperature": 1},
    "rate 2e-4": {"optim.base_lr": 2e-4},
    "temperature .05": {"loss.temperature": 0.05},
    "weak crops": {"views.crop_scale": "[0.6,1]"},
    CONTROL: {},
    "batch 64": {"global_batch_size": 64, "steps": 2400, "optim.warmup_steps": 240, "checkpoint.every": 2400, "log.every": 40},
    "rate 3e-2": {"optim.base_lr": 3e-2},
    "flip alone": {"views.crop_scale": "[0.9,1]", "views.jitter": 0, "views.gray": 0},
    "rate 1": {"optim.base_lr": 1},
    "weight decay 100": {"optim.weight_decay": 100},
    "seed 1": {"seed": 1},
    "1,000 images": {"data.shards": "small"},
    "strong crops": {"views.crop_scale": "[0.04,0.3]"},
    "rate 1e-3": {"optim.base_lr": 1e-3},
    "temperature .5": {"loss.temperature": 0.5},
    "z of 8 numbers": {"model.projector_dim": 8},
    "DCL": {"loss.decoupled": True},
    "seed 2": {"seed": 2},
}  # fmt: skip

# Their loss is of the same temperature and batch and their views are alike, so that numbers of z mean the same.
SAME_OBJECTIVE = (
    "base", "rate 2e-4", "rate 1e-3", "rate 3e-2", "rate 1", "weight decay 100", "seed 1", "seed 2",
    "z of 8 numbers", "1,000 images", CONTROL,
)  # fmt: skip


def make_shards(cifar: Path, folder: Path) -> None:
    """Write the shards `train`, its part `small`, `voting` (a part of it, too), and `asking`, once."""
    order = np.random.default_rng(0).permutation(pq.read_metadata(cifar).num_rows)
    parts = {
        "train": order[:IMAGES], "small": order[:SMALL], "voting": order[:VOTING], "asking": order[IMAGES : IMAGES + ASKING],
    }  # fmt: skip
    small_runs.write_parts(cifar, folder, parts)


def train(name: str, folder: Path) -> list[Path]:
    """Train the run, or find it done; its three encoders."""
    run, settings = folder / name.replace(" ", "-"), {**BASE, **RUNS[name]}
    steps = int(str(settings["steps"]))
    settings["data.shards"] = str(folder / str(settings.get("data.shards", "train")))
    settings |= {"run_folder": str(run), "checkpoint.export_every": steps // 3}
    encoders = [encoder_path(run, steps * third // 3) for third in (1, 2, 3)]
    if not all(path.is_file() for path in encoders):
        program = [str(BENCHMARKS / "shuffled_positives.py")] if name == CONTROL else ["-m", "simclr_dist.train"]
        small_runs.train(settings, program)
    return encoders


def random_views(encoder: Any, folder: Path) -> Tensor:
    """h [VIEWS, ANCHORS, d] of views as the run has them, of the same images for every encoder."""
    images, settings = ShardDataset(folder / "asking"), views.training_views(encoder.card).settings
    rows = views.choose_rows(len(images))[:ANCHORS]
    of_each = []
    for view in range(VIEWS):
        crops = views.RandomCrops(images, settings, rows.tolist(), seed=views.SEED, epoch=0, view=view)
        colour = views.view_colour(rows, settings, view)
        of_each.append(extract(crops, {"h": encoder}, encoder.card, view=views.as_it_is, colour=colour, title="views")["h"].h)
    return torch.stack(of_each)


def eigenvalues(h: Tensor) -> Tensor:
    """Of the covariance of features [n, d], the largest first, float64."""
    return torch.linalg.eigvalsh(torch.cov(h.double().T)).flip(0).clamp_min(0)


def alpha(h: Tensor) -> float:
    """alpha-ReQ: minus the slope of log eigenvalue over log rank, here from rank 3 to half of them."""
    values = eigenvalues(h)
    part = slice(2, max(8, len(values) // 2))
    rank, value = np.log(np.arange(1, len(values) + 1))[part], values[part].clamp_min(1e-12).log().numpy()
    return -float(np.polyfit(rank, value, 1)[0])


def lidar(of_views: Tensor) -> float:
    """LiDAR of [views, images, d]: exp of the entropy of the eigenvalues of within^(-1/2) between within^(-1/2)."""
    v = of_views.double()
    mean = v.mean(0)
    between, inside = torch.cov(mean.T), (v - mean).flatten(0, 1)
    within = inside.T @ inside / ((len(v) - 1) * len(mean)) + 1e-4 * torch.eye(v.shape[2], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(within)
    white = vectors @ (values.rsqrt()[:, None] * vectors.T)
    spectrum = torch.linalg.eigvalsh(white @ between @ white).clamp_min(0)
    shares = spectrum / spectrum.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def signals_of(h: Tensor, of_views: Tensor) -> dict[str, float]:
    """Of features of images [n, d], and of views of images."""
    values, compared = eigenvalues(h), pairs(h, listed=0)
    return {
        "effective rank": effective_rank(h), "effective rank, centred": effective_rank(h - h.mean(0)),
        "uniformity": -compared.uniformity, "mean cosine": -abs(compared.mean_cosine),
        "alignment": -alignment(of_views[0], of_views[1]), "alpha-ReQ": -abs(alpha(h) - 1),
        "NESum": float(values.sum() / values[0]), "LiDAR": lidar(of_views),
    }  # fmt: skip


def of_training(run: Path, step: int) -> dict[str, float]:
    """What the run's own log says at that step: the mean of its last ten lines."""
    last = [line for line in read_metrics(run) if line["step"] <= step][-10:]

    def mean(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.fmean(value(line) for line in last)

    return {
        "loss": -mean(lambda line: line.get("loss/nt_xent", line.get("loss/dcl", np.nan))),
        "loss below chance": mean(lambda line: line["loss/chance"] - line.get("loss/nt_xent", line.get("loss/dcl", np.nan))),
        "retrieval top-1": mean(lambda line: line["retrieval/top1"]),
        "retrieval top-5": mean(lambda line: line["retrieval/top5"]),
        "similarity of partners": mean(lambda line: line["similarity/positive"]),
        "similarity of others": -mean(lambda line: abs(line["similarity/negative"])),
        "alignment": -mean(lambda line: line["embedding/alignment"]),
        "uniformity": -mean(lambda line: line["embedding/uniformity"]),
        "effective rank": mean(lambda line: line["embedding/effective_rank"]),
    }


def measure(encoder_file: Path, folder: Path) -> dict[str, Any]:
    """All of one encoder."""
    encoder = load_encoder(encoder_file)
    accuracy, h = small_runs.judge(encoder, folder / "voting", folder / "asking", l2=1e-2)
    of_views = random_views(encoder, folder)
    behind: Any = load_encoder(encoder_file, layer="z")
    with torch.inference_mode():
        project = behind[1:] if isinstance(behind, torch.nn.Sequential) else torch.nn.Identity()
        z, z_views = project(h), project(of_views.flatten(0, 1)).unflatten(0, of_views.shape[:2])
    step = int(encoder.card["step"])
    found = {"log": of_training(encoder_file.parents[1], step), "h": signals_of(h, of_views), "z": signals_of(z, z_views)}
    named = {f"{of}: {name}": value for of, each in found.items() for name, value in each.items()}
    return {"step": step, **accuracy, "signals": named}


def correlation(points: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float, float]:
    """Spearman's rho of all points and its interval, by drawing runs, each a list of points, with replacement."""
    draw, found = np.random.default_rng(0), []

    def rho(of: Sequence[Sequence[tuple[float, float]]]) -> float:
        return float(spearmanr(*zip(*(point for run in of for point in run), strict=True)).statistic)

    for _ in range(1000):
        value = rho([points[k] for k in draw.integers(len(points), size=len(points))])
        found += [value] if np.isfinite(value) else []
    return rho(points), *np.percentile(found, [2.5, 97.5])


def within(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float, float]:
    """The mean over runs of rho over a run's steps, and its interval."""
    each = np.array([spearmanr(*zip(*run, strict=True)).statistic for run in runs])
    each = np.nan_to_num(each[:, None])[:, 0]  # a signal that does not move says nothing
    draw = np.random.default_rng(0)
    means = [draw.choice(each, len(each)).mean() for _ in range(1000)]
    return float(each.mean()), *np.percentile(means, [2.5, 97.5])


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables."""
    whole = {name: run for name, run in results.items() if len(run) == 3}
    print(
        f"{len(whole)} runs, 3 encoders each; top-1 % of kNN at a third, two thirds, the end; of the linear probe at the end\n"
    )
    for name, run in sorted(whole.items(), key=lambda item: -item[1][-1]["knn"]):
        print(f"| {name} | {top1(run, ' | ')} | {run[-1]['linear']:.1f} |")
    agree = [[(run[-1]["knn"], run[-1]["linear"])] for run in whole.values()]
    print(f"\nkNN with the linear probe at the end: {shown(correlation(agree))}\n")
    ours = [run for name, run in whole.items() if name in SAME_OBJECTIVE]
    print(
        f"| signal | end, all {len(whole)} runs | the linear probe | end, {len(ours)} of one objective | within a run |"
        " a third to the end |"
    )
    print("|---|---|---|---|---|---|")
    rows = []
    for signal in next(iter(whole.values()))[0]["signals"]:
        at_end = correlation([[(run[-1]["signals"][signal], run[-1]["knn"])] for run in whole.values()])
        linear = correlation([[(run[-1]["signals"][signal], run[-1]["linear"])] for run in whole.values()])
        same = correlation([[(run[-1]["signals"][signal], run[-1]["knn"])] for run in ours])
        steps = within([[(one["signals"][signal], one["knn"]) for one in run] for run in whole.values()])
        early = correlation([[(run[0]["signals"][signal], run[-1]["knn"])] for run in whole.values()])
        rows.append((at_end[0], f"| {signal} | {' | '.join(map(shown, (at_end, linear, same, steps, early)))} |"))
    early = correlation([[(run[0]["knn"], run[-1]["knn"])] for run in whole.values()])
    print("\n".join(line for _, line in sorted(rows, reverse=True)))
    print(f"| (kNN itself, with labels) | | | | | {shown(early)} |")


def top1(run: Sequence[dict[str, Any]], between: str) -> str:
    """By kNN, of a run's encoders."""
    return between.join(f"{one['knn']:.1f}" for one in run)


def shown(found: tuple[float, float, float]) -> str:
    """A correlation with its interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*found)


def main() -> None:
    """Train, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="CIFAR-10's training images as Parquet")
    parser.add_argument("--folder", type=Path, help="where shards and runs go; without it the results are printed again")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results" / "signals.json")
    told = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # scipy's of signals that do not move
    results: dict[str, list[dict[str, Any]]] = json.loads(told.results.read_text()) if told.results.exists() else {}
    if told.folder:
        told.folder.mkdir(parents=True, exist_ok=True)
        make_shards(told.cifar, told.folder)
        told.results.parent.mkdir(parents=True, exist_ok=True)
        for name in (name for name in RUNS if len(results.get(name, [])) < 3):
            for number, encoder in enumerate(train(name, told.folder)):
                if len(results.setdefault(name, [])) == number:
                    results[name].append(measure(encoder, told.folder))
                    told.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {top1(results[name], ' ')}", flush=True)
    report(results)


if __name__ == "__main__":
    main()
