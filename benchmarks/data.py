"""What do decoding and augmentation cost, beside the peers and beside the bare decoder?

    python benchmarks/data.py --photos DIR --cifar FILE.parquet          (both parts; some minutes on one core)
    python benchmarks/data.py --photos DIR --quick                       (fewer images and rounds)

Two views of each image at 224 pixels from a folder of photographs (JPEG), and at 32 from CIFAR-10 as Hugging Face exports
it (column `img`, struct of bytes and path). Each contestant is one thread; its cost is the process's CPU time, so that what
else the machine does counts little. A round takes every contestant in turn over the same images; ratios are of one round's
times, and the median over the rounds is printed. The peers draw their own parameters. End to end is wall time from shards
with two reading processes. `crops to uint8` is what stays on the CPU when a GPU does the rest: sha256, decode, draws, two
crops; colour, gray, blur and normalisation have moved. Where a peer is not installed, a line says so.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import io
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from simclr_dist.convert.shards import write_shards
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels.decode import decode
from simclr_dist.data.pixels.resize import crop_views
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, coloured, load_steps
from simclr_dist.data.views.colour import Colour, colour_views
from simclr_dist.data.views.compiled import compile_colour
from simclr_dist.data.views.crops import crop_view
from simclr_dist.data.views.draws import PRESETS, ViewDraws, ViewSettings, draw_views

Contestant = Callable[[], object]
Costs = dict[str, list[float]]


def drawn(settings: ViewSettings, images: Sequence[Tensor], epoch: int) -> list[ViewDraws]:
    """Both views' parameters."""
    height, width = np.array([image.shape[1:] for image in images]).T
    rows = np.arange(len(images))
    return [draw_views(settings, seed=0, epoch=epoch, rows=rows, view=v, heights=height, widths=width) for v in (0, 1)]


def cropped(images: Sequence[Tensor], draws: ViewDraws, settings: ViewSettings) -> Tensor:
    """One view of each, uint8."""
    each = zip(images, draws.box, draws.flip, strict=True)
    return torch.stack([crop_view(i, box, flip, settings.image_size, settings.interpolation) for i, box, flip in each])


def torchvision_views(module: Any, settings: ViewSettings, *, tensors: bool) -> Callable[[Any], Tensor]:
    """SimCLR's augmentation from torchvision's classes: `transforms` on PIL images, or `transforms.v2` on uint8 tensors."""
    size, s = settings.image_size, settings
    steps = [
        module.RandomResizedCrop(size, s.crop_scale, s.crop_ratio, v1.InterpolationMode.BICUBIC, antialias=True),
        module.RandomHorizontalFlip(s.flip),
        module.RandomApply([module.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)], s.jitter),
        module.RandomGrayscale(s.gray),
    ]
    if s.blur:
        steps.append(module.RandomApply([module.GaussianBlur(size // 10 // 2 * 2 + 1, s.blur_sigma)], s.blur))
    steps.append(module.ToDtype(torch.float32, scale=True) if tensors else module.ToTensor())
    made: Callable[[Any], Tensor] = module.Compose([*steps, module.Normalize(s.mean, s.std)])
    return made


def pil(content: bytes) -> Image.Image:
    """Decoded, as ImageFolder's loader does it."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def contestants(contents: Sequence[bytes], settings: ViewSettings) -> dict[str, Contestant]:
    """By name; each makes two views of every image, but for the bare decoder."""
    hashes = [hashlib.sha256(content).digest() for content in contents]
    epoch = iter(range(10**6))
    small = settings.image_size <= 40
    in_memory = torch.stack([decode(content).contiguous() for content in contents]) if small else None

    def read() -> list[Tensor]:
        assert [hashlib.sha256(content).digest() for content in contents] == hashes
        return [decode(content) for content in contents]

    def crops() -> list[tuple[Tensor, ViewDraws]]:
        images = read()
        return [(cropped(images, draws, settings), draws) for draws in drawn(settings, images, next(epoch))]

    def crops_in_memory() -> list[tuple[Tensor, ViewDraws]]:
        assert in_memory is not None
        every, size = np.arange(len(contents)), settings.image_size
        return [
            (crop_views(in_memory, every, draws.box, draws.flip, size, settings.interpolation), draws)
            for draws in drawn(settings, list(in_memory), next(epoch))
        ]

    def colour(made: list[tuple[Tensor, ViewDraws]], with_: Colour = colour_views) -> list[Tensor]:
        return [with_(view, draws, settings) for view, draws in made]

    compiled = compile_colour()

    one, two = torchvision_views(v1, settings, tensors=False), torchvision_views(v2, settings, tensors=True)
    found: dict[str, Contestant] = {
        "ours, crops to uint8": crops,
        "ours, all on the CPU": lambda: colour(crops()),
        "ours, all on the CPU, compile: true": lambda: colour(crops(), compiled),
    }
    if small:
        found |= {"ours, in memory, crops": crops_in_memory, "ours, in memory, all": lambda: colour(crops_in_memory())}
        found |= {"ours, in memory, all, compile: true": lambda: colour(crops_in_memory(), compiled)}
    if lightly := optional("lightly.transforms"):
        strength = settings.brightness / 0.8
        blur = settings.blur
        theirs = lightly.SimCLRTransform(input_size=settings.image_size, cj_strength=strength, gaussian_blur=blur)
        found["lightly SimCLRTransform"] = lambda: [theirs(pil(content)) for content in contents]
    found["torchvision v1 on PIL"] = lambda: [[one(image) for _ in (0, 1)] for image in map(pil, contents)]
    found["torchvision v2 on tensors"] = lambda: [[two(image) for _ in (0, 1)] for image in map(decode, contents)]
    found["bare decode_jpeg"] = lambda: [
        torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)) for content in contents
    ]
    return found


def stages(contents: Sequence[bytes], settings: ViewSettings) -> dict[str, Contestant]:
    """What ours consists of; colour is measured whole and without its two dearest operations."""
    images = [decode(content) for content in contents]
    draws = drawn(settings, images, 0)
    views = [cropped(images, d, settings) for d in draws]

    def colour(change: Callable[[ViewDraws], ViewDraws]) -> Contestant:
        changed = [change(d) for d in draws]
        return lambda: [colour_views(view, d, settings) for view, d in zip(views, changed, strict=True)]

    compiled = compile_colour()

    def no_hue(d: ViewDraws) -> ViewDraws:
        return d._replace(factors=d.factors * np.float32([1, 1, 1, 0]))

    def no_blur(d: ViewDraws) -> ViewDraws:
        return d._replace(blur_sigma=np.zeros_like(d.blur_sigma))

    return {
        "sha256": lambda: [hashlib.sha256(content).digest() for content in contents],
        "decode": lambda: [decode(content) for content in contents],
        "draws": lambda: drawn(settings, images, 1),
        "crops": lambda: [cropped(images, d, settings) for d in draws],
        "colour, all": colour(lambda d: d),
        "colour, compiled": lambda: [compiled(view, d, settings) for view, d in zip(views, draws, strict=True)],
        "colour without hue": colour(no_hue),
        "colour without blur": colour(no_blur),
        "colour without either": colour(lambda d: no_hue(no_blur(d))),
    }


def measure(found: dict[str, Contestant], images: int, rounds: int) -> Costs:
    """CPU milliseconds an image, by name and round; one more round comes before, to warm up."""
    costs: Costs = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, contestant in found.items():
            start = time.process_time()
            contestant()
            if number:
                costs[name].append((time.process_time() - start) * 1000 / images)
    return costs


def table(title: str, costs: Costs, against: Sequence[str]) -> Iterator[str]:
    """Markdown: median cost, images a second, and the median of each round's ratio to some of the contestants."""
    known = [name for name in against if name in costs]
    yield f"\n{title}\n"
    yield "| | CPU ms an image | images/s a core | " + " | ".join(f"times as fast as {name}" for name in known) + " |"
    yield "|---|---|---|" + "---|" * len(known)
    for name, values in costs.items():
        ratios = [statistics.median(b / a for a, b in zip(values, costs[k], strict=True)) for k in known]
        middle = statistics.median(values)
        yield f"| {name} | {middle:.3f} | {1000 / middle:.0f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def end_to_end(contents: Sequence[bytes], settings: ViewSettings, workers: int) -> str:
    """Images a second of wall time from shards, colour included."""
    with tempfile.TemporaryDirectory() as folder:
        source, shards = Path(folder, "source"), Path(folder, "shards")
        source.mkdir()
        for number, content in enumerate(contents):
            (source / f"{number:06d}.jpg").write_bytes(content)
        write_shards(source, shards, shard_size=256, processes=1)
        images = ShardDataset(shards)
        plan = Plan(load_manifest(shards).shard_sizes, 0, len(images) // 4)
        steps = load_steps(StepDataset(images, plan, settings), range(16), workers=workers)
        start = 0.0
        for number, views in enumerate(steps):
            if number == 3:
                start = time.perf_counter()
            list(coloured(views, settings, torch.device("cpu")))
        return f"{12 * plan.global_batch_size / (time.perf_counter() - start):.0f} images/s end to end, {workers} workers"


def order_at_scale() -> Iterator[str]:
    """1,281,167 samples in 1,000 shards: time to plan, and how well a window mixes."""
    shards, batch = np.full(1000, 1281), 4096
    shard = np.repeat(np.arange(1000), 1281)
    yield "\n1,281,000 samples in 1,000 shards, batches of 4096\n"
    yield "| window | CPU ms to plan an epoch | shards in a batch | distance moved from the order of the shards, mean |"
    yield "|---|---|---|---|"
    for window in (1, 16, 64, 1000):
        start = time.process_time()
        order = Plan(shards, 0, int(shards.sum()), window=window)[0][1]
        spent = (time.process_time() - start) * 1000
        batches = order[: len(order) // batch * batch].reshape(-1, batch)
        mixed = statistics.mean(len(np.unique(shard[rows])) for rows in batches[::8])
        # Relative to where its shard begins in this epoch: a full shuffle moves a sample by a third of the set.
        by_shard = shard[order]
        begins = np.full(1000, len(order))
        np.minimum.at(begins, by_shard, np.arange(len(order)))
        ranks = np.empty(1000, dtype=np.int64)
        ranks[np.argsort(begins)] = np.arange(1000)
        moved = np.abs(np.arange(len(order)) - (ranks[by_shard] * 1281 + order % 1281)).mean() / len(order)
        yield f"| {window} | {spent:.0f} | {mixed:.0f} | {100 * moved:.2f} % of the set |"


def optional(name: str) -> Any:
    """A module, or None after saying that it is not here."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"not measured: {name} ({error})")
        return None


def versions() -> str:
    """What was measured, on what."""
    found = []
    for package in ("simclr_dist", "torch", "torchvision", "pillow", "lightly", "nvidia-dali-cuda120"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in names if line.startswith("model name")), platform.machine())
    return f"{', '.join(found)}; Python {platform.python_version()}; {cpu}, one thread"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--cifar", type=Path, help="Parquet file with 32 x 32 JPEGs in img.bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="16 photographs, 256 small images, 2 rounds; nothing end to end")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rounds = 2 if chosen.quick else chosen.rounds
    print(versions())
    sets = []
    if chosen.photos:
        files = sorted(file for file in chosen.photos.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))
        sets.append(("photos", PRESETS["imagenet"], [file.read_bytes() for file in files[: 16 if chosen.quick else 100]]))
    if chosen.cifar:
        column = pq.read_table(chosen.cifar, columns=["img"]).column("img").slice(0, 256 if chosen.quick else 2000)
        sets.append(("CIFAR-10", PRESETS["small"], [image["bytes"] for image in column.to_pylist()]))
    for name, settings, contents in sets:
        title = f"{name}, two views at {settings.image_size}, n = {len(contents)} images x {rounds} rounds"
        costs = measure(contestants(contents, settings), len(contents), rounds)
        print("\n".join(table(title, costs, ("lightly SimCLRTransform", "bare decode_jpeg"))))
        costs = measure(stages(contents, settings), len(contents), rounds)
        print("\n".join(table(f"{name}, stage by stage", costs, ("colour, all",))))
        if not chosen.quick:
            print(end_to_end(contents, settings, 2))
    print("\n".join(order_at_scale()))


if __name__ == "__main__":
    main()
