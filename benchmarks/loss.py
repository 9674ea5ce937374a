"""What do contrastive losses cost, in time, memory and digits, from embeddings to their gradient?

    python benchmarks/loss.py                                       (one CPU thread; about half an hour)
    python benchmarks/loss.py --device cuda --sizes 4096 16384 65536
    python benchmarks/loss.py --contestants ours --sizes 65536      (131,072 rows: memory grows with N, not with N^2)
    python benchmarks/loss.py --processes 4                         (the global batch over 4 gloo ranks, N/4 images each)

Forward and backward from float32 embeddings z_a, z_b [N, 128] that are not normalised, temperature 0.1. Each measurement is
a fresh process, and a repetition takes each contestant in turn. Memory is the rise of the resident set's peak during the one
call that is timed (with --processes, of the largest rank, in the warm-up at the same shape); CPU time is the process's, of
all ranks together. On CUDA: the median of 5 calls after a warm-up, by events, and the rise of the allocator's peak. The error
is the relative norm of the gradient's distance from the definition's in float64, up to N = 4096; on CUDA also above that, from
ours in float64, which goes by tiles. open_clip's loss is a smaller problem, N x N and not 2N x 2N. Liger's and CCE's kernels
are of linear memory too, and take a row's own column for a negative: they are no NT-Xent, and CCE is in bfloat16. `bare
products` are no loss: the matrix products alone that the tiles of ours take on and above the diagonal, so products / ours is
the share of the machine's product speed that ours reaches (on CUDA ours is a kernel that multiplies differently, as three TF32
products, and computes the whole matrix).
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from simclr_dist.method.distributed import process_group
from simclr_dist.method.loss import NTXentLoss, nt_xent_reference
from simclr_dist.method.loss.tiles import Similarities

DIM, TEMPERATURE = 128, 0.1
TINY = 64
LARGEST_WITH_ERROR = 4096
MIB = 2**20
FULL = "out of memory"

Loss = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Result = dict[str, Any]


def gradient_of(loss: Loss) -> Call:
    """Forward and backward."""
    return lambda z_a, z_b: torch.autograd.grad(loss(z_a, z_b), (z_a, z_b))


def ours() -> Call:
    """The loss of this project."""
    return gradient_of(NTXentLoss(TEMPERATURE))


def definition(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Normalise, one matrix, mask, cross-entropy."""
    return nt_xent_reference(z_a, z_b, TEMPERATURE)


def reference() -> Call:
    """The definition as it is written."""
    return gradient_of(definition)


def compiled() -> Call:
    """The definition, compiled."""
    return gradient_of(torch.compile(definition))


def lightly(*, gather: bool = False) -> Call:
    """It normalises by itself."""
    module = importlib.import_module("lightly.loss")
    return gradient_of(module.NTXentLoss(temperature=TEMPERATURE, gather_distributed=gather))


def supcon() -> Call:
    """With one positive an anchor SupCon is NT-Xent; it normalises by itself."""
    loss = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(temperature=TEMPERATURE)

    def of_views(z_a: Tensor, z_b: Tensor) -> Tensor:
        value: Tensor = loss(torch.cat([z_a, z_b]), torch.arange(len(z_a), device=z_a.device).repeat(2))
        return value

    return gradient_of(of_views)


def open_clip() -> Call:
    """View a against view b alone."""
    loss = importlib.import_module("open_clip.loss").ClipLoss()

    def of_views(z_a: Tensor, z_b: Tensor) -> Tensor:
        value: Tensor = loss(F.normalize(z_a, dim=1), F.normalize(z_b, dim=1), 1 / TEMPERATURE)
        return value

    return gradient_of(of_views)


def as_classes(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """A cross-entropy of rows times classes, with the embeddings as both. It cannot leave a row's own column out."""

    def of_views(z_a: Tensor, z_b: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z_a, z_b]), dim=1)
        return loss(z / TEMPERATURE, z, torch.arange(len(z), device=z.device).roll(len(z_a)))

    return gradient_of(of_views)


def liger() -> Call:
    """Linear cross-entropy in pieces."""
    fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return as_classes(lambda rows, classes, partner: fused(classes, rows, partner))


def cut_cross_entropy() -> Call:
    """Linear cross-entropy by kernels that keep no logit; in bfloat16 alone."""
    linear = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return as_classes(lambda rows, classes, partner: linear(rows.bfloat16(), classes.bfloat16(), partner).float())


@torch.no_grad()
def bare_products(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
    """For each tile on or above the diagonal: its similarities twice, and its part in the gradient of rows and columns."""
    z = torch.cat([z_a, z_b])
    result = torch.zeros_like(z)
    side = Similarities(z, z, 0, TEMPERATURE)._side
    memory = z.new_empty(side**2)
    for top in range(0, len(z), side):
        rows = z[top : top + side]
        for left in range(top, len(z), side):
            columns = z[left : left + side]
            tile = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=tile)
            torch.mm(rows, columns.T, out=tile)
            result[top : top + side].addmm_(tile, columns)
            if left > top:
                result[left : left + side].addmm_(tile.T, rows)
    return ()


class Contestant(NamedTuple):
    """Who computes, what must be installed, and bytes (measured, rounded up) for each entry of the 2N x 2N matrix."""

    title: str
    make: Callable[[], Call]
    package: str = ""
    module: str = ""
    bytes_an_entry: int = 0
    has_error: bool = True


CONTESTANTS = {
    "ours": Contestant("ours", ours),
    "reference": Contestant("reference", reference, bytes_an_entry=14),
    "compiled": Contestant("compiled reference", compiled, bytes_an_entry=5),
    "lightly": Contestant("lightly", lightly, "lightly", "lightly", bytes_an_entry=20),
    "supcon": Contestant("SupCon", supcon, "pytorch-metric-learning", "pytorch_metric_learning", bytes_an_entry=52),
    "open_clip": Contestant("open_clip (N x N)", open_clip, "open_clip_torch", "open_clip", bytes_an_entry=6, has_error=False),
    "liger": Contestant("Liger", liger, "liger-kernel", "liger_kernel", has_error=False),
    "cce": Contestant("CCE", cut_cross_entropy, "cut-cross-entropy", "cut_cross_entropy", has_error=False),
    "bare": Contestant("bare products", lambda: bare_products, has_error=False),
}


def memory(name: str) -> int:
    """Bytes, by the name that /proc gives them: VmRSS, its peak VmHWM, MemAvailable."""
    file = "/proc/meminfo" if name.startswith("Mem") else "/proc/self/status"
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return int(found[1]) * 1024


def watch_peak() -> int:
    """From here on VmHWM is the peak since now; returns the resident set.

    What glibc kept of freed memory goes back first: taken again, it would not show.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def expendable() -> None:
    """When the machine's memory ends, the kernel takes this process and no other."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def is_memory_error(error: BaseException) -> bool:
    """What torch raises for a failed allocation, here or in a rank: MemoryError, or an error that says it."""
    said = re.search(r"MemoryError|out of memory|not enough memory|can't allocate", str(error))
    return isinstance(error, MemoryError) or said is not None


def views(n: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """z_a random and z_b near it: cosines of about 0.8 in pairs and of 0 +- 0.09 otherwise."""
    generator = torch.Generator().manual_seed(n)
    z_a, noise = (torch.randn(n, DIM, generator=generator) for _ in range(2))
    z_b = z_a + 0.75 * noise
    return z_a.to(device, dtype).requires_grad_(), z_b.to(device, dtype).requires_grad_()


def timed_on_cpu(call: Call, z_a: Tensor, z_b: Tensor) -> tuple[Result, tuple[Tensor, ...]]:
    """One call."""
    before = watch_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    gradient = call(z_a, z_b)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"seconds": cpu, "wall": wall, "memory": memory("VmHWM") - before}, gradient


def timed_on_cuda(call: Call, z_a: Tensor, z_b: Tensor) -> tuple[Result, tuple[Tensor, ...]]:
    """The median of 5 calls."""
    call(z_a, z_b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds, walls = [], []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wall = time.perf_counter()
        begin.record()
        gradient = call(z_a, z_b)
        end.record()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        seconds.append(begin.elapsed_time(end) / 1000)
        peak = torch.cuda.max_memory_allocated() - before
        kept = [part.cpu() for part in gradient]
        del gradient
    return {"seconds": statistics.median(seconds), "wall": statistics.median(walls), "memory": peak}, tuple(kept)


def save_exact(n: int, file: str, device: str) -> Result:
    """The definition's gradient in float64; of more than can be held, ours in float64."""
    exact = reference() if n <= LARGEST_WITH_ERROR else ours()
    torch.save(torch.stack(exact(*views(n, device, torch.float64))).cpu(), file)
    return {}


def distance(gradient: tuple[Tensor, ...], exact: Tensor) -> float:
    """Squared."""
    return float((torch.stack(gradient).cpu().double() - exact).square().sum())


def alone(name: str, n: int, exact_file: str, device: str) -> Result:
    """One contestant in this process."""
    contestant = CONTESTANTS[name]
    call = contestant.make()
    call(*views(n if name == "compiled" else TINY, device))
    z_a, z_b = views(n, device)
    result, gradient = (timed_on_cuda if device == "cuda" else timed_on_cpu)(call, z_a, z_b)
    if exact_file and contestant.has_error:
        exact = torch.load(exact_file)
        result["error"] = math.sqrt(distance(gradient, exact)) / float(exact.norm())
    return result


def rank_of(rank: int, name: str, n: int, exact_file: str, processes: int, folder: str) -> None:
    """One rank of a distributed contestant; writes its result into the folder."""
    torch.set_num_threads(1)
    expendable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    with process_group("cpu"):
        call = lightly(gather=True) if name == "lightly" else CONTESTANTS[name].make()
        call(*views(TINY, "cpu"))
        own = slice(rank * n // processes, (rank + 1) * n // processes)
        z_a, z_b = (view.detach()[own].clone().requires_grad_() for view in views(n, "cpu"))
        before = watch_peak()
        call(z_a, z_b)
        peak = memory("VmHWM") - before
        torch.distributed.barrier()
        result, gradient = timed_on_cpu(call, z_a, z_b)
        result["memory"] = peak
        if exact_file:  # DDP averages over ranks, so each has `processes` times the gradient
            exact = torch.load(exact_file)
            result["distance"] = distance(gradient, processes * exact[:, own]) / float(processes * exact.norm()) ** 2
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def distributed(name: str, n: int, exact_file: str, processes: int) -> Result:
    """One contestant in as many processes as ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(rank_of, (name, n, exact_file, processes, folder), nprocs=processes)
        except ProcessExitedException as error:
            if error.exit_code == -signal.SIGKILL:
                return {"failed": FULL}
            raise
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    result = {
        "seconds": sum(rank["seconds"] for rank in ranks),
        "wall": max(rank["wall"] for rank in ranks),
        "memory": max(rank["memory"] for rank in ranks),
    }
    return result | ({"error": math.sqrt(sum(rank["distance"] for rank in ranks))} if exact_file else {})


def child(task: dict[str, Any]) -> None:
    """One measurement in this process; prints its result."""
    torch.set_num_threads(task.pop("threads"))
    expendable()
    try:
        result = (save_exact if "file" in task else distributed if "processes" in task else alone)(**task)
    except (MemoryError, RuntimeError, ProcessRaisedException) as error:
        if not is_memory_error(error):
            raise
        result = {"failed": FULL}
    print(json.dumps(result))


def in_fresh_process(script: str, task: dict[str, Any]) -> Result:
    """What `script --child` prints for the task."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    command = [sys.executable, script, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == -signal.SIGKILL:
        return {"failed": FULL}
    if done.returncode:
        sys.exit(f"{task} ended with {done.returncode}:\n{done.stderr}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def hardware(device: str, threads: int, packages: list[str], n: str) -> str:
    """The line under a table: machine, versions and number of measurements."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = f"{found[1] if found else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    gpu = [torch.cuda.get_device_name()] if device == "cuda" else []
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ["torch", *packages]]
    return "; ".join([*gpu, machine, f"python {platform.python_version()}, {', '.join(versions)}", n])


def installed(name: str, package: str, module: str) -> bool:
    """Whether a peer is there; else says so."""
    if not module or importlib.util.find_spec(module):
        return True
    print(f"{name} is left out: it is not installed (pip install {package})\n", flush=True)
    return False


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.4g} [{min(values):.4g}..{max(values):.4g}]"


def row(n: int, name: str, results: list[Result], by_name: dict[str, list[Result]]) -> str:
    """One contestant at one size."""
    start = f"| {n} | {CONTESTANTS[name].title} | "
    if failed := [result["failed"] for result in results if "failed" in result]:
        return f"{start}{failed[0]} | | | | | |"

    def seconds(of: str) -> float:
        found: list[float] = [result.get("seconds", math.nan) for result in by_name.get(of, [{}])]
        return statistics.median(found)

    times = seconds(name) / seconds("ours")
    share = seconds("bare") / seconds("ours") if name == "ours" else math.nan
    error = statistics.median([result.get("error", math.nan) for result in results])
    columns = [
        spread([result["seconds"] for result in results]),
        f"{statistics.median([result['wall'] for result in results]):.4g}",
        "" if math.isnan(times) else f"{times:.2f}",
        f"{statistics.median([result['memory'] for result in results]) / MIB:.1f}",
        "" if math.isnan(share) else f"{share:.0%}",
        "" if math.isnan(error) else f"{error:.1e}",
    ]
    return f"{start}{' | '.join(columns)} |"


def measure(told: argparse.Namespace, n: int, names: list[str], folder: Path) -> None:
    """Every contestant at one size, in turn, as often as told; prints their rows."""
    place = {"processes": told.processes} if told.processes else {"device": told.device}
    available = 0.8 * memory("MemAvailable")
    exact = ""
    if told.device == "cuda" or (n <= LARGEST_WITH_ERROR and 48 * (2 * n) ** 2 <= available):
        exact = str(folder / f"{n}.pt")
        in_fresh_process(__file__, {"threads": told.threads, "n": n, "file": exact, "device": told.device})
    by_name: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(told.repetitions):
        for name, results in by_name.items():
            need = CONTESTANTS[name].bytes_an_entry * (2 * n) ** 2
            if told.device == "cpu" and need > available:
                results.append({"failed": f"not run: would need {need / 2**30:.0f} GiB"})
            elif not any("failed" in result for result in results):
                task = {"threads": told.threads, "name": name, "n": n, "exact_file": exact, **place}
                results.append(in_fresh_process(__file__, task))
    for name, results in by_name.items():
        print(row(n, name, results, by_name), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="images N")
    parser.add_argument("--contestants", "--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, help="ranks; ours against lightly, on the CPU, one thread each")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        return child(told.child)
    if told.processes and (told.device, told.threads) != ("cpu", 1):
        parser.error("--processes is for the CPU, with one thread a rank")
    if told.processes and any(n % told.processes for n in (TINY, *told.sizes)):
        parser.error(f"--processes must divide {TINY} and every size")
    chosen = [name for name in told.contestants if not told.processes or name in ("ours", "lightly")]
    names = [name for name in chosen if installed(name, CONTESTANTS[name].package, CONTESTANTS[name].module)]
    unit = "GPU seconds" if told.device == "cuda" else "CPU seconds, all ranks" if told.processes else "CPU seconds"
    print(f"| N | loss | {unit}: median [range] | wall | times ours | memory, MiB | products / ours | gradient error |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for n in told.sizes:
            measure(told, n, names, Path(folder))
    packages = [CONTESTANTS[name].package for name in names if CONTESTANTS[name].package]
    ranks = f"{told.processes} gloo ranks of one thread, " if told.processes else ""
    print(f"\n{hardware(told.device, told.threads, packages, f'{ranks}n = {told.repetitions}')}")
    return None


if __name__ == "__main__":
    main()
