"""What do micro-batches and activation checkpointing cost in time, and save in memory?

    python benchmarks/large_batch.py                    (a global batch of 256 on one CPU thread)
    python benchmarks/large_batch.py --device cuda --batch 1024 --encoder resnet50 --stem imagenet --image_size 224

Steps of the trainer (forward, loss, backward, LARS) with random views. Each row is a fresh process: a tiny step that makes the
optimizer's buffers, a step for warming up, then those that are timed. Memory is the rise of the peak over what was there after
the tiny step, so gradients and activations but not weights and momentum: of the resident set, on CUDA of the allocator.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from loss import FULL, MIB, Result, expendable, hardware, in_fresh_process, is_memory_error, memory, spread, watch_peak
from torch import Tensor

from simclr_dist.config.settings import ENCODERS, Config, ModelConfig, OptimConfig
from simclr_dist.method.distributed import World
from simclr_dist.train.learner import build_learner, cut
from simclr_dist.train.loop import training_step


def measure(*, device: str, batch: int, image_size: int, model: dict[str, Any], repetitions: int, **settings: Any) -> Result:
    """Seconds of each step, and bytes."""
    on_cuda = device == "cuda"
    config = Config(
        global_batch_size=batch, steps=1, model=ModelConfig(**model), optim=OptimConfig(lr_rule="constant"), **settings
    )
    here = World(0, 1, 0, torch.device("cuda", 0) if on_cuda else torch.device("cpu"))
    learner = build_learner(config, here)
    generator = torch.Generator().manual_seed(1)
    view_a, view_b = (torch.randn(batch, 3, image_size, image_size, generator=generator).to(here.device) for _ in range(2))

    def step(a: Tensor, b: Tensor) -> None:
        training_step(learner, cut(a, b, config.micro_batches), config, lr=0.1)
        if on_cuda:
            torch.cuda.synchronize()

    tiny = 2 * config.micro_batches
    step(view_a[:tiny], view_b[:tiny])
    learner.optimizer.zero_grad()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_cuda else watch_peak()
    step(view_a, view_b)
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        step(view_a, view_b)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if on_cuda else memory("VmHWM")
    return {"seconds": seconds, "memory": peak - before}


def child(task: dict[str, Any]) -> None:
    """One row in this process; prints its result."""
    torch.set_num_threads(task.pop("threads"))
    expendable()
    try:
        result = measure(**task)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        result = {"failed": FULL}
    print(json.dumps(result))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images in the global batch")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--encoder", choices=ENCODERS, default="resnet18")
    parser.add_argument("--stem", choices=["imagenet", "small", "small_stride2"], default="small_stride2")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        return child(told.child)
    if any(told.batch % pieces or told.batch < 2 * pieces for pieces in told.micro_batches):
        parser.error("each of --micro_batches must divide --batch and leave two images or more to a micro-batch")
    print("| micro-batches | checkpointing | seconds a step: median [range] | times the first row | memory, MiB |")
    print("|---|---|---|---|---|", flush=True)
    task = {
        "device": told.device,
        "batch": told.batch,
        "image_size": told.image_size,
        "model": {"encoder": told.encoder, "stem": told.stem},
        "precision": told.precision,
        "repetitions": told.repetitions,
        "threads": told.threads,
    }
    first = None
    for pieces in told.micro_batches:
        for checkpointing in (False, True):
            settings = {"micro_batches": pieces, "activation_checkpointing": checkpointing}
            result = in_fresh_process(__file__, task | settings)
            start = f"| {pieces} | {'yes' if checkpointing else 'no'} | "
            if "failed" in result:
                print(f"{start}{result['failed']} | | |", flush=True)
                continue
            middle = statistics.median(result["seconds"])
            if (pieces, checkpointing) == (told.micro_batches[0], False):
                first = middle
            times = f"{middle / first:.2f}" if first else ""
            print(f"{start}{spread(result['seconds'])} | {times} | {result['memory'] / MIB:.0f} |", flush=True)
    what = f"{told.batch} images of {told.image_size} pixels, {told.encoder}, stem {told.stem}, {told.precision}"
    print(f"\n{hardware(told.device, told.threads, ['torchvision'], f'{what}; n = {told.repetitions} steps')}")
    return None


if __name__ == "__main__":
    main()
