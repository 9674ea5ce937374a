"""How sure is the first run? The demo's training with several seeds, and its control; prints a table.

python benchmarks/demo_seeds.py --seeds 5        (2 to 3 minutes a seed on 2 cores; makes the demo's images where they are not)

`benchmarks/results/demo.json` holds what is measured; only seeds that it lacks are trained. `make bench` removes it before.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from loss import hardware

from simclr_dist.encoder.names import encoders
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.report import summary
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.demo.run import CONFIG, DATA, prepare_images
from simclr_dist.system.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results" / "demo.json"


def accuracy(run: Path, program: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Train into `run` (or find it done) and evaluate; percent."""
    if code := torchrun(2, [*program, str(CONFIG), "--run_folder", str(run), "--seed", str(seed)], run):
        sys.exit(code)
    return summary(evaluate(encoders(run)[-1], DATA / "train", DATA / "test", workers=0))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    told = parser.parse_args()
    machine = hardware("cpu", 2, ["torchvision"], "")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"hardware": machine, "runs": {}}
    wanted = {f"seed {seed}": ("-m", "simclr_dist.train", seed) for seed in range(told.seeds)}
    wanted["control, seed 0"] = ("benchmarks/shuffled_positives.py", "", 0)
    if results["hardware"] != machine and not wanted.keys() <= results["runs"].keys():
        parser.error(f"{RESULTS}: was measured on another machine, or with other versions; remove it")
    prepare_images()
    for name, (*program, seed) in wanted.items():
        if name not in results["runs"]:
            place = told.folder / f"demo-{name.replace(', ', '-').replace(' ', '-')}"
            results["runs"][name] = accuracy(place, [part for part in program if part], seed)
            write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    print(f"{results['hardware']}\n\n| | kNN | linear |\n|---|---|---|")
    first = results["runs"]["seed 0"]
    for features, title in (("raw_pixels", "raw pixels"), ("untrained", "the encoder before training")):
        print(f"| {title} | {first['knn'][features]:.1f} | {first['linear'][features]:.1f} |")
    for name, run in results["runs"].items():
        print(f"| {name} | {run['knn']['trained']:.1f} | {run['linear']['trained']:.1f} |")
    seeds = [run for name, run in results["runs"].items() if name.startswith("seed")]
    middle = {by: statistics.fmean(run[by]["trained"] for run in seeds) for by in ("knn", "linear")}
    print(f"| mean of the seeds | {middle['knn']:.1f} | {middle['linear']:.1f} |")


if __name__ == "__main__":
    main()
