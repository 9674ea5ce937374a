"""Do the contrastive losses of other libraries have one process's gradient on several? A table, by `simclr-dist check --loss`.

    python benchmarks/losses.py [--only NAME ...] [--processes 4]

What is not installed is left out. Libraries whose loss takes something else than two views are called by the functions below,
which are examples of what a `--loss` may name. Two rows are formulas of repositories that no package index has.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

TAU = 0.1


def open_clip(z_a: Tensor, z_b: Tensor, **settings: bool) -> Tensor:
    """open_clip's loss knows its rank by arguments, and takes what is normalised."""
    loss = importlib.import_module("open_clip.loss").ClipLoss(
        **settings, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    found: Tensor = loss(F.normalize(z_a, dim=1), F.normalize(z_b, dim=1), 1 / TAU)
    return found


def metric_learning(z: Tensor, labels: Tensor, efficient: bool) -> Tensor:
    """pytorch-metric-learning's wrapper for several ranks."""
    loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(TAU)
    wrapper = importlib.import_module("pytorch_metric_learning.utils.distributed").DistributedLossWrapper(loss, efficient)
    found: Tensor = wrapper(z, labels)
    return found


def solo_learn(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The file alone: the package of 2021 needs a PyTorch Lightning of its time."""
    package = importlib.util.find_spec("solo")
    assert package is not None
    assert package.submodule_search_locations
    spec = importlib.util.spec_from_file_location("simclr", Path(package.submodule_search_locations[0], "losses/simclr.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Tensor = module.simclr_loss_func(z_a, z_b, temperature=TAU)
    return found


def gathered(z: Tensor) -> list[Tensor]:
    """Of every rank, without gradient, as torch.distributed gives it."""
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach())
    return parts


def fastssl(z_a: Tensor, z_b: Tensor) -> Tensor:
    """erow/FastSSL: one view's own rows among the other's gathered rows, which carry no gradient; times 2 tau, as MoCo v3."""
    labels = torch.arange(len(z_a)) + len(z_a) * dist.get_rank()
    views = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    losses = [F.cross_entropy(q @ torch.cat(gathered(k)).T / TAU, labels) for q, k in (views, views[::-1])]
    return torch.stack(losses).mean() * 2 * TAU


def spijkervet(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Spijkervet/SimCLR: the whole batch's loss on every rank, with a gather whose backward takes its own rows' part."""
    views = []
    for z in (z_a, z_b):
        parts = gathered(z)
        parts[dist.get_rank()] = z
        views.append(torch.cat(parts))
    z = F.normalize(torch.cat(views), dim=1)
    logits = (z @ z.T / TAU).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


# Package, its module that must be there, what is named behind --loss, further words.
LOSSES = {
    "lightly, as it comes": ("lightly", "lightly", "lightly.loss:NTXentLoss", ["--loss-args", f"temperature={TAU}"]),
    "lightly, gather_distributed": (
        *("lightly", "lightly", "lightly.loss:NTXentLoss"),
        ["--loss-args", f"temperature={TAU},gather_distributed=true"],
    ),
    "lightly's DCLLoss, gather_distributed": (
        *("lightly", "lightly", "lightly.loss:DCLLoss"),
        ["--loss-args", f"temperature={TAU},gather_distributed=true"],
    ),
    "pytorch-metric-learning NTXentLoss": (
        *("pytorch-metric-learning", "pytorch_metric_learning", "pytorch_metric_learning.losses:NTXentLoss"),
        ["--loss-args", f"temperature={TAU}", "--loss-call", "labels"],
    ),
    "the same in DistributedLossWrapper": (
        *("pytorch-metric-learning", "pytorch_metric_learning", "losses:metric_learning"),
        ["--loss-args", "efficient=false", "--loss-call", "labels"],
    ),
    "the same, efficient": (
        *("pytorch-metric-learning", "pytorch_metric_learning", "losses:metric_learning"),
        ["--loss-args", "efficient=true", "--loss-call", "labels"],
    ),
    "open_clip, as it comes": ("open_clip_torch", "open_clip", "losses:open_clip", []),
    "open_clip, local_loss": ("open_clip_torch", "open_clip", "losses:open_clip", ["--loss-args", "local_loss=true"]),
    "open_clip, gather_with_grad": (
        "open_clip_torch",
        "open_clip",
        "losses:open_clip",
        ["--loss-args", "gather_with_grad=true"],
    ),
    "open_clip, both": (
        *("open_clip_torch", "open_clip", "losses:open_clip"),
        ["--loss-args", "local_loss=true,gather_with_grad=true"],
    ),
    "stable-pretraining NTXEntLoss": (
        *("stable-pretraining", "stable_pretraining", "stable_pretraining.losses:NTXEntLoss"),
        ["--loss-args", f"temperature={TAU}"],
    ),
    "solo-learn": ("solo-learn", "solo", "losses:solo_learn", []),
    "FastSSL (its formula)": ("", "torch", "losses:fastssl", []),
    "Spijkervet/SimCLR (its formula)": ("", "torch", "losses:spijkervet", []),
    "this trainer's": ("simclr_dist", "simclr_dist", "simclr_dist:NTXentLoss", ["--loss-args", f"temperature={TAU}"]),
}


def audit(loss: str, words: list[str], processes: int) -> tuple[list[list[str]], str]:
    """The rows of its table, and the verdict on the most processes."""
    command = [sys.executable, "-m", "simclr_dist", "check", "--loss", loss, *words, "--processes", str(processes)]
    place = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))}
    quiet = {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, env=os.environ | place | quiet)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    if not rows:
        return [], next(
            (line for line in done.stderr.splitlines() if line.startswith("simclr-dist: --loss")), done.stderr[-300:]
        )
    verdicts = re.findall(r"^(?:ok|warning|failure) +loss +(?:\d+ process(?:es)?: )?(.*)$", done.stdout, re.MULTILINE)
    return rows, f"{verdicts[0].removeprefix('in one process it is ')} | {verdicts[-1]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="NAME")
    parser.add_argument("--processes", type=int, default=4)
    told = parser.parse_args()
    print("| loss | value | scale | cosine | in one process | on the most processes |\n|---|---|---|---|---|---|", flush=True)
    for name in told.only:
        package, module, loss, words = LOSSES[name]
        if importlib.util.find_spec(module) is None:
            print(f"| {name} | | | | | not installed (pip install {package}) |", flush=True)
            continue
        rows, verdict = audit(loss, words, told.processes)
        columns = [" ".join(f"{float(row[column]):.3f}" for row in rows) for column in (1, 2, 3)]
        version = f" {importlib.metadata.version(package)}" if package else ""
        print(f"| {name}{version} | {' | '.join(columns)} | {verdict} |", flush=True)
    print(f"\nprocesses 1, 2, 4 ..., {told.processes}; torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
