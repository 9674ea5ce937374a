"""What does a LARS step cost on a ResNet-50's parameters, and how many operations does it dispatch?

    python benchmarks/optim.py
    python benchmarks/optim.py --device cuda

Each optimizer has parameters and random gradients of its own, the same ones; biases and BatchNorm stand in a group without
weight decay, which none of them adapts. A repetition is one step of each in turn, and the ratio is the median over
repetitions. The first three repetitions, which make the buffers, do not count. On CUDA the wall time ends when the device has
finished; the CPU time is what the host spends until then, its waiting included.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from loss import hardware, installed, spread
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dist.method.group_optimizer import Group
from simclr_dist.method.lars import LARS
from simclr_dist.method.optim import parameter_groups

DROPPED = 3
RATE, MOMENTUM, WEIGHT_DECAY, TRUST = 0.1, 0.9, 1e-6, 0.001


def ours(foreach: bool | None) -> Callable[[list[Group]], Optimizer]:
    """The LARS of this project: all tensors at once, or as it chooses."""
    return partial(LARS, lr=RATE, momentum=MOMENTUM, trust_coefficient=TRUST, foreach=foreach)


def peer(module: str, name: str, trust: str, **more: Any) -> Callable[[list[Group]], Optimizer]:
    """Another LARS, which names its trust coefficient so."""

    def make(groups: list[Group]) -> Optimizer:
        plain = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
        how = {"lr": RATE, "momentum": MOMENTUM, trust: TRUST, **more}
        made: Optimizer = getattr(importlib.import_module(module), name)(plain, **how)
        return made

    return make


class Contestant(NamedTuple):
    """An optimizer, and what must be installed for it."""

    make: Callable[[list[Group]], Optimizer]
    package: str = ""
    module: str = ""


CONTESTANTS = {
    "ours": Contestant(ours(None)),
    "ours, all at once": Contestant(ours(True)),
    "torch_optimizer": Contestant(peer("torch_optimizer", "LARS", "trust_coefficient"), "torch-optimizer", "torch_optimizer"),
    "lightly": Contestant(peer("lightly.utils.lars", "LARS", "trust_coefficient"), "lightly", "lightly"),
    "timm": Contestant(peer("timm.optim.lars", "Lars", "trust_coeff", foreach=False), "timm", "timm"),
    "timm, all at once": Contestant(peer("timm.optim.lars", "Lars", "trust_coeff", foreach=True), "timm", "timm"),
}


class Count(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def build(name: str, device: str) -> Optimizer:
    """The optimizer over a ResNet-50 of its own, with gradients."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return CONTESTANTS[name].make(parameter_groups(model, WEIGHT_DECAY))


def timed(optimizer: Optimizer, wait: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a step: CPU and wall."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.step()
    wait()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def operations(optimizer: Optimizer) -> int:
    """Of a step."""
    count = Count()
    with count:
        optimizer.step()
    return count.operations


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the repetitions."""
    return statistics.median(value / one for value, one in zip(values, base, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    told = parser.parse_args()
    if told.repetitions <= DROPPED:
        parser.error(f"--repetitions must be above {DROPPED}, which are dropped")
    torch.set_num_threads(told.threads)
    names = [name for name, who in CONTESTANTS.items() if installed(name, who.package, who.module)]
    optimizers = {name: build(name, told.device) for name in names}
    wait = torch.cuda.synchronize if told.device == "cuda" else lambda: None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(told.repetitions):
        for name, optimizer in optimizers.items():
            times[name].append(timed(optimizer, wait))
    print("| LARS | CPU ms a step: median [range] | times ours | wall ms a step: median [range] | times ours | operations |")
    print("|---|---|---|---|---|---|")
    ours_cpu, ours_wall = zip(*times["ours"][DROPPED:], strict=True)
    for name in names:
        cpu, wall = zip(*times[name][DROPPED:], strict=True)
        row = f"{spread(cpu)} | {ratio(cpu, ours_cpu):.2f} | {spread(wall)} | {ratio(wall, ours_wall):.2f}"
        print(f"| {name} | {row} | {operations(optimizers[name])} |")
    packages = ["torchvision", *dict.fromkeys(CONTESTANTS[name].package for name in names if CONTESTANTS[name].package)]
    print(f"\n{hardware(told.device, told.threads, packages, f'n = {told.repetitions - DROPPED}')}")


if __name__ == "__main__":
    main()
