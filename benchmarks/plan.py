"""How wrong is the plan? Predicted, measured, and their ratio.

    python benchmarks/plan.py                       (memory, bytes on the wire, and, as root, step time on slow networks)
    python benchmarks/plan.py --rows memory wire
    python benchmarks/plan.py --rows memory --device cuda --encoder resnet50 --image_size 224 --batch 256

Memory on the CPU: the allocator's own records (torch.profiler) of one step, over weights, optimizer state and views; and the
rise of the resident set's peak in a fresh process as a second opinion. On CUDA: torch.cuda.max_memory_allocated. Bytes on the
wire: the arguments of torch.distributed's functions in 2 and 4 processes, as a ring would send them. Step time: two nodes, each
a network namespace, on a link that tc has shaped. Predicted is the time of a step on the same two nodes without a limit, less
its exchange, plus the exchange that the plan expects at that rate; the latency of a call is measured there as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, where this file has the name of the tests' package
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "preflight" / "plan"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ranks
from measured import config, loss_peak, one_step, step_peak, views, wire
from network.namespaces import Network, why_not
from simclr_dist.config.settings import Config, ModelConfig, ViewsConfig
from simclr_dist.method.distributed import World, all_gather, process_group
from simclr_dist.preflight.plan.memory import loss_bytes, rank_memory
from simclr_dist.preflight.plan.trace import footprint
from simclr_dist.preflight.plan.traffic import step_traffic
from simclr_dist.train.agreement import StopAgreement
from simclr_dist.train.learner import build_learner

TESTS = Path(__file__).resolve().parents[1] / "tests"
MIB = 2**20
RATES = {"1gbit": 1e9 / 8, "200mbit": 200e6 / 8}
SMALL = ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=64, projector_dim=32)


def shown(what: str, predicted: float, measured: float, unit: str) -> None:
    """A row of the table."""
    print(f"| {what} | {predicted:.4g} | {measured:.4g} | {unit} | {predicted / measured:.3f} |", flush=True)


def in_fresh_process(task: dict[str, Any]) -> dict[str, float]:
    """The result of `child`."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def configured(task: dict[str, Any]) -> Config:
    """The config of a row."""
    model = ModelConfig(encoder=task["encoder"], stem=task["stem"], projector_hidden=512)
    side = ViewsConfig(preset="small", image_size=task["image_size"])
    settings = {key: task[key] for key in ("micro_batches", "activation_checkpointing", "precision")}
    return config(global_batch_size=task["batch"], model=model, views=side, device=task["device"], **settings)


def child(task: dict[str, Any]) -> None:
    """One measurement in this process; prints its result."""
    if task["what"] == "time":
        times_of_steps()
        return
    of = configured(task)
    if task["device"] == "cuda":
        print(json.dumps({"bytes": cuda_peak(of)}))
        return
    if task["what"] == "allocator":
        print(json.dumps({"bytes": step_peak(of)}))
        return
    learner = build_learner(of, World(0, 1, 0, torch.device("cpu")))
    flag = StopAgreement(torch.device("cpu"))
    view_a, view_b = views(of, of.global_batch_size)
    tiny = 2 * of.micro_batches
    one_step(learner, of, view_a[:tiny], view_b[:tiny], flag)
    learner.optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmHWM")
    one_step(learner, of, view_a, view_b, flag)
    print(json.dumps({"bytes": resident("VmHWM") - before}))


def cuda_peak(of: Config) -> int:
    """Bytes of a step over weights, optimizer state and views."""
    here = World(0, 1, 0, torch.device("cuda", 0))
    learner, flag = build_learner(of, here), StopAgreement(here.device)
    view_a, view_b = (view.cuda() for view in views(of, of.global_batch_size))
    tiny = 2 * of.micro_batches
    one_step(learner, of, view_a[:tiny], view_b[:tiny], flag)
    learner.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_step(learner, of, view_a, view_b, flag)
    return torch.cuda.max_memory_allocated() - before


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def memory(told: argparse.Namespace) -> None:
    """Encoder and loss."""
    base = {"encoder": told.encoder, "stem": told.stem, "image_size": told.image_size, "batch": told.batch}
    for pieces, checkpointing in ((1, False), (4, False), (1, True)):
        task = base | {"micro_batches": pieces, "activation_checkpointing": checkpointing, "precision": told.precision}
        task["device"] = told.device
        of = configured(task)
        planned = rank_memory(of, footprint(of, told.image_size), 1, on_cuda=told.device == "cuda")
        peak = max(size for phase, size in planned.phases.items() if phase != "views")
        predicted = (peak - planned.weights - (planned.optimizer or 0) - planned.views) / MIB
        name = f"step, {pieces} pieces{', checkpointing' if checkpointing else ''}"
        for what in ("allocator",) if told.device == "cuda" else ("allocator", "resident set"):
            shown(f"{name}: {what}", predicted, in_fresh_process(task | {"what": what})["bytes"] / MIB, "MiB")
    if told.device == "cpu":
        for images in (512, 2048):
            predicted = loss_bytes(2 * images, 2 * images, 128, 4, on_cuda=False) / MIB
            shown(f"loss, {images} images", predicted, loss_peak(images, 128) / MIB, "MiB")


def on_the_wire() -> None:
    """2 and 4 processes."""
    for world_size in (2, 4):
        for changes in ({}, {"micro_batches": 2, "activation_checkpointing": True}):
            of = config(global_batch_size=16, model=SMALL, **changes)
            planned = step_traffic(of, footprint(of, 32), world_size, on_cuda=False)
            measured = ranks.run(wire, world_size, of)[0]
            name = f"wire, {world_size} processes{', 2 pieces, checkpointing' if changes else ''}"
            shown(f"{name}: sent", sum(part.sent for part in planned), measured["bytes"], "bytes")
            shown(f"{name}: calls", sum(part.calls for part in planned), measured["calls"], "calls")


def timed_config() -> Config:
    """Of a step whose gradients take longer than a small message: ResNet-18."""
    return config(global_batch_size=8)


def times_of_steps() -> None:
    """On each of two nodes: medians of steps, of a small all-gather, and bytes by the device's own counter; rank 0 prints."""
    with process_group("cpu", 5) as here:
        of = timed_config()
        learner, flag = build_learner(of, here), StopAgreement(here.device)
        view_a, view_b = views(of, of.global_batch_size // here.size)
        one_step(learner, of, view_a, view_b, flag)
        steps: list[float] = []
        gathers: dict[int, list[float]] = {1: [], MIB: []}  # by numbers of 4 bytes
        before = bytes_sent()
        for _ in range(7):
            begin = time.perf_counter()
            one_step(learner, of, view_a, view_b, flag)
            steps.append(time.perf_counter() - begin)
        sent = (bytes_sent() - before) / len(steps)
        for numbers, seconds in gathers.items():
            for _ in range(20):
                begin = time.perf_counter()
                all_gather(torch.zeros(numbers))
                seconds.append(time.perf_counter() - begin)
        flag.finish()
        if here.is_main:
            small, large = (statistics.median(seconds) for seconds in gathers.values())
            rate = 4 * MIB / max(large - small, 1e-9)
            print(json.dumps({"step": statistics.median(steps), "latency": small, "rate": rate, "sent": sent}))


def bytes_sent() -> int:
    """By the network device of this node."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("eth0:")).split()[9])


def on_two_nodes(network: Network) -> dict[str, float]:
    """What `times_of_steps` prints."""
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": network.addresses["n1"], "MASTER_PORT": "29501"}
    variables |= {"GLOO_SOCKET_IFNAME": "eth0"}
    command = (sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"what": "time"}))
    second = network.run("n2", *command, env={**os.environ, **variables, "RANK": "1"}, log=Path(os.devnull))
    first = network.call("n1", *command, env={**os.environ, **variables, "RANK": "0"}, timeout=300)
    second.wait(60)
    found: dict[str, float] = json.loads(first.stdout.splitlines()[-1])
    return found


def step_time() -> None:
    """Two nodes on a link of each rate."""
    if reason := why_not():
        print(f"| step time | | | | not measured: {reason} |")
        return
    of = timed_config()
    planned = step_traffic(of, footprint(of, 32), 2, on_cuda=False)
    with Network() as network:
        free = on_two_nodes(network)
        shown("network: bytes sent, by the device's counter", sum(p.sent for p in planned), free["sent"], "bytes")
        for name, rate in RATES.items():
            for node in network.names:
                network.shape(node, name)
            # The calls' own time is in both, and the limit does not change it.
            own_time = sum(part.sent for part in planned) / free["rate"]
            predicted = free["step"] - own_time + sum(part.seconds(rate, 0.0, 2) for part in planned)
            shown(f"step at {name}", predicted, on_two_nodes(network)["step"], "s")
        calls = sum(part.calls for part in planned)
        latency, rate = 1e6 * free["latency"], free["rate"] / MIB
        print(f"\nwithout a limit: a step {free['step']:.3f} s, {latency:.0f} us a call ({calls} calls), {rate:.0f} MiB/s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=["memory", "wire", "time"], default=["memory", "wire", "time"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--stem", default="small_stride2")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.child:
        child(told.child)
        return
    print("| what | predicted | measured | unit | predicted / measured |\n|---|---|---|---|---|", flush=True)
    if "memory" in told.rows:
        memory(told)
    if "wire" in told.rows:
        on_the_wire()
    if "time" in told.rows:
        step_time()
    print(f"\ntorch {torch.__version__}, one thread a process, {os.cpu_count()} cores; n = 1, of step time the median of 7")


if __name__ == "__main__":
    main()
