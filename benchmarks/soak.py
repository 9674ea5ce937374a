"""Does a long run stay as it is? Trains for minutes and samples memory, threads and open files of each of its processes.

python benchmarks/soak.py --minutes 20 --processes 2 --workers 1

A run of small steps, so that there are many: a checkpoint every 25 steps, an encoder every 500, TensorBoard, alarms, a log line
every 10. Every few seconds /proc is read for each process. The first fifth is warm-up. The rest is cut in four: the table
shows the medians of the first and of the last part, and ends with 1 when one has grown by more than 5 % and 8 MiB, or by
one thread or two files.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_dist.launch.supervisor import children
from simclr_dist.preflight.demo.images import CLASSES, render
from simclr_dist.run.folder import newest_step

CONFIG = """
run_folder: run
global_batch_size: 32
steps: 100000000
device: cpu
data: {{shards: shards, workers: {workers}}}
views: {{preset: small, image_size: 16}}
model: {{encoder: resnet10, stem: small_stride2, projector_hidden: 32, projector_dim: 16}}
optim: {{name: lars, base_lr: 0.3, warmup_steps: 10}}
checkpoint: {{every: 25, export_every: 500}}
log: {{every: 10}}
"""
FIGURES = ("MiB resident", "threads", "open files")
MAY_GROW = (8.0, 0.9, 1.9)


def main() -> int:
    arguments = _arguments()
    samples: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_shards(folder)
        (folder / "config.yaml").write_text(CONFIG.format(workers=arguments.workers))
        command = ["-m", "simclr_dist", "train", "config.yaml", "--processes", str(arguments.processes)]
        with Path(folder, "output").open("wb") as output:
            run = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        begin, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
        while (now := time.monotonic()) < end and run.poll() is None:
            if now > begin + 12 * arguments.minutes:
                for process in _tree(run.pid):
                    with suppress(OSError, StopIteration):
                        samples[_role(process, run.pid)].append(_figures(process))
            time.sleep(5)
        run.terminate()
        code = run.wait(60)
        steps = newest_step(folder / "run")
    what = f"{arguments.processes} processes with {arguments.workers} workers each"
    print(f"{arguments.minutes:g} minutes, {what}, {steps} steps, exit {code}")
    return _table(samples) or code != 75


def _table(samples: dict[str, list[tuple[float, float, float]]]) -> int:
    """Print first and last medians of each role; return whether one has grown."""
    grown = 0
    print(f"| process | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for role, rows in sorted(samples.items()):
        part = max(1, len(rows) // 4)
        cells = []
        for column, bound in enumerate(MAY_GROW):
            first, last = (statistics.median(row[column] for row in some) for some in (rows[:part], rows[-part:]))
            too_much = last - first > max(bound, 0.05 * first)
            grown |= too_much
            cells.append(f"{first:.0f} to {last:.0f}{' GROWN' * too_much}")
        print(f"| {role} | {' | '.join(cells)} |")
    return grown


def _tree(process: int) -> list[int]:
    """Return a process and all that descend from it."""
    return [process, *(descendant for child in children(process) for descendant in _tree(child))]


def _role(process: int, launcher: int) -> str:
    """Name a process by its place in the tree, and by its rank."""
    if process == launcher:
        return "launcher"
    rank, parent = _rank(process), int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    if rank is None:
        return "torchrun, or a single rank" if parent == launcher else "worker of a single rank"
    return f"rank {rank}" if _rank(parent) is None else f"rank {rank}, worker"


def _rank(process: int) -> str | None:
    entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


def _figures(process: int) -> tuple[float, float, float]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    open_files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]) / 1024, float(status["Threads"]), float(open_files)


def _make_shards(folder: Path) -> None:
    for k in range(640):
        path = folder / "images" / CLASSES[k % 3] / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(k % 3, np.random.default_rng((0, k)), size=24)).save(path)
    command = ["-m", "simclr_dist", "shard", "images", "shards", "--shard-size", "100"]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
