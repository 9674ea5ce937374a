"""What does bfloat16 gain on a CPU, with instructions for it and without? Forward and backward of the small ResNet.

    python benchmarks/bfloat16.py

ONEDNN_MAX_CPU_ISA takes instructions away from convolutions, so that a CPU with AVX512-BF16 can play older ones. One thread,
512 views of 32 pixels; CPU milliseconds, the median of the rounds, in each of which every setting has a process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from loss import hardware

from simclr_dist.method.encoders import build_simclr

CPUS = {"this one": "DEFAULT", "AVX-512 without": "AVX512_CORE_VNNI", "AVX2": "AVX2"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
VIEWS, REPEATS = 512, 4


def measure(precision: str) -> float:
    """CPU milliseconds of a forward and backward."""
    torch.set_num_threads(1)
    model = build_simclr(encoder="resnet10", stem="small_stride2", projector_hidden=512)
    model.to(memory_format=torch.channels_last)
    model.autocast, model.channels_last = PRECISIONS[precision], True
    views = torch.randn(VIEWS, 3, 32, 32)
    model(views).float().square().sum().backward()
    start = time.process_time()
    for _ in range(REPEATS):
        model(views).float().square().sum().backward()
    return 1e3 * (time.process_time() - start) / REPEATS


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=PRECISIONS, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        print(measure(told.child))
        return
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(told.rounds):
        for cpu, instructions in CPUS.items():
            for precision in PRECISIONS:
                environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
                command = [sys.executable, __file__, "--child", precision]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found.setdefault((cpu, precision), []).append(float(done.stdout))
    print(hardware("cpu", 1, ["torchvision"], f"n = {told.rounds}"))
    print("| CPU | fp32, ms | bf16, ms | bf16 / fp32 |\n|---|---|---|---|")
    for cpu in CPUS:
        plain, half = (statistics.median(found[cpu, precision]) for precision in PRECISIONS)
        ratios = [b / a for a, b in zip(found[cpu, "fp32"], found[cpu, "bf16"], strict=True)]
        middle = statistics.median(ratios)
        print(f"| {cpu} | {plain:.0f} | {half:.0f} | {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
