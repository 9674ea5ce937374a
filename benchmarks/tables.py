"""Write README's tables of accuracies anew, of what benchmarks/results/ holds.

python benchmarks/tables.py
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import curves

HERE = Path(__file__).resolve().parents[1]
RESULTS, README = HERE / "benchmarks" / "results", HERE / "README.md"
BEGIN, END = "<!-- benchmarks/tables.py writes what follows -->\n", "<!-- until here -->\n"


def several(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest."""
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def rows() -> Iterator[str]:
    """Yield the table's lines."""
    demo, recipe = (json.loads((RESULTS / f"{name}.json").read_text())["runs"] for name in ("demo", "recipe"))
    published: Any = json.loads((RESULTS / "cifar10_cpu" / "eval.json").read_text())["protocols"]
    seeds = [run for name, run in demo.items() if name.startswith("seed")]
    control = demo["control, seed 0"]
    yield "| test accuracy, % (kNN / linear) | raw pixels | encoder before training | after SimCLR |"
    yield "|---|---|---|---|"
    plain = [f"{seeds[0]['knn'][of]:.1f} / {seeds[0]['linear'][of]:.1f}" for of in ("raw_pixels", "untrained")]
    trained = " / ".join(several([run[by]["trained"] for run in seeds]) for by in ("knn", "linear"))
    yield f"| `make demo`'s run, {len(seeds)} seeds, mean (lowest to highest) | {' | '.join(plain)} | {trained} |"
    shown = f"{control['knn']['trained']:.1f} / {control['linear']['trained']:.1f}"
    yield f"| its control: views of different images as positives | | | {shown} |"
    for name, title in (("the recipe", "CIFAR-10, small ResNet"), ("half of the steps", "the same, half of the steps")):
        runs = recipe[name].values()
        seconds = statistics.fmean(run["cpu_seconds"] for run in runs)
        plain = [" / ".join(f"{published[by]['results'][of]['top1']:.1f}" for by in ("knn", "linear"))
                 for of in ("raw_pixels", "untrained")]  # fmt: skip
        trained = " / ".join(several([run[by] for run in runs]) for by in ("knn", "linear"))
        yield f"| {title}, {seconds:.0f} CPU seconds, {len(runs)} seeds | {' | '.join(plain)} | {trained} |"
    yield ""
    yield from beside_others(json.loads((RESULTS / "curves.json").read_text()))


def beside_others(results: curves.Result) -> Iterator[str]:
    """Yield a table of where the learning curves end."""
    about, names = results["about"], curves.NAMES
    ends = {system: curves.curve(results, "cifar", system) for system in ("recipe", "ours", "stable", "lightly")}
    to_peers = {other: ends[other][-1].knn[0] for other in ("lightly", "stable")}
    title = f"CIFAR-10, the same small ResNet, {about['images']:,} images seen, one thread"
    yield f"| {title} | kNN, % | linear, % | CPU s | CPU s to lightly's kNN | to stable-pretraining's |"
    yield "|---|---|---|---|---|---|"
    for system, points in ends.items():
        version = about["versions"].get(names[system], "")
        accuracies = [f"{middle:.1f} ± {half:.1f}" for middle, half in (points[-1].knn, points[-1].linear)]
        reached = [curves.work_to_reach(points, "knn", top1) for top1 in to_peers.values()]
        cells = [f"{names[system]} {version}".strip(), *accuracies, f"{points[-1].cpu:.0f}", *reached]
        yield f"| {' | '.join(cells)} |"


def written(text: str) -> str:
    """README with the table as it should be."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{README}: has no place for the table: {BEGIN}{END}"
    return before + begin + "\n".join(rows()) + "\n" + end + after


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    print("\n".join(rows()))
