"""What does it cost to read an image's bytes: by offset, through the cache of remote shards, and by webdataset's iterator?

    python benchmarks/reading.py                       # 4,000 made-up files of 20 to 60 KB, in shards of 250
    python benchmarks/reading.py --shards data/mine    # a folder that `simclr-dist shard` wrote

Nothing is decoded. `by offset` reads in the order of a training epoch and checks each sha256 (`without sha256` leaves that
out), `cache` does so from the local copies of shards that a server on loopback gave, `webdataset` is the stock iterator over
the same tars in their order, with and without its shuffle buffer of 1000, which hashes nothing. All in one process; a
repetition is one pass of each in turn, and ratios are medians of ratios within a repetition. CPU time is this process's, user
and system; the files are in the page cache. `fetch` is the first pass through an empty cache: its wall time, with the next
window fetched ahead and without (the server's time is in it, as it is a thread of this process).
"""

import argparse
import hashlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from loss import hardware
from webdataset.writer import TarWriter

from simclr_dist.data.manifest import ManifestRow, load_manifest, write_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings


class Cost(NamedTuple):
    """Of one pass: seconds of CPU and of the clock, and bytes read."""

    cpu: float
    wall: float
    size: int


def make_shards(folder: Path, files: int, a_shard: int) -> Path:
    """Random bytes of 20 to 60 KB under .jpg names, with a manifest."""
    random = np.random.default_rng(0)
    rows, names = [], []
    for first in range(0, files, a_shard):
        path = folder / f"shard-{first // a_shard:06d}.tar"
        names.append(path.name)
        offset = 0
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number in range(first, min(first + a_shard, files)):
                content = random.bytes(int(random.integers(20_000, 60_000)))
                tar.write({"__key__": f"{number:09d}", "jpg": content})
                digest = hashlib.sha256(content).digest()
                rows.append(ManifestRow(f"{number:09d}", path.name, offset + 512, len(content), -1, 1, 1, digest))
                offset += 512 + -(-len(content) // 512) * 512
    write_manifest(folder, names, rows, ())
    return folder


def measured(read: Callable[[], int]) -> Cost:
    """What it costs to call it; it returns the bytes that it read."""
    wall, cpu = time.perf_counter(), time.process_time()
    size = read()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall, size)


def by_offset(images: ShardDataset, plan: Plan, *, ahead: bool = True, check: bool = True) -> int:
    """All images of an epoch, in its order."""
    size = 0
    for step in range(plan.steps_per_epoch):
        now, following = plan.shards_around(step)
        images.expect(now, following if ahead else ())
        for row in plan[step][1]:
            size += len(images.read(int(row)) if check else images._bytes(int(row)))
    return size


def by_iterator(tars: list[str], shuffle: int) -> int:
    """All samples of the tars in stock webdataset's way."""
    found = webdataset.WebDataset(tars, shardshuffle=False)
    size = 0
    for sample in found.shuffle(shuffle) if shuffle else found:
        size += sum(len(value) for key, value in sample.items() if key.rpartition(".")[2] in ("jpg", "jpeg", "png", "webp"))
    return size


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder at an address on loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Measure, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of shards with its manifest (default: made-up ones)")
    parser.add_argument("--files", type=int, default=4000, help="made-up files (default: %(default)s)")
    parser.add_argument("--a-shard", type=int, default=250, help="made-up files in a shard (default: %(default)s)")
    parser.add_argument("--window", type=int, default=4, help="shards of a shuffle window (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="passes of each (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "made").mkdir()
        folder = arguments.shards or make_shards(work / "made", arguments.files, arguments.a_shard)
        manifest = load_manifest(folder)
        tars = [str(folder / name) for name in manifest.shards]
        plan = Plan(manifest.shard_sizes, 0, min(64, len(manifest)), window=arguments.window)
        with served(folder) as url:
            open_shards = 2 * arguments.window
            local = ShardDataset(folder, open_shards=open_shards)
            fetches = {"fetch, ahead": [], "fetch, as needed": []}  # type: dict[str, list[Cost]]
            for repetition in range(min(3, arguments.repetitions)):
                for name, costs in fetches.items():
                    empty = CacheSettings(work / f"{name}-{repetition}", 1 << 40)
                    fresh = ShardDataset(url, open_shards=open_shards, cache=empty)
                    costs.append(measured(partial(by_offset, fresh, plan, ahead="ahead" in name)))
            cached = ShardDataset(url, open_shards=open_shards, cache=CacheSettings(work / "fetch, ahead-0", 1 << 40))
            ways = {
                "by offset": partial(by_offset, local, plan),
                "by offset, without sha256": partial(by_offset, local, plan, check=False),
                "cache": partial(by_offset, cached, plan),
                "webdataset": partial(by_iterator, tars, 0),
                "webdataset, shuffle 1000": partial(by_iterator, tars, 1000),
            }
            costs: dict[str, list[Cost]] = {name: [] for name in ways}
            for repetition in range(arguments.repetitions + 1):
                for name, read in ways.items():
                    cost = measured(read)
                    if repetition:  # the first warms up
                        costs[name].append(cost)
    images = plan.steps_per_epoch * plan.global_batch_size
    print(f"{len(manifest)} images in {len(tars)} shards, {manifest.shard_bytes.sum() / 2**20:.0f} MiB")
    print(f"{'way':28s}{'CPU, us an image':>18s}{'of `by offset`':>16s}{'wall, us an image':>19s}")
    for name, passes in costs.items():
        count = len(manifest) if name.startswith("webdataset") else images
        ratios = [a.cpu / count / (b.cpu / images) for a, b in zip(passes, costs["by offset"], strict=True)]
        cpu, wall = (statistics.median(value) / count * 1e6 for value in ([c.cpu for c in passes], [c.wall for c in passes]))
        print(f"{name:28s}{cpu:18.1f}{statistics.median(ratios):16.2f}{wall:19.1f}")
    for name, passes in fetches.items():
        wall, cpu = statistics.median(c.wall for c in passes), statistics.median(c.cpu for c in passes)
        rate = manifest.shard_bytes.sum() / 2**20 / wall
        print(f"{name:28s}{wall:8.2f} s wall, {cpu:.2f} s CPU (with the server's), {rate:.0f} MiB/s")
    print(hardware("cpu", 1, ["webdataset"], f"{arguments.repetitions} passes"))


if __name__ == "__main__":
    main()
