"""How sure is the first run? The demo's training with several seeds, and its control; prints a table.

python benchmarks/demo_seeds.py --seeds 5        (about 3 minutes a seed on 2 cores; needs `simclr-dist demo` once)
"""

import argparse
import sys
from pathlib import Path

from simclr_dist.encoder.names import encoders
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.report import summary
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.demo.run import CONFIG, DATA


def accuracy(run: Path, program: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Train into `run` (or find it done) and evaluate; percent."""
    if code := torchrun(2, [*program, str(CONFIG), "--run_folder", str(run), "--seed", str(seed)], run):
        sys.exit(code)
    encoder = encoders(run)[-1]
    return summary(evaluate(encoder, DATA / "train", DATA / "test", workers=0))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    rows = {
        f"seed {seed}": accuracy(arguments.folder / f"demo-{seed}", ["-m", "simclr_dist.train"], seed)
        for seed in range(arguments.seeds)
    }
    rows["control, seed 0"] = accuracy(arguments.folder / "demo-control", ["benchmarks/shuffled_positives.py"], 0)
    print(f"{'test accuracy, %':18s}" + "".join(f"{p} {k:12s}" for p in ("knn", "linear") for k in rows["seed 0"][p]))
    for name, result in rows.items():
        print(f"{name:18s}" + "".join(f"{v:<16.1f}" for p in ("knn", "linear") for v in result[p].values()))


if __name__ == "__main__":
    main()
