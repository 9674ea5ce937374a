"""What watching a run costs: blocks of steps with and without it, in turns, in one process; and what the probe costs.

    OMP_NUM_THREADS=1 python benchmarks/monitoring.py
    OMP_NUM_THREADS=1 python benchmarks/monitoring.py --train data/demo/train --test data/demo/test     # with the probe

A block is `--every` steps (log.every). With: the two clocks, and at its end the metrics, the gather over ranks, the
histograms, the alarms, metrics.jsonl, TensorBoard and the line. Without: the steps alone. The median over pairs of blocks of
what the one took more than the other, in process CPU time and in wall time, with its quartiles; beside it the time spent
inside the monitoring by its own clock, which noise of the machine hardly moves. Views are random numbers: the loader and the
colouring, left out, would make the share smaller. `record_function`, which stays in the step, is measured by itself.
"""

import argparse
import contextlib
import io
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from simclr_dist.config.settings import Config, DataConfig, LogConfig, ModelConfig, OptimConfig, ProbeConfig, ViewsConfig
from simclr_dist.data.manifest import load_manifest
from simclr_dist.method.distributed import World
from simclr_dist.train.describe import view_settings
from simclr_dist.train.learner import Learner, build_learner, step_metrics
from simclr_dist.train.loop import training_step
from simclr_dist.train.monitor import Clock, Monitor
from simclr_dist.train.probe import OnlineProbe

RANGES_A_STEP = 8  # record_function's, with one micro-batch on one rank


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(
        global_batch_size=arguments.batch,
        model=ModelConfig(encoder=arguments.encoder, stem="small_stride2", projector_hidden=256, projector_dim=128),
        optim=OptimConfig(name="lars", base_lr=0.3),
        views=ViewsConfig(preset="small", image_size=arguments.size),
        data=DataConfig(shards=arguments.train or "none"),
        log=LogConfig(every=arguments.every),
        probe=ProbeConfig(every_epochs=arguments.every_epochs, shards=arguments.test or "none", images=arguments.images),
    )
    here = World(0, 1, 0, device)
    learner = build_learner(config, here)
    views = torch.randn(2, arguments.batch, 3, arguments.size, arguments.size, device=device)
    print(
        f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    )
    print(f"{arguments.encoder}, {arguments.batch} images of {arguments.size} pixels, log.every {arguments.every}")
    with tempfile.TemporaryDirectory() as folder:
        step_seconds = _watching(learner, views, config, device, Path(folder), arguments.pairs)
    begin = time.perf_counter()
    for _ in range(10_000):
        with record_function("x"):
            pass
    ranges = RANGES_A_STEP * (time.perf_counter() - begin) / 10_000
    print(f"record_function, {RANGES_A_STEP} a step: {1e6 * ranges:.0f} us, {100 * ranges / step_seconds:.3f} % of a step")
    if arguments.train and arguments.test:
        _probing(learner, config, here, step_seconds)


def _watching(learner: Learner, views: torch.Tensor, config: Config, device: torch.device, run: Path, pairs: int) -> float:
    """Prints the table; returns the seconds of a step."""
    monitor = Monitor(run, active=True, total_steps=10**6, first_step=0)
    watch, clock, silent = learner.local_timer, Clock(device, learner.local_timer), io.StringIO()
    number = 0

    def block(watched: bool) -> tuple[float, float, float]:
        """CPU seconds, wall seconds, and those within the monitoring at the end."""
        nonlocal number
        # Without: no clock at all, which the type of a timer does not foresee.
        learner.local_timer = watch if watched else contextlib.nullcontext()  # type: ignore[assignment]  # a timer that does nothing
        steps: Any = range(config.log.every)
        _wait(device)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in clock.waiting(steps) if watched else steps:
            outcome = training_step(learner, [(views[0], views[1])], config, 1e-3)
            number += 1
            if watched:
                monitor.advance()
        _wait(device)
        inside = time.perf_counter()
        if watched:
            metrics = step_metrics(outcome, learner, config, number, 1e-3, 0)
            with contextlib.redirect_stdout(silent):
                monitor.log(number, metrics, clock.read(config.global_batch_size, 100), (outcome["z_a"], outcome["z_b"]))
        _wait(device)
        end = time.perf_counter()
        return time.process_time() - cpu, end - wall, end - inside

    block(True)
    block(False)
    with_it, without = [], []
    for pair in range(pairs):
        for watched in (True, False) if pair % 2 else (False, True):
            (with_it if watched else without).append(block(watched))
    print(f"\n{pairs} pairs of blocks; median [quartiles] of the difference, % of a block without monitoring")
    for name, column in (("CPU time", 0), ("wall time", 1)):
        usual = statistics.median(each[column] for each in without)
        more = [100 * (a[column] - b[column]) / usual for a, b in zip(with_it, without, strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        print(f"  {name:10} {middle:6.2f} [{low:.2f}, {high:.2f}]   block {1000 * usual:.0f} ms")
    usual = statistics.median(each[1] for each in without)
    inside = statistics.median(each[2] for each in with_it)
    print(f"  {'inside':10} {100 * inside / usual:6.2f}   {1000 * inside:.2f} ms a line")
    return usual / config.log.every


def _probing(learner: Learner, config: Config, here: World, step_seconds: float) -> None:
    train = load_manifest(config.data.shards)
    begin = time.perf_counter()
    steps = config.steps_per_epoch(len(train))
    probe = OnlineProbe(config, view_settings(config), train, here, steps_per_epoch=steps)
    reading = time.perf_counter() - begin
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        found = probe.measure(learner.model)
        seconds.append(time.perf_counter() - begin)
    between = probe.every * step_seconds
    took = statistics.median(seconds)
    print(f"\nprobe: {probe}; {found}")
    print(f"  {took:.2f} s (of 5: {min(seconds):.2f}-{max(seconds):.2f}), read once at the start in {reading:.2f} s")
    print(f"  every {config.probe.every_epochs} epochs of {steps} steps, {between:.1f} s: {100 * took / between:.2f} %")
    for images in (50_000, 1_281_167):
        every_epoch = took / (images / config.global_batch_size * step_seconds)
        print(f"  the same in every epoch of {images} images: {100 * every_epoch:.3f} %")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--train", help="shards that the run would train on")
    parser.add_argument("--test", help="labelled shards for the probe")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--every-epochs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
