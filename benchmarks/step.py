"""What a training step costs beside its encoder: real runs against bare forward and backward of the encoder, in turn.

    python benchmarks/step.py

The run is `simclr-dist train` with the network and optimizer of configs/cifar10_cpu.yaml, in fp32 on JPEG images of 32 pixels:
reading, views, encoder, projector, all-gather, NT-Xent, gradient exchange, clipping, optimizer, log.every 3. Bare is the same
encoder, in training mode, over as many pixels (two views of each image): forward, the sum of its output, backward, without
gradient exchange, on tensors that are already there. With two ranks each has half of the batch and one thread. All live all
the time and stand still but for their turn (see threads.py), so that a round sees them within a minute. At the end: where a
run's step goes, by its own profile.
"""

import argparse
import contextlib
import json
import multiprocessing
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from threads import Run, random_images, training

from simclr_dist.method.encoders import build_simclr
from simclr_dist.system.machine import cores, threads_a_rank, wait_without_spinning

HERE = Path(__file__).resolve()
RECIPE = HERE.parents[1] / "configs" / "cifar10_cpu.yaml"
RANKS = (1, 2)
EVERY = 3  # steps a line


def recipe(batch: int, encoder: str) -> dict[str, Any]:
    """Return the recipe with steps that do not end, and another encoder."""
    config: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    name, _, stem = encoder.partition(":")
    more: dict[str, Any] = {"global_batch_size": batch, "steps": 100_000, "checkpoint": {"every": 100_000}}
    more["precision"] = "fp32"  # as the bare network
    more |= {"model": {**config["model"], "encoder": name, "stem": stem}, "data": {"workers": 1}}
    return {**config, **more, "log": {"every": EVERY, "tensorboard": False}}


def bare(folder: Path, ranks: int, batch: int, model: dict[str, Any]) -> None:
    """Take bare steps for ever; rank 0 writes lines as a run does."""
    folder.mkdir()
    together = multiprocessing.Barrier(ranks)
    for rank in range(1, ranks):
        multiprocessing.Process(target=_bare_rank, args=(rank, ranks, batch, model, folder, together), daemon=True).start()
    _bare_rank(0, ranks, batch, model, folder, together)


def _bare_rank(rank: int, ranks: int, batch: int, model: dict[str, Any], folder: Path, together: Any) -> None:
    torch.set_num_threads(threads_a_rank(ranks))
    torch.manual_seed(0)
    encoder = build_simclr(model["encoder"], stem=model["stem"]).encoder.train()
    encoder.to(memory_format=torch.channels_last)
    images = torch.randn(2 * batch // ranks, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with (folder / "metrics.jsonl").open("a", buffering=1) as file:
        while True:
            begin = time.perf_counter()
            for _ in range(EVERY):
                together.wait()
                encoder.zero_grad()
                encoder(images).sum().backward()
            together.wait()
            if rank == 0:
                speed = EVERY * batch / (time.perf_counter() - begin)
                file.write(json.dumps({"timing": {"speed/images_per_second": speed}}) + "\n")


def main() -> None:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="that count, a turn")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--encoder", default="resnet10:small_stride2", metavar="ENCODER:STEM", help="(%(default)s)")
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    wait_without_spinning()
    if told.bare:
        bare(Path(told.bare[0]), int(told.bare[1]), told.batch, recipe(told.batch, told.encoder)["model"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run stays behind
    about = f"{told.encoder}, batch {told.batch}; {told.rounds} rounds of {told.steps} steps a turn"
    print(f"{platform.machine()}, {cores()} cores, torch {torch.__version__}; {about}")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shards, config = random_images(folder, 32), recipe(told.batch, told.encoder)
        runs: dict[tuple[int, str], Run] = {}
        for ranks in RANKS:
            options = [
                "--batch",
                str(told.batch),
                "--encoder",
                told.encoder,
                "--bare",
                str(folder / f"bare-{ranks}"),
                str(ranks),
            ]
            runs[ranks, "bare"] = Run([sys.executable, str(HERE), *options], folder / f"bare-{ranks}", {})
            stack.callback(runs[ranks, "bare"].end)
            runs[ranks, "step"] = training(folder / f"run-{ranks}", shards, ranks, config, {})
            stack.callback(runs[ranks, "step"].end)
        speeds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
        for turn in range(told.rounds):
            for key in list(runs)[:: 1 if turn % 2 else -1]:
                speeds[key].append(runs[key].speed(-(-told.steps // EVERY)))
        for ranks in RANKS:
            ratios = [x / y for x, y in zip(speeds[ranks, "step"], speeds[ranks, "bare"], strict=True)]
            row = [statistics.median(speeds[ranks, kind]) for kind in ("bare", "step")]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"  {ranks} rank{'s' * (ranks > 1):1}  bare {row[0]:5.0f} images/s, step {row[1]:5.0f},"
                f" {100 * statistics.median(ratios):.0f} % of the bare encoder's speed ({spread})"
            )
        stack.pop_all().close()
        print(_profile(folder, shards, config))


def _profile(folder: Path, shards: Path, config: dict[str, Any]) -> str:
    more = {"steps": 40, "run_folder": str(folder / "profiled"), "optim": {**config["optim"], "warmup_steps": 0}}
    config = {**config, **more, "data": {"shards": str(shards), **config["data"]}}
    (folder / "profiled.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "simclr_dist", "train", str(folder / "profiled.yaml"), "--profile", "20:35"]
    subprocess.run(command, check=True, capture_output=True)
    (table,) = (folder / "profiled" / "profile").glob("*.txt")
    return table.read_text()


if __name__ == "__main__":
    main()
