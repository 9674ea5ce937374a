"""What does a data set of many images cost each rank before its first step, and a machine with many ranks?

    python benchmarks/scale.py                              # 1 and 4 million images
    python benchmarks/scale.py --millions 16 64             # 2 and 8 GB of disk
    python benchmarks/scale.py --other ../older/checkout    # a second build beside this one, in the same run

The manifests are made up: 1,000 images a shard, keys and hashes as `simclr-dist shard` writes them. The tars are sparse files
of the recorded size, which is all that a start looks at. A rank's start is: load the collection (each tar's size compared),
digest, median side, and the rows of step 0, in a process that has imported everything. `make` is the first start, without an
index beside the manifest; `start` the median of `--repeats` later ones. CPU is user and system. `peak` is the largest resident
size above that before (pages of mapped files count), `kept` the private memory (smaps_rollup, Private_*) above that before,
`private` all of it. `later epoch` is a step of epoch 7, with that epoch's shards to be shuffled first. `machine`: 8 ranks, each
with 4 forked workers that look up the rows of 20 steps; the proportional sizes (Pss) of all 40 processes above those before,
together.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, SHARD = 4096, 1000
RANKS, WORKERS = 8, 4
MEASURED = ("cpu", "peak", "kept", "private", "later")


def make_manifest(folder: Path, images: int) -> None:
    """A manifest as `write_manifest` makes it, in row groups as it goes, and sparse tars."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    random, place = np.random.default_rng(0), 512 + 1536 * np.arange(SHARD)
    names = [f"shard-{number:06d}.tar" for number in range(images // SHARD)]
    size = int(place[-1]) + 2048
    for name in names:
        (folder / name).touch()
        os.truncate(folder / name, size)
    kinds: list[tuple[str, Any]] = [("key", pa.string()), ("shard", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
    kinds += [("label", pa.int64()), ("class_name", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    fields = [pa.field(name, kind, nullable=name == "class_name") for name, kind in [*kinds, ("sha256", pa.binary(32))]]
    shards = [{"bytes": size, "name": name, "samples": SHARD} for name in names]
    about = {"classes": [], "format": "simclr_dist.manifest", "shards": shards, "version": 1}
    schema = pa.schema(fields, {b"simclr_dist": json.dumps(about).encode()})
    with pq.ParquetWriter(folder / "manifest.parquet", schema, compression="zstd") as writer:
        for first in range(0, images, 1 << 20):
            rows = np.arange(first, min(first + (1 << 20), images))
            n = len(rows)
            columns = [
                pc.utf8_lpad(pa.array(rows).cast(pa.string()), 9, "0"), pa.array(names).take(pa.array(rows // SHARD)),
                place[rows % SHARD], random.integers(500, 1500, n), random.integers(0, 1000, n), pa.nulls(n, pa.string()),
                random.integers(200, 600, n).astype(np.int32), random.integers(200, 600, n).astype(np.int32),
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), n, [None, pa.py_buffer(random.bytes(32 * n))]),
            ]  # fmt: skip
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))


def memory(process: int | str, *kinds: str) -> int:
    """Bytes of a process, of these kinds."""
    lines = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(words[1]) << 10 for words in lines if words[0].startswith(kinds))


def most(process: str = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def start(folder: str) -> None:
    """One rank's start, in this process. Prints what it costs."""
    from simclr_dist.data.collection import load_collection
    from simclr_dist.data.order import Plan

    before, private = memory("self", "Rss"), memory("self", "Private_")
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size
    began = time.process_time()
    manifest = load_collection(folder)
    plan = Plan(manifest.shard_sizes, seed=0, global_batch_size=BATCH)
    rows = plan[0][1]
    known = (manifest.digest, manifest.short_side, rows[:3].tolist())
    cpu = time.process_time() - began
    peak, kept = most() - before, memory("self", "Private_") - private
    costs = {"cpu": cpu, "peak": peak, "kept": kept, "private": private + kept}
    began = time.process_time()
    later = plan[7 * plan.steps_per_epoch + 5][1]
    milliseconds = 1000 * (time.process_time() - began)
    print(json.dumps(costs | {"later": milliseconds, "known": [*known, later[:3].tolist()]}))


def rank(folder: str, number: int) -> None:
    """A rank with its workers. Prints a line when all hold their memory, and ends with standard input."""
    from simclr_dist.data.collection import load_collection
    from simclr_dist.data.order import Plan

    before = memory("self", "Pss:")
    manifest = load_collection(folder)
    plan = Plan(manifest.shard_sizes, seed=0, global_batch_size=BATCH, rank=number, world_size=RANKS)
    plan[0]
    ready, done = os.pipe()
    workers = []
    for _ in range(WORKERS):
        if (worker := os.fork()) == 0:
            for step in range(20):
                for row in plan[step][1].tolist():
                    manifest.offset[row], manifest.size[row], manifest.label[row], manifest.sha256[row].tobytes()
            os.write(done, b".")
            sys.stdin.read()
            os._exit(0)
        workers.append(worker)
    for _ in workers:
        os.read(ready, 1)
    print(json.dumps([before, os.getpid(), *workers]), flush=True)
    sys.stdin.read()


def child(checkout: Path, *arguments: str) -> list[str]:
    return ["env", f"PYTHONPATH={checkout}", sys.executable, str(Path(__file__).resolve()), *arguments]


def machine(checkout: Path, folder: Path) -> int:
    """The bytes that all processes of a machine hold together for this data set."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(child(checkout, "--rank", str(folder), str(number)), **pipes) for number in range(RANKS)]
    told = [json.loads(process.stdout.readline()) for process in ranks]
    held = sum(memory(process, "Pss:") for _, *processes in told for process in processes) - sum(before for before, *_ in told)
    for process in ranks:
        process.communicate()
    return held


def measured(checkout: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subprocess.run(child(checkout, "--start", str(folder)), stdout=-1, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4], help="images (default: 1 4)")
    parser.add_argument("--other", type=Path, help="a second checkout, measured beside this one")
    parser.add_argument("--other-millions", type=int, default=4, help="the most images for it, and its machine a quarter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.start:
        start(chosen.start)
    elif chosen.rank:
        rank(chosen.rank[0], int(chosen.rank[1]))
    else:
        compare(chosen)


def compare(chosen: argparse.Namespace) -> None:
    """Measure the builds, and print a table."""
    print("| build | million images | | CPU-s | peak MiB | kept MiB | private MiB | later epoch ms | machine MiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    here = Path(__file__).resolve().parents[1]
    for millions in chosen.millions:
        with tempfile.TemporaryDirectory() as scratch:
            make_manifest(folder := Path(scratch, "shards"), millions * 1_000_000)
            known = []
            for name, checkout in (("other", chosen.other), ("this", here)):
                if checkout is None or (name == "other" and millions > chosen.other_millions):
                    continue
                several = [measured(checkout, folder) for _ in range(1 + chosen.repeats)]
                first, later = several[0], {key: statistics.median(one[key] for one in several[1:]) for key in MEASURED}
                together = machine(checkout, folder) if name == "this" or 4 * millions <= chosen.other_millions else None
                for what, one in (("make", first), ("start", later)):
                    mib = " | ".join(f"{one[name] / 2**20:.1f}" for name in ("peak", "kept", "private"))
                    shared = "" if together is None or what == "make" else f"{together / 2**20:.0f}"
                    print(
                        f"| {name} | {millions} | {what} | {one['cpu']:.3f} | {mib} | {one['later']:.1f} | {shared} |",
                        flush=True,
                    )
                known += [one["known"] for one in several]
            assert all(one == known[0] for one in known), "the builds see the same images in the same order"


if __name__ == "__main__":
    main()
