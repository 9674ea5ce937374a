"""The parts of benchmarks/gpu.py, one a process: `python benchmarks/gpu_parts.py TASK`, with the task in JSON.

Each appends its figures to FOLDER/parts/NAME.jsonl as soon as it has them.
"""

import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from large_batch import measure as trainer_steps
from loss import CONTESTANTS as LOSSES
from loss import FULL, MIB, alone, is_memory_error, save_exact
from optim import CONTESTANTS as OPTIMIZERS
from optim import DROPPED, build, operations, ratio, timed
from PIL import Image
from processes import end

from simclr_dist.config.settings import Config, ModelConfig, OptimConfig, Stem
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.views.colour import Colour, colour_views
from simclr_dist.data.views.draws import draw_views, preset_views
from simclr_dist.encoder.names import encoder_path
from simclr_dist.method.distributed import World
from simclr_dist.method.encoders import build_simclr
from simclr_dist.preflight.demo.images import CLASSES, render
from simclr_dist.run.checkpoint import saved_steps
from simclr_dist.run.folder import read_metrics
from simclr_dist.run.status import read_ledger
from simclr_dist.system.errors import PREEMPTED
from simclr_dist.system.machine import cores
from simclr_dist.system.version import describe
from simclr_dist.train.learner import build_learner, cut

ROOT = Path(__file__).resolve().parents[1]
CIFAR_KNN, CIFAR_SECONDS, CIFAR_SPEED = 84.7, 720, 16_000
EVERY = 5  # steps between lines of a run's log
POLL = 0.05


@dataclass(frozen=True)
class Scale:
    """How much each part does."""

    device: str
    precision: Literal["bf16", "fp32"]
    losses: tuple[int, ...]
    names: tuple[str, ...]  # of losses
    optimizer_steps: int
    views: int  # in a portion that is coloured
    pictures: int
    encoder: str
    stem: Stem
    side: int  # of a view
    batch: int
    steps: int
    compile: tuple[bool, ...]
    large: int  # global batch
    pieces: tuple[int, ...]
    small_steps: int  # of the runs that are killed
    repetitions: int
    cifar_images: int  # where no CIFAR-10 is given
    cifar: dict[str, Any]  # settings that differ from configs/cifar10_resnet18.yaml


GPU = Scale(
    device="cuda", precision="bf16", losses=(4096, 16384, 65536),
    names=("ours", "reference", "compiled", "lightly", "supcon", "liger", "cce"), optimizer_steps=53, views=256,
    pictures=4096, encoder="resnet50", stem="imagenet", side=224, batch=256, steps=60, compile=(False, True), large=4096,
    pieces=(16, 32), small_steps=120, repetitions=5, cifar_images=50_000, cifar={"epochs": 200},
)  # fmt: skip
TINY = Scale(
    device="cpu", precision="fp32", losses=(64, 128), names=("ours", "reference"), optimizer_steps=5, views=8, pictures=64,
    encoder="resnet10", stem="small_stride2", side=32, batch=8, steps=15, compile=(False,), large=16, pieces=(2,),
    small_steps=10, repetitions=2, cifar_images=64,
    cifar={
        "steps": 10, "epochs": None, "global_batch_size": 16, "precision": "fp32", "log": {"every": 2},
        "optim": {"warmup_steps": 2}, "checkpoint": {"every": 5, "export_every": 0},
        "model": {"encoder": "resnet10", "stem": "small_stride2", "projector_hidden": 32, "projector_dim": 16},
    },
)  # fmt: skip


class Task:
    """What a part is told, and where its figures go."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.name: str = told["part"]
        self.folder = Path(told["folder"])
        self.rehearse: bool = told["rehearse"]
        self.until: float = told["until"]  # by time.time()
        self.cifar: str | None = told["cifar"]
        self.cifar_test: str | None = told["cifar_test"]
        self.scale = TINY if self.rehearse else GPU
        self._file = self.folder / "parts" / f"{self.name}.jsonl"

    def report(
        self, figure: str, value: float | str, unit: str = "", *, n: int = 1, target: str = "", met: bool | None = None,
        failed: bool = False,
    ) -> None:  # fmt: skip
        """One figure; `met` says whether it is what `target` wants, which a rehearsal does not judge."""
        judged = None if self.rehearse else met
        row = {"part": self.name, "figure": figure, "value": value, "unit": unit, "n": n, "target": target, "met": judged}
        with self._file.open("a") as file:
            file.write(json.dumps(row | {"failed": failed}) + "\n")
        print(f"{self.name}: {figure}: {value} {unit}", flush=True)

    @contextmanager
    def attempt(self, figure: str, *, ours: bool = True) -> Iterator[None]:
        """What fails here costs its own figure alone, and is written down."""
        try:
            yield
        except Exception as error:  # others' kernels raise what they like
            traceback.print_exc()
            full = is_memory_error(error)
            said = FULL if full else f"failed: {type(error).__name__}: {str(error)[:300]}"
            self.report(figure, said, failed=ours and not full)
        gc.collect()
        if self.scale.device == "cuda":
            torch.cuda.empty_cache()


def wait_for(device: str) -> None:
    """Until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str, repetitions: int, warm: int = 3) -> list[float]:
    """Of each call, after those that warm up."""
    seconds = []
    for number in range(warm + repetitions):
        wait_for(device)
        begin = time.perf_counter()
        call()
        wait_for(device)
        if number >= warm:
            seconds.append(time.perf_counter() - begin)
    return seconds


def versions(task: Task) -> None:
    """Card, driver and packages."""
    for line in describe().splitlines():
        name, _, value = line.partition(" ")
        task.report(name, value.strip())
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        task.report("nvidia-smi", done.stdout.strip() or done.stderr.strip())
    if task.scale.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        task.report("card", card.name)
        task.report("capability", f"{card.major}.{card.minor}")
        task.report("memory", round(card.total_memory / 2**30, 1), "GiB")
        task.report("cuDNN", str(torch.backends.cudnn.version()))
    else:
        task.report("card", f"none ({platform.machine()})")
    task.report("cores", cores())
    task.report("C compiler", shutil.which("cc") or shutil.which("gcc") or "none: Triton and torch.compile need one")
    peers = {who.package: who.module for who in (*LOSSES.values(), *OPTIMIZERS.values()) if who.package}
    for package, module in peers.items():
        task.report(package, importlib.metadata.version(package) if importlib.util.find_spec(module) else "not installed")


def check(task: Task) -> None:
    """The product's own check, on the device."""
    config = str(small_config(task, "checked"))
    for name, arguments in {"check": [], "check of a config": [config, "--only", "gradient"]}.items():
        command = [sys.executable, "-m", "simclr_dist", "check", *arguments, "--processes", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (task.folder / f"{name}.txt").write_text(done.stdout + done.stderr)
        good = done.returncode == 0
        said = "passed" if good else f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}"
        task.report(name, said, target="passed", met=good)


def loss(task: Task) -> None:
    """Each loss at each size: time by events, memory by the allocator's peak, the gradient's error."""
    device = task.scale.device
    there = [name for name in task.scale.names if not LOSSES[name].module or importlib.util.find_spec(LOSSES[name].module)]
    for name in sorted(set(task.scale.names) - set(there)):
        task.report(LOSSES[name].title, "not installed")
    for n in task.scale.losses:
        exact = str(task.folder / f"exact-{n}.pt")
        with task.attempt(f"N = {n}, float64"):
            save_exact(n, exact, device)
        results: dict[str, dict[str, Any]] = {}
        for name in there:
            title = f"N = {n}, {LOSSES[name].title}"
            with task.attempt(title, ours=name == "ours"):
                found = results[name] = alone(name, n, exact if Path(exact).exists() else "", device)
                n_calls = 5 if device == "cuda" else 1
                task.report(f"{title}: time", round(1000 * found["seconds"], 3), "ms", n=n_calls)
                task.report(f"{title}: memory", round(found["memory"] / MIB, 2), "MiB", n=n_calls)
                if "error" in found:
                    good = found["error"] < 1e-5 if name == "ours" else None
                    task.report(f"{title}: gradient error", found["error"], target="below 1e-5" * (name == "ours"), met=good)
        if {"ours", "compiled"} <= set(results):
            for what, key, wanted in (("time", "seconds", 2), ("memory", "memory", 20)):
                times = results["compiled"][key] / max(results["ours"][key], 1e-9)
                target = {"target": f"at least {wanted}", "met": times >= wanted} if n == 4096 else {}
                task.report(f"N = {n}, compiled / ours: {what}", round(times, 2), "times", **target)


def lars(task: Task) -> None:
    """A step on a ResNet-50's parameters, each optimizer in turn."""
    device, steps = task.scale.device, task.scale.optimizer_steps
    names = [name for name, who in OPTIMIZERS.items() if not who.module or importlib.util.find_spec(who.module)]
    for name in sorted(set(OPTIMIZERS) - set(names)):
        task.report(name, "not installed")
    made = {name: build(name, device) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(steps):
        for name, optimizer in made.items():
            times[name].append(timed(optimizer, partial(wait_for, device)))
    walls = {name: [wall for _, wall in of[DROPPED:]] for name, of in times.items()}
    for name, values in walls.items():
        task.report(f"{name}: wall", round(statistics.median(values), 3), "ms", n=len(values))
        task.report(f"{name}: operations", operations(made[name]))
    if "timm, all at once" in walls:
        times_ours = ratio(walls["timm, all at once"], walls["ours"])
        task.report(
            "timm, all at once / ours: wall",
            round(times_ours, 2),
            "times",
            n=steps - DROPPED,
            target="at least 1",
            met=times_ours >= 1,
        )


def colour(task: Task) -> None:
    """One view of a portion, by plain operations and by kernels: time, launches, and the distance from the CPU's."""
    scale = task.scale
    settings = preset_views("imagenet", {"image_size": scale.side})
    rows = np.arange(scale.views)
    sides = np.full(scale.views, settings.image_size)
    draws = draw_views(settings, seed=0, epoch=0, rows=rows, view=0, heights=sides, widths=sides)
    generator = torch.Generator().manual_seed(0)
    shape = scale.views, 3, settings.image_size, settings.image_size
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    there, expected = crops.to(scale.device), colour_views(crops, draws, settings)
    forms: dict[str, Colour] = {"plain": colour_views}
    if scale.device == "cuda":
        with task.attempt("kernels"):
            forms["kernels"] = importlib.import_module("simclr_dist.data.views.colour_cuda").colour_views
    medians = {}
    for name, form in forms.items():
        with task.attempt(name):
            work = partial(form, there, draws, settings)
            distance = float((work().cpu() - expected).abs().max())
            target = {"target": "below 1e-4", "met": distance < 1e-4}
            task.report(f"{name}: largest distance from the CPU's", distance, "deviations", n=scale.views, **target)
            seconds = seconds_of(work, scale.device, 4 * scale.repetitions)
            medians[name] = statistics.median(seconds)
            what = f"{name}: {scale.views} views at {settings.image_size}"
            task.report(what, round(1000 * medians[name], 3), "ms", n=len(seconds))
            task.report(f"{name}: views a second", round(scale.views / medians[name]), n=len(seconds))
            with torch.profiler.profile() as profile:
                work()
                wait_for(scale.device)
            launching = re.compile(r"(cuda|cu)LaunchKernel")
            launches = sum(event.count for event in profile.key_averages() if launching.match(event.key))
            target = {"target": "4", "met": launches == 4} if name == "kernels" else {}
            task.report(f"{name}: launches", launches, **target)
    if "kernels" in medians:
        times = medians["plain"] / medians["kernels"]
        task.report("plain / kernels: time", round(times, 2), "times", target="at least 5", met=times >= 5)


def picture(number: int, side: int, folder: str) -> None:
    """Write one picture of its own as JPEG."""
    pixels = render(number % len(CLASSES), np.random.default_rng((1, number)), size=side)
    Image.fromarray(pixels).save(Path(folder) / CLASSES[number % len(CLASSES)] / f"{number:06d}.jpg", quality=90)


def shards_of_pictures(folder: Path, count: int, side: int) -> Path:
    """Generate JPEG pictures, and write shards of them; once."""
    shards = folder / f"shards-{count}-{side}"
    if not shards.exists():
        with tempfile.TemporaryDirectory(dir=folder) as pictures:
            for name in CLASSES:
                (Path(pictures) / name).mkdir()
            make = partial(picture, side=side, folder=pictures)
            at_once = min(cores(), 16) if count > 1000 else 1
            if at_once > 1:  # forked: nothing has touched the GPU, and torch need not be imported again
                with multiprocessing.get_context("fork").Pool(at_once) as pool:
                    pool.map(make, range(count), chunksize=16)
            else:
                list(map(make, range(count)))
            write_shards(pictures, shards, shard_size=512, processes=at_once)
    return shards


def images(task: Task) -> None:
    """JPEG shards on the local disk, for the runs below."""
    begin = time.perf_counter()
    shards_of_pictures(task.folder, task.scale.pictures, task.scale.side + task.scale.side // 4)
    task.report("generated and sharded", round(time.perf_counter() - begin, 1), "s", n=task.scale.pictures)


def write_config(task: Task, name: str, config: dict[str, Any]) -> Path:
    """FOLDER/NAME.yaml, of a run in FOLDER/NAME."""
    file = task.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"run_folder": str(task.folder / name), "device": task.scale.device, **config}))
    return file


def start(config: Path) -> "subprocess.Popen[str]":
    """`simclr-dist train` as users start it."""
    with config.with_suffix(".txt").open("a") as output:
        command = [sys.executable, "-m", "simclr_dist", "train", str(config), "--processes", "1"]
        return subprocess.Popen(command, stdout=output, stderr=output, text=True)  # in this process's group: they end together


def ended(program: "subprocess.Popen[str]", task: Task, config: Path, *codes: int) -> int:
    """Wait for its end, which must come in time and with one of these codes."""
    try:
        code = program.wait(max(1.0, task.until - 2 - time.time()))
    except subprocess.TimeoutExpired:
        end(program)
        raise RuntimeError(f"{config.stem}: no end in time") from None
    if code not in codes:
        raise RuntimeError(f"{config.stem}: exit code {code}: {config.with_suffix('.txt').read_text()[-400:]}")
    return code


def step(task: Task) -> None:
    """Real runs from shards against the bare encoder and the trainer's step on views that are there."""
    scale = task.scale
    model = {"encoder": scale.encoder, "stem": scale.stem}
    side = scale.side + scale.side // 4
    for compiled in scale.compile:
        name = "compiled" if compiled else "eager"
        with task.attempt(f"{name}: bare encoder"):
            bare = scale.batch / statistics.median(bare_encoder(task, compiled))
            task.report(f"{name}: bare encoder", round(bare, 1), "images/s", n=scale.repetitions)
        if not compiled:  # its first step is tiny, which would make compiled shapes dynamic
            ready_views(task, name, model)
        with task.attempt(f"{name}: run from shards"):
            shards = shards_of_pictures(task.folder, scale.pictures, side)
            settings = {
                "global_batch_size": scale.batch, "steps": scale.steps, "precision": scale.precision, "compile": compiled,
                "model": model, "views": {"preset": "imagenet", "image_size": scale.side},
                "data": {"shards": str(shards), "workers": max(1, min(14, cores() - 2)), "in_memory": "never", "window": 4},
                "optim": {"warmup_steps": 5}, "log": {"every": EVERY, "tensorboard": False}, "checkpoint": {"every": 100_000},
            }  # fmt: skip
            shutil.rmtree(task.folder / f"step-{name}", ignore_errors=True)
            config = write_config(task, f"step-{name}", settings)
            ended(start(config), task, config, 0)
            lines = read_metrics(task.folder / f"step-{name}")[1:]  # the first has compilation and cuDNN's trials in it
            speed = statistics.median(line["speed/images_per_second"] for line in lines)
            count = EVERY * len(lines)
            task.report(f"{name}: run from shards", round(speed, 1), "images/s", n=count)
            task.report(
                f"{name}: waiting for data",
                round(statistics.median(line["speed/data_wait_percent"] for line in lines), 1),
                "%",
                n=count,
            )
            share = 100 * speed / bare
            task.report(f"{name}: run / bare encoder", round(share, 1), "%", n=count, target="at least 95", met=share >= 95)


def ready_views(task: Task, name: str, model: dict[str, Any]) -> None:
    """The trainer's step on views that are there."""
    scale, title = task.scale, f"{name}: step on ready views"
    with task.attempt(title):
        found = trainer_steps(
            device=scale.device, batch=scale.batch, image_size=scale.side, model=model, repetitions=scale.repetitions,
            precision=scale.precision,
        )  # fmt: skip
        speed = scale.batch / statistics.median(found["seconds"])
        task.report(title, round(speed, 1), "images/s", n=scale.repetitions)
        task.report(f"{name}: memory of a step", round(found["memory"] / 2**30, 2), "GiB")


def bare_encoder(task: Task, compiled: bool) -> list[float]:
    """Seconds of forward and backward of the encoder alone, over as many views as a step has."""
    scale = task.scale
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as a run does
    encoder = build_simclr(scale.encoder, stem=scale.stem).encoder.train().to(scale.device, memory_format=torch.channels_last)
    if compiled:
        encoder.compile()
    images = torch.randn(2 * scale.batch, 3, scale.side, scale.side, device=scale.device).contiguous(
        memory_format=torch.channels_last
    )

    def once() -> None:
        encoder.zero_grad()
        with torch.autocast(scale.device, torch.bfloat16, enabled=scale.precision == "bf16"):
            out = encoder(images).float().sum()
        out.backward()

    return seconds_of(once, scale.device, scale.repetitions)


def large(task: Task) -> None:
    """A global batch by micro-batches, and the same pieces with a loss each, which is what accumulation is."""
    scale = task.scale
    model = {"encoder": scale.encoder, "stem": scale.stem}
    for pieces in scale.pieces:
        title = f"batch {scale.large} in {pieces} micro-batches"
        with task.attempt(title):
            found = trainer_steps(
                device=scale.device, batch=scale.large, image_size=scale.side, model=model, repetitions=2,
                precision=scale.precision, micro_batches=pieces,
            )  # fmt: skip
            middle = statistics.median(found["seconds"])
            task.report(f"{title}: a step", round(middle, 3), "s", n=2)
            task.report(f"{title}: memory", round(found["memory"] / 2**30, 2), "GiB", n=2)
        with task.attempt(f"{title}: accumulation"):
            seconds = statistics.median(accumulation(task, pieces))
            task.report(f"{title}: accumulation", round(seconds, 3), "s", n=2)
            task.report(f"{title}: the price of all negatives", round(middle / seconds, 2), "times accumulation", n=2)


def accumulation(task: Task, pieces: int) -> list[float]:
    """Seconds of each piece's own loss and backward, and a step."""
    scale = task.scale
    config = Config(
        global_batch_size=scale.large, micro_batches=pieces, steps=1, precision=scale.precision,
        model=ModelConfig(encoder=scale.encoder, stem=scale.stem), optim=OptimConfig(lr_rule="constant"),
    )  # fmt: skip
    learner = build_learner(config, World(0, 1, 0, torch.device(scale.device)))
    a, b = (torch.randn(scale.large, 3, scale.side, scale.side, device=scale.device) for _ in range(2))

    def once() -> None:
        learner.optimizer.zero_grad()
        for micro_batch in cut(a, b, pieces):
            z_a, z_b = learner.model(torch.cat(micro_batch)).chunk(2)
            (learner.loss(z_a, z_b) / pieces).backward()
        learner.optimizer.step()

    return seconds_of(once, scale.device, 2, warm=1)


def small_config(task: Task, name: str, **changes: Any) -> Path:
    """A run of seconds, on small pictures."""
    settings: dict[str, Any] = {
        "global_batch_size": 16 if task.rehearse else 256, "steps": task.scale.small_steps, "precision": task.scale.precision,
        "model": {
            "encoder": "resnet10" if task.rehearse else "resnet18", "stem": "small_stride2" if task.rehearse else "small",
            "projector_hidden": 64, "projector_dim": 32,
        },
        "views": {"preset": "small"},
        "data": {"shards": str(shards_of_pictures(task.folder, 64 if task.rehearse else 2048, 40)), "workers": 1},
        "optim": {"warmup_steps": 2},
        "log": {"every": 1, "tensorboard": False}, "checkpoint": {"every": EVERY},
    }  # fmt: skip
    shutil.rmtree(task.folder / name, ignore_errors=True)
    return write_config(task, name, {**settings, **changes})


def has_saved(run: Path, step: int) -> bool:
    """Whether a checkpoint of this step or a later one is there."""
    return any(saved >= step for saved in saved_steps(run / "checkpoints"))


def at(program: "subprocess.Popen[str]", task: Task, config: Path, condition: Callable[[], bool]) -> None:
    """Wait for the moment, before which the program may not end."""
    while not condition():
        if program.poll() is not None or time.time() > task.until - 2:
            end(program)
            raise RuntimeError(f"{config.stem}: the moment did not come: {config.with_suffix('.txt').read_text()[-400:]}")
        time.sleep(POLL)


def killed(task: Task, name: str, moments: list[tuple[int, int]], **changes: Any) -> Path:
    """A run that gets each signal once it has saved that step, and goes on; its folder."""
    config = small_config(task, name, **changes)
    for number, step in moments:
        program = start(config)
        at(program, task, config, partial(has_saved, task.folder / name, step))
        if number == signal.SIGKILL:
            end(program)
        else:
            program.send_signal(number)
            ended(program, task, config, PREEMPTED, 0)
    ended(start(config), task, config, 0)
    return task.folder / name


def resume(task: Task) -> None:
    """In `deterministic`, an uninterrupted run against one that was stopped and killed: the same bits?"""
    sys.path.insert(0, str(ROOT / "tests"))
    from training_runs import assert_same_run

    steps = task.scale.small_steps
    config = small_config(task, "straight", deterministic=True)
    ended(start(config), task, config, 0)
    moments = [(signal.SIGTERM, EVERY)] if task.rehearse else [(signal.SIGTERM, EVERY), (signal.SIGKILL, 8 * EVERY)]
    again = killed(task, "resumed", moments, deterministic=True)
    try:
        assert_same_run(again, task.folder / "straight", steps)
        said = "the same bits"
    except AssertionError as error:
        said = f"differs: {str(error)[:200]}"
    starts = len([entry for entry in read_ledger(again) if entry["event"] == "start"])
    task.report(
        f"deterministic, stopped and killed, {starts} starts, {steps} steps",
        said,
        target="the same bits",
        met=said == "the same bits",
    )


def kill(task: Task) -> None:
    """kill -9 of everything, as often as told; what it has cost."""
    moments = [(signal.SIGKILL, EVERY)] if task.rehearse else [(signal.SIGKILL, EVERY), (signal.SIGKILL, 3 * EVERY)]
    run = killed(task, "killed", moments)
    starts = [entry for entry in read_ledger(run) if entry["event"] == "start"]
    lost = max(entry["steps_lost"] for entry in starts)
    task.report("kill -9: most steps lost", lost, n=len(moments), target=f"at most {EVERY}", met=lost <= EVERY)
    done = len(read_metrics(run))
    task.report("steps in the metrics at the end", done, target=str(task.scale.small_steps), met=done == task.scale.small_steps)


def cifar(task: Task) -> None:
    """CIFAR-10 with ResNet-18 until the time is over; the next call with this folder goes on."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "cifar10_resnet18.yaml").read_text())
    if task.cifar:
        write_shards(task.cifar, task.folder / "cifar-train")
        train = task.folder / "cifar-train"
    else:
        task.report("CIFAR-10", "not given (--cifar FILE): generated pictures, for the speed alone")
        train = shards_of_pictures(task.folder, task.scale.cifar_images, 32)
    for key, value in task.scale.cifar.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    settings["data"] = {"shards": str(train), "workers": max(1, min(14, cores() - 2)), "in_memory": "always"}
    settings["compile"] = compiles(task)
    settings["log"]["tensorboard"] = False
    del settings["run_folder"]
    config, run = write_config(task, "cifar", settings), task.folder / "cifar"
    program = start(config)
    try:
        program.wait(max(5.0, task.until - 40 - time.time()))
    except subprocess.TimeoutExpired:
        program.terminate()
    ended(program, task, config, 0, PREEMPTED)
    lines = read_metrics(run)
    every = settings["log"]["every"]
    speed = statistics.median(line["speed/images_per_second"] for line in lines[1:] or lines)
    seconds = sum(line["speed/step_ms"] * every / 1000 for line in lines)
    task.report("images a second", round(speed), n=every * len(lines), target=f"above {CIFAR_SPEED}", met=speed > CIFAR_SPEED)
    task.report(
        "waiting for data",
        round(statistics.median(line["speed/data_wait_percent"] for line in lines), 1),
        "%",
        n=every * len(lines),
    )
    task.report("steps so far", lines[-1]["step"])
    task.report("seconds of training so far", round(seconds))
    if program.returncode:
        task.report(
            "kNN", "not yet: the run goes on with the next call of this folder", target=f"{CIFAR_KNN} in {CIFAR_SECONDS} s"
        )
    elif task.cifar_test or task.rehearse:
        judge_cifar(task, run, train, int(lines[-1]["step"]), seconds)


def judge_cifar(task: Task, run: Path, train: Path, step: int, seconds: float) -> None:
    """kNN of the last encoder on the test images."""
    test = task.folder / "cifar-test" if task.cifar_test else train
    if task.cifar_test:
        write_shards(task.cifar_test, test)
    out = task.folder / "cifar-eval.json"
    command = [
        sys.executable,
        "-m",
        "simclr_dist",
        "eval",
        str(encoder_path(run, step)),
        "--train",
        str(train),
        "--test",
        str(test),
    ]
    command += ["--protocols", "knn", "--no-baselines", "--out", str(out), "--device", task.scale.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"eval: {done.stderr[-400:]}")
    (accuracy,) = re.findall(r'"top1": ([0-9.]+)', out.read_text())[:1]
    met = math.isfinite(seconds) and float(accuracy) >= CIFAR_KNN and seconds < CIFAR_SECONDS
    task.report("kNN", float(accuracy), "%", target=f"{CIFAR_KNN} in {CIFAR_SECONDS} s", met=met)


def compiles(task: Task) -> bool:
    """Whether the part `step` has seen a compiled run to its end here; what has begun goes on as it is."""
    if (begun := task.folder / "cifar.yaml").exists():
        return bool(yaml.safe_load(begun.read_text())["compile"])
    file = task.folder / "parts" / "step.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return any(row["figure"] == "compiled: run from shards" and row["unit"] for row in rows)


PARTS = {
    part.__name__: part for part in (versions, check, loss, lars, colour, images, step, large, resume, kill, cifar)
}  # fmt: skip


def main() -> None:
    """Do the part that the task names."""
    task = Task(json.loads(sys.argv[1]))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(task.folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(task.folder / "triton"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    PARTS[task.name](task)


if __name__ == "__main__":
    main()
