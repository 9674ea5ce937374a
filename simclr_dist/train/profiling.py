"""`--profile STEPS`: where the time of a few steps goes, as a Chrome trace and a table, on any rank. torch is imported late."""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from simclr_dist.system.errors import ConfigError

if TYPE_CHECKING:
    from simclr_dist.method.distributed import World

T = TypeVar("T")

# In the order of a step; the code that does each runs under torch.profiler.record_function of this name.
STAGES = ("data", "host to device", "views", "forward", "gather", "loss", "backward", "all-reduce", "optimizer")
_WHOLE_STEP = "step"
_WARM_UP = 5  # steps: first ones allocate, choose kernels and wait for the readers
_KERNELS = {"AllGather": "gather", "AllReduce": "all-reduce", "SendRecv": "all-reduce"}  # NCCL's, which run beside the others


@dataclass(frozen=True)
class Profile:
    """What to profile: `count` steps soon after a start, or those numbered `first` up to but without `first + count`.

    `rank` is the one that writes; None are all.
    """

    count: int
    first: int | None = None
    rank: int | None = 0

    @property
    def options(self) -> list[str]:
        """As they are typed."""
        steps = f"{self.count}" if self.first is None else f"{self.first}:{self.first + self.count}"
        return ["--profile", steps, "--profile-rank", "all" if self.rank is None else str(self.rank)]

    def check(self, world_size: int) -> None:
        """Raises ConfigError for a rank that there is not."""
        if self.rank is not None and self.rank >= world_size:
            raise ConfigError(f"--profile-rank: there is no rank {self.rank} of {world_size}; they count from 0")

    def steps(self, done: int, total: int) -> range:
        """Numbers of the steps (the first of a run is 1) to profile in a start that has `done` of `total` behind it."""
        if self.first is None:
            first = max(done, min(done + _WARM_UP, total - self.count)) + 1
            return range(first, min(first + self.count, total + 1))
        return range(max(self.first, done + 1), min(self.first + self.count, total + 1))


def parse_profile(steps: str, rank: str = "0", *, option: str = "--profile") -> Profile:
    """From `3` or `10:13` (steps 10, 11 and 12), and a rank's number or `all`; raises ConfigError, for steps of `option`."""
    begin, colon, end = steps.partition(":")
    numbers = [begin, end] if colon else [begin]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or (colon and int(begin) >= int(end)):
        raise ConfigError(f"{option}: {steps!r} is neither a number of steps, like 3, nor steps from and to, like 10:13")
    if rank != "all" and not rank.isdecimal():
        raise ConfigError(f"--profile-rank: {rank!r} is neither the number of a rank nor `all`")
    who = None if rank == "all" else int(rank)
    return Profile(int(end) - int(begin), int(begin), who) if colon else Profile(int(begin), None, who)


def take_profile(arguments: Sequence[str]) -> tuple[Profile | None, list[str]]:
    """Take `--profile STEPS` and `--profile-rank R` out of the arguments; returns what they ask for and the rest."""
    found: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in ("--profile", "--profile-rank"):
            rest.append(argument)
            continue
        text = value if equals else next(waiting, None)
        if text is None:
            raise ConfigError(f"{name}: its value is missing")
        found[name] = text
    if "--profile" in found:
        return parse_profile(found["--profile"], found.get("--profile-rank", "0")), rest
    if found:
        raise ConfigError("--profile-rank goes with --profile STEPS: say how many steps")
    return None, rest


def profiled(items: Iterable[T], wanted: Profile | None, folder: Path, here: World, *, done: int, total: int) -> Iterator[T]:
    """The items of a training loop, one a step, its steps profiled as they are asked for.

    `done` steps of `total` are behind it. Writes `folder`/step-XXXXXXXX-rank-R.trace.json.gz and .txt when the last of them is
    done, and rank R says so; what the disk does not take is said too, and the run goes on. Raises ConfigError for a rank that
    there is not.
    """
    if wanted is None:
        return iter(items)
    wanted.check(here.size)
    steps = wanted.steps(done, total)
    mine = wanted.rank in (None, here.rank)
    if not steps and mine:
        print(
            f"WARNING: {' '.join(wanted.options)}: this start has steps {done + 1} to {total}: nothing to profile", flush=True
        )
    return _profiled(items, steps, folder, here, done) if steps and mine else iter(items)


def _profiled(items: Iterable[T], steps: range, folder: Path, here: World, done: int) -> Iterator[T]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says ERROR where there is no GPU
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    iterator, number = iter(items), done
    profiler: profile | None = None
    whole_step = ExitStack()
    try:
        while True:
            number += 1
            whole_step.close()
            if profiler is not None and number == steps.stop:
                if here.device.type == "cuda":
                    torch.cuda.synchronize(here.device)
                profiler.stop()
                print(_write(profiler, folder / f"step-{steps.start:08d}-rank-{here.rank}", steps), flush=True)
                profiler = None
            if number == steps.start:
                activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (here.device.type == "cuda")
                profiler = profile(activities=activities)
                profiler.start()
            if profiler is not None:
                whole_step.enter_context(record_function(_WHOLE_STEP))
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item
    finally:
        whole_step.close()
        if profiler is not None:
            profiler.stop()  # the run ends before the last of the steps


def _write(profiler: Any, stem: Path, steps: range) -> str:
    """Both files; returns the line to say, with the table."""
    trace = stem.with_suffix(".trace.json.gz")
    try:
        stem.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            lines = table(json.load(file)["traceEvents"], steps)
        stem.with_suffix(".txt").write_text(lines)
    except OSError as error:
        return f"WARNING: {stem}: the profile cannot be written: {error.strerror or error}; training goes on"
    return f"{lines}trace: {trace} (chrome://tracing, or https://ui.perfetto.dev)"


def table(events: Iterable[Mapping[str, Any]], steps: range) -> str:
    """The stages of the profiled steps in milliseconds a step, from a Chrome trace's events.

    `host` is the time of the thread that trains, each stage without those within it (BatchNorm's gathers are within the
    forward, and a CPU's all-reduce within the backward), so that the column adds up to the step. `device`, where there is a
    GPU, is from a stage's first kernel to its last, and NCCL's kernels, which run beside others: it need not add up.
    """
    ranges = [event for event in events if event.get("ph") == "X" and event.get("name") in (*STAGES, _WHOLE_STEP)]
    host: dict[str, float] = defaultdict(float)
    whole = 0.0
    open_ranges: list[tuple[str, float]] = []
    main = next((event["tid"] for event in ranges if event["name"] == _WHOLE_STEP and _is_host(event)), None)
    on_main = [event for event in ranges if _is_host(event) and event["tid"] == main]
    for event in sorted(on_main, key=lambda event: (event["ts"], -event["dur"])):
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
    count = len(steps)
    lines = [
        f"steps {steps.start} to {steps.stop - 1}: milliseconds a step",
        f"{'':16}{'host':>10}{'share':>8}" + f"{'device':>10}" * bool(device),
    ]
    rows = {name: host[name] for name in STAGES} | {"other": whole - sum(host.values()), "step": whole}
    for name, microseconds in rows.items():
        line = f"{name:16}{microseconds / 1000 / count:10.2f}{100 * microseconds / max(whole, 1e-9):7.1f}%"
        lines.append(line + (f"{device.get(name, 0.0) / 1000 / count:10.2f}" if device else ""))
    return "\n".join(lines) + "\n"


def _is_host(event: Mapping[str, Any]) -> bool:
    return bool(event.get("cat") == "user_annotation")


def _device_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds by stage; {} without a GPU."""
    device: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and event.get("name") in (*STAGES, _WHOLE_STEP):
            device[event["name"]] += event["dur"]
        if event.get("cat") == "kernel":
            for part, stage in _KERNELS.items():
                if "nccl" in event["name"] and part in event["name"]:
                    device[stage] += event["dur"]
    return device
