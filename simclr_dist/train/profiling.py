"""Profile a few steps, as a Chrome trace and a table. Imports torch late."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from simclr_dist.run.steps import step_name
from simclr_dist.system.errors import ConfigError, reason_of

if TYPE_CHECKING:
    from simclr_dist.method.distributed import World

T = TypeVar("T")

# In the order of a step; the code that does each runs under torch.profiler.record_function of this name.
STAGES = ("data", "host to device", "views", "forward", "gather", "loss", "backward", "all-reduce", "optimizer")
_WHOLE_STEP = "step"
_RANGES = (*STAGES, _WHOLE_STEP)
_WARM_UP = 5  # steps: first ones allocate, choose kernels and wait for the readers
_KERNELS = {"AllGather": "gather", "AllReduce": "all-reduce", "SendRecv": "all-reduce"}  # NCCL's, which run beside the others


@dataclass(frozen=True)
class Profile:
    """The steps and the ranks to profile."""

    count: int  # of steps
    first: int | None = None  # its number; None: soon after a start
    rank: int | None = 0  # the one that writes; None: all

    def check(self, world_size: int) -> None:
        """Raise ConfigError for a rank that does not exist."""
        if self.rank is not None and self.rank >= world_size:
            raise ConfigError(f"--profile-rank: there is no rank {self.rank} of {world_size}; they count from 0")

    @property
    def options(self) -> list[str]:
        """Return the options as they are typed."""
        steps = f"{self.count}" if self.first is None else f"{self.first}:{self.first + self.count}"
        return ["--profile", steps, "--profile-rank", "all" if self.rank is None else str(self.rank)]

    def steps(self, done: int, total: int) -> range:
        """Return the numbers of the steps to profile. A run's first is 1. This start has done `done` of `total`."""
        if self.first is None:
            first = max(done, min(done + _WARM_UP, total - self.count)) + 1
            return range(first, min(first + self.count, total + 1))
        return range(max(self.first, done + 1), min(self.first + self.count, total + 1))


def parse_profile(steps: str | None, rank: str | None = None, *, option: str = "--profile") -> Profile | None:
    """Read `3` or `10:13` (steps 10..12), and a rank or `all`. ConfigError names `option`."""
    if steps is None:
        if rank is not None:
            raise ConfigError(f"--profile-rank goes with {option} STEPS: say how many steps")
        return None
    begin, colon, end = steps.partition(":")
    numbers = [begin, end] if colon else [begin]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or (colon and int(begin) >= int(end)):
        raise ConfigError(f"{option}: {steps!r} is neither a number of steps, like 3, nor steps from and to, like 10:13")
    if rank not in (None, "all") and not rank.isdecimal():
        raise ConfigError(f"--profile-rank: {rank!r} is neither the number of a rank nor `all`")
    who = None if rank == "all" else int(rank or 0)
    return Profile(int(end) - int(begin), int(begin), who) if colon else Profile(int(begin), None, who)


def take_profile(arguments: Sequence[str]) -> tuple[Profile | None, list[str]]:
    """Take `--profile STEPS` and `--profile-rank R` out of the arguments. Returns the profile and the rest."""
    texts: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in ("--profile", "--profile-rank"):
            rest.append(argument)
            continue
        if (text := value if equals else next(waiting, None)) is None:
            raise ConfigError(f"{name}: its value is missing")
        texts[name] = text
    return parse_profile(texts.get("--profile"), texts.get("--profile-rank")), rest


def profiled(items: Iterable[T], wanted: Profile | None, folder: Path, world: World, *, done: int, total: int) -> Iterator[T]:
    """Yield the items of a training loop, one a step. Profile the steps that `wanted` names.

    `done` of `total` steps are done. After the last named step rank R writes `folder`/step-XXXXXXXX-rank-R.trace.json.gz and
    .txt. It reports this, or what the disk does not take; the run goes on.
    """
    steps = range(0)
    if wanted is not None and wanted.rank in (None, world.rank) and not (steps := wanted.steps(done, total)):
        line = f"this start has steps {done + 1} to {total}: nothing to profile"
        print(f"WARNING: {' '.join(wanted.options)}: {line}", flush=True)
    if not steps:
        yield from items
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says ERROR where there is no GPU
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    iterator = iter(items)
    yield from islice(iterator, steps.start - 1 - done)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:  # one cycle; without it torch 2.11 warns of more
        for _ in steps:
            with record_function(_WHOLE_STEP):
                yield next(iterator)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    print(_write(profiler, folder / step_name(steps.start, f"-rank-{world.rank}"), steps), flush=True)
    yield from iterator


def _write(profiler: Any, stem: Path, steps: range) -> str:
    """Write both files, and return the line to say, with the table."""
    trace = stem.with_suffix(".trace.json.gz")
    try:
        stem.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            lines = table(json.load(file)["traceEvents"], steps)
        stem.with_suffix(".txt").write_text(lines)
    except OSError as error:
        return f"WARNING: {stem}: the profile cannot be written: {reason_of(error)}; training goes on"
    return f"{lines}trace: {trace} (chrome://tracing, or https://ui.perfetto.dev)"


def table(events: Iterable[Mapping[str, Any]], steps: range) -> str:
    """Tabulate the stages of the profiled steps, from a Chrome trace's events. Milliseconds a step.

    `host` is the time of the thread that trains, each stage without those within it (BatchNorm's gathers are within the
    forward, and a CPU's all-reduce within the backward), so the column adds up to the step. `device`, where there is a GPU,
    is from a stage's first kernel to its last; NCCL's kernels run beside others, so it need not add up.
    """
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e.get("ph") == "X" and e.get("name") in _RANGES]
    host: dict[str, float] = defaultdict(float)
    whole = 0.0
    open_ranges: list[tuple[str, float]] = []
    main = next((event["tid"] for event in ranges if event["name"] == _WHOLE_STEP), None)
    for event in sorted((event for event in ranges if event["tid"] == main), key=lambda event: (event["ts"], -event["dur"])):
        begin, length, name = event["ts"], event["dur"], event["name"]
        while open_ranges and begin >= open_ranges[-1][1]:
            open_ranges.pop()
        if name == _WHOLE_STEP:
            whole += length
        elif open_ranges and open_ranges[-1][0] == "all-reduce":
            continue  # its gathers are a part of it
        else:
            host[name] += length
            if open_ranges and open_ranges[-1][0] != _WHOLE_STEP:
                host[open_ranges[-1][0]] -= length
        open_ranges.append((name, begin + length))
    device = _device_times(events)
    lines = [
        f"steps {steps.start} to {steps.stop - 1}: milliseconds a step",
        f"{'':16}{'host':>10}{'share':>8}" + f"{'device':>10}" * bool(device),
    ]
    rows = {name: host[name] for name in STAGES} | {"other": whole - sum(host.values()), "step": whole}
    for name, microseconds in rows.items():
        line = f"{name:16}{microseconds / 1000 / len(steps):10.2f}{100 * microseconds / max(whole, 1e-9):7.1f}%"
        lines.append(line + (f"{device.get(name, 0.0) / 1000 / len(steps):10.2f}" if device else ""))
    return "\n".join(lines) + "\n"


def _device_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sum up microseconds by stage; {} without a GPU."""
    device: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and event.get("name") in _RANGES:
            device[event["name"]] += event["dur"]
        if event.get("cat") == "kernel":
            for part, stage in _KERNELS.items():
                if "nccl" in event["name"] and part in event["name"]:
                    device[stage] += event["dur"]
    return device
