"""What small runs share: shards of parts of CIFAR-10, a process of one thread for each training, and its encoder's accuracy.

python benchmarks/small_runs.py ENCODER VOTING ASKING L2        (top-1 in percent, as JSON)
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.config.strict_yaml import spell
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.evaluate.protocols.linear import linear_probe

BENCHMARKS = Path(__file__).resolve().parent
RECIPE = BENCHMARKS.parent / "configs" / "cifar10_cpu.yaml"
OLD: dict[str, object] = {  # what the recipe was until it took Muon, but for batch and steps
    "precision": "fp32", "loss.temperature": 0.2, "optim.name": "adamw", "optim.base_lr": 5e-3, "optim.momentum": 0.9,
    "optim.weight_decay": 1e-4,
}  # fmt: skip
K, CLASSES = 200, 10


def write_parts(images: Path, folder: Path, parts: Mapping[str, NDArray[Any]]) -> None:
    """Write the shards of each part, which is rows of a Parquet file, once."""
    wanted = {name: rows for name, rows in parts.items() if not (folder / name / "manifest.parquet").is_file()}
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(images) if wanted else None
    for name, rows in wanted.items():
        pq.write_table(table.take(rows), folder / f"{name}.parquet")
        write_shards(folder / f"{name}.parquet", folder / name, processes=1)


def train(settings: Mapping[str, object], program: Sequence[str] = ("-m", "simclr_dist.train")) -> float:
    """Train the recipe with some settings in a process of one thread. Returns its CPU seconds."""
    pairs = [text for key, value in settings.items() for text in (f"--{key}", spell(value))]
    return python(*program, str(RECIPE), *pairs)[1]


def python(*arguments: str) -> tuple[str, float]:
    """Run Python with one thread; return what it prints, and the CPU seconds of it and all that it waited for.

    Raises CalledProcessError.
    """
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return printed, used.ru_utime + used.ru_stime


def several(runs: Sequence[Any], at_once: int, of: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Measure some runs at once; yield each as it is done."""
    pool = ThreadPoolExecutor(at_once)
    try:
        futures = {pool.submit(of, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def judged(encoder: Path, voting: Path, asking: Path, l2: float) -> dict[str, float]:
    """Return what `judge` returns of the accuracies, from a process of one thread."""
    found: dict[str, float] = json.loads(python(__file__, *map(str, (encoder, voting, asking, l2)))[0])
    return found


def judge(encoder: Any, voting: Path, asking: Path, l2: float) -> tuple[dict[str, float], Tensor]:
    """Return top-1 in percent by kNN and the linear probe, which learn from `voting`; and h [n, d] of the images asked."""
    sets = {"voting": ShardDataset(voting), "asking": ShardDataset(asking)}
    known, asked = (extract(images, {"h": encoder}, encoder.card, title=name)["h"] for name, images in sets.items())
    votes = weighted_knn(known.h, known.label, asked.h, k=K, classes=CLASSES)
    predict, _ = linear_probe(known.h, known.label, classes=CLASSES, l2=l2)
    of = {"knn": votes, "linear": predict(asked.h)}
    return {name: round(100 * float((one.argmax(1) == asked.label).double().mean()), 3) for name, one in of.items()}, asked.h


if __name__ == "__main__":
    torch.set_num_threads(1)
    encoder_file, voting, asking, l2 = sys.argv[1:]
    print(json.dumps(judge(load_encoder(encoder_file), Path(voting), Path(asking), float(l2))[0]))
