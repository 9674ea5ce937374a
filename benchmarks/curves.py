"""How good is an encoder after how many images, and after how much work, beside two other libraries? Learning curves.

    python benchmarks/curves.py --cifar TRAIN.parquet TEST.parquet --animals FOLDER --folder runs/curves --peers PYTHON
    python benchmarks/curves.py                    (table and picture again, of what is measured)

It goes on where it was stopped. PYTHON is one that has lightly and stable-pretraining; without them it says how they come.
Four curves a set of images, three seeds each. Three are of equal settings: the network of `configs/cifar10_cpu.yaml`, a
projector of 512 and 128, one batch (256, for photos 128), float32, AdamW with weight decay 1e-4, 10 % warm-up, one cosine. The
fourth is that recipe as it stands, with as many images and its warm-up's share of them; for photos also with that batch.

    ours      this trainer: its preset of views for small images, no decay of norms, channels last
    lightly   SimCLRTransform(cj_strength=0.5, gaussian_blur=0.0), as in its CIFAR-10 benchmark; LightlyDataset,
              SimCLRProjectionHead, NTXentLoss, the loop of its SimCLR example
    stable    stable-pretraining: transforms of its CIFAR-10 example, FromTorchDataset; its methods.SimCLR with the network
              inside, as in its docstring. Its loop is Lightning's; here it is the same plain one, which costs less

Rate (1e-3, 2e-3, 5e-3, 1e-2) and temperature (0.2, or the library's default) are chosen for each of the three, by the sum of
both accuracies on a tenth of the training images of CIFAR-10 that the run does not see, after a third of the images, with one
seed. After a change of what is chosen, such as by a rate more, the curves are measured again.
Animals-10-mini takes them over: a tenth of it would be 26 photos.

A curve is ONE run: its points are after 1/8, 1/4, 1/2 and all images, and its cosine ends at the last. Each point is the top-1
of test images by kNN (k = 200) and a linear probe (l2 1e-3), on h of plain images, by the same code for all. Intervals are 1.96
standard errors: of the mean over seeds, and of a share of as many test images. CPU seconds are those of training, in one thread
a process, of all its processes. Ours are counted from the start of Python; a point has its share of them. Those of the others
begin with the first batch, behind imports and decoding: their images lie decoded in memory, where a worker would only add
copies. The photos are 320, of which 256 are trained on and 64 asked: one of them is 1.6 points.
"""

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss import hardware
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from simclr_dist.config.load import config_of, load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.encoder.names import encoder_path
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.evaluate.protocols.linear import linear_probe
from simclr_dist.evaluate.result.picture import charts_png
from simclr_dist.method.encoders import build_encoder
from simclr_dist.method.optim import learning_rate
from simclr_dist.system.files import write_atomically
from simclr_dist.train.describe import encoder_card

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "configs" / "cifar10_cpu.yaml"
HIDDEN, EMBEDDING, K, L2 = 512, 128, 200, 1e-3
RATES = (1e-3, 2e-3, 5e-3, 1e-2)
TEMPERATURES = {"ours": (0.2, 0.1), "lightly": (0.2, 0.5), "stable": (0.2, 0.5)}  # the second is the library's default
NAMES = {
    "ours": "ours, equal settings", "recipe": "ours, its recipe", "lightly": "lightly", "stable": "stable-pretraining",
}  # fmt: skip
PACKAGES = ("torch", "torchvision", "lightly", "stable-pretraining")
Record = dict[str, list[float]]  # of a run: images, cpu, knn and linear of each point; asked, the number of test images
Result = dict[str, Any]  # about, and a Record a run


class Set(NamedTuple):
    """A set of images: its name for people, the side of views, and the batch."""

    title: str
    side: int
    batch: int


SETS = {"cifar": Set("CIFAR-10", 32, 256), "animals": Set("Animals-10-mini", 64, 128)}


class Job(NamedTuple):
    """One run. Judged on `asking`, with the labels of `voting`."""

    name: str
    system: str
    config: Config
    voting: Path
    asking: Path


class Pictures(Dataset[tuple[Any, int]]):
    """Decoded images, as torchvision's CIFAR10 has them: it makes a PIL image of one, and applies `transform`."""

    def __init__(self, shards: str) -> None:
        self.samples = [(sample.image.contiguous(), sample.label) for sample in samples_of(shards)]
        self.transform: Callable[[Any], Any] = lambda picture: picture

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        image, label = self.samples[row]
        return self.transform(to_pil_image(image)), label


class Peer(NamedTuple):
    """What a loop needs of another library."""

    model: nn.Module
    loss: Callable[[Any], Tensor]
    images: Dataset[Any]
    normalised: dict[str, Sequence[float]]


def lightly(encoder: nn.Module, size: int, pictures: Pictures, config: Config) -> Peer:
    """By its SimCLR example in PyTorch."""
    transforms, heads = (importlib.import_module(f"lightly.{name}") for name in ("transforms", "models.modules.heads"))
    data, losses = (importlib.import_module(f"lightly.{name}") for name in ("data", "loss"))
    views = transforms.SimCLRTransform(input_size=config.views.image_size, cj_strength=0.5, gaussian_blur=0.0)
    model = nn.Sequential(encoder, heads.SimCLRProjectionHead(size, HIDDEN, EMBEDDING))
    criterion = losses.NTXentLoss(temperature=config.loss.temperature)

    def loss(batch: Any) -> Tensor:
        (view_a, view_b), _, _ = batch
        found: Tensor = criterion(model(view_a), model(view_b))
        return found

    normalised = importlib.import_module("lightly.transforms.utils").IMAGENET_NORMALIZE
    return Peer(model, loss, data.LightlyDataset.from_torch_dataset(pictures, transform=views), normalised)


def stable(encoder: nn.Module, size: int, pictures: Pictures, config: Config) -> Peer:
    """By the docstring of its SimCLR, with the views of its CIFAR-10 example."""
    data, methods = (importlib.import_module(f"stable_pretraining.{name}") for name in ("data", "methods.simclr"))
    t, normalised, side = data.transforms, data.static.CIFAR10, config.views.image_size

    def view(smallest: float, *more: Any) -> Any:
        jitter = t.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
        crop, flip = t.RandomResizedCrop((side, side), scale=(smallest, 1.0)), t.RandomHorizontalFlip(p=0.5)
        return t.Compose(t.RGB(), crop, flip, jitter, t.RandomGrayscale(p=0.2), *more, t.ToImage(**normalised))

    views = t.MultiViewTransform([view(0.2), view(0.08, t.RandomSolarize(threshold=0.5, p=0.2))])
    model = methods.SimCLR(encoder, projector_dims=(HIDDEN, EMBEDDING), temperature=config.loss.temperature)

    def loss(batch: Any) -> Tensor:
        found: Tensor = model(*(each["image"] for each in batch["views"])).loss
        return found

    images = data.FromTorchDataset(pictures, names=["image", "label"], transform=views)
    return Peer(model, loss, images, normalised)


def train_peer(system: str, file: Path) -> None:
    """Train as the config says, with another library; export encoders, and write the CPU seconds at each."""
    config = load_config(file)
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    model, steps = config.model, config.steps or 0
    encoder = build_encoder(model.encoder, width=model.width, stem=model.stem)
    peer = {"lightly": lightly, "stable": stable}[system](encoder, encoder.feature_size, Pictures(config.data.shards), config)
    loader = DataLoader(peer.images, batch_size=config.global_batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(peer.model.parameters(), weight_decay=config.optim.weight_decay)
    rate = functools.partial(learning_rate, peak=config.peak_lr, warmup_steps=config.optim.warmup_steps or 0, total_steps=steps)
    batches = (batch for _ in itertools.count() for batch in loader)
    start, used = time.process_time(), list[float]()
    for step, batch in zip(range(steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = peer.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in stops(steps):
            used.append(time.process_time() - start)
            card = encoder_card(config, encoder.feature_size, "random", step + 1, {"data_digest": None})
            card |= {name: list(value) for name, value in peer.normalised.items()}
            export_encoder(encoder_path(config.run_folder, step + 1), encoder, card)
    file.with_name("cpu.json").write_text(json.dumps(used))


def stops(steps: int) -> list[int]:
    """Of a run, the steps at which it is judged."""
    eighth = max(1, steps // 8)
    return sorted({step for step in (eighth, 2 * eighth, 4 * eighth) if step < steps} | {steps})


def samples_of(shards: str | Path) -> list[Any]:
    """All images with their labels."""
    dataset = ShardDataset(shards)
    return [dataset[row] for row in range(len(dataset))]


@functools.cache
def plain(shards: Path, side: int) -> tuple[Tensor, Tensor]:
    """The images of an evaluation, uint8 [n, 3, side, side], and labels [n]."""
    samples = samples_of(shards)
    return torch.stack([eval_view(one.image, side) for one in samples]), torch.tensor([one.label for one in samples])


def accuracies(file: Path, voting: Path, asking: Path) -> dict[str, float]:
    """Top-1 in percent."""
    encoder = load_encoder(file)
    side, mean, std = (encoder.card[name] for name in ("image_size", "mean", "std"))

    def features(shards: Path) -> tuple[Tensor, Tensor]:
        images, labels = plain(shards, side)
        with torch.no_grad():
            return torch.cat([encoder(normalise(part, mean, std)) for part in images.split(500)]), labels

    (h, label), (asked, truth) = features(voting), features(asking)
    classes = int(label.max()) + 1
    predict, _ = linear_probe(h, label, classes=classes, l2=L2)
    of = {"knn": weighted_knn(h, label, asked, k=K, classes=classes), "linear": predict(asked)}
    return {name: 100 * float((one.argmax(1) == truth).double().mean()) for name, one in of.items()}


def train(job: Job, place: Path, peers: str) -> list[float]:
    """Train in a process of its own, unless it is done; the CPU seconds at each of its stops."""
    done, steps = place / "cpu.json", job.config.steps or 0
    if not done.exists():
        shutil.rmtree(place, ignore_errors=True)  # a part of a run would be a part of its CPU seconds
        place.mkdir(parents=True)
        file = place / "config.yaml"
        file.write_text(write_yaml(job.config.to_dict()))
        ours = job.system in ("ours", "recipe")
        program = [sys.executable, "-m", "simclr_dist.train"] if ours else [peers, __file__, "--train", job.system]
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with (place / "log.txt").open("wb") as log:
            child = subprocess.Popen([*program, str(file)], env=environment, stdout=log, stderr=log)
            _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{job.name}: ended with {child.returncode}: {place / 'log.txt'}")
        if ours:
            seconds = used.ru_utime + used.ru_stime
            done.write_text(json.dumps([seconds * step / steps for step in stops(steps)]))
    found: list[float] = json.loads(done.read_text())
    return found


def measure(job: Job, folder: Path, peers: str) -> Record:
    """Train and judge; a run that only chooses settings has one point."""
    place, at = folder / "runs" / job.name.replace(" ", "-"), stops(job.config.steps or 0)
    used = train(job, place, peers)
    chosen = slice(-1, None) if job.name.startswith("tuning") else slice(None)
    judged = [accuracies(encoder_path(place / "run", step), job.voting, job.asking) for step in at[chosen]]
    return {
        "images": [step * job.config.global_batch_size for step in at[chosen]], "cpu": used[chosen],
        "asked": [len(plain(job.asking, job.config.views.image_size or 0)[1])],
        **{name: [one[name] for one in judged] for name in ("knn", "linear")},
    }  # fmt: skip


def config_for(
    name: str, folder: Path, of: Set, shards: Path, images: int, *, seed: int = 0, choice: tuple[float, float] | None = None
) -> Config:
    """The config of a run: with a `choice` of rate and temperature that of equal settings, else the recipe's."""
    recipe = load_config(RECIPE)
    batch = recipe.global_batch_size if of is SETS["cifar"] and choice is None else of.batch
    steps = images // batch
    samples = 50_000  # of the recipe's training set
    warmup = recipe.warmup_steps(samples) / recipe.total_steps(samples)
    settings: dict[str, Any] = {
        "run_folder": str(folder / "runs" / name.replace(" ", "-") / "run"), "data.shards": str(shards), "seed": seed,
        "device": "cpu", "views.image_size": of.side, "global_batch_size": batch, "steps": steps, "epochs": None,
        "checkpoint.export_every": max(1, steps // 8), "optim.warmup_steps": round(warmup * steps),
    }  # fmt: skip
    if choice is None:
        return config_of(RECIPE, settings)
    settings |= {
        "optim.base_lr": choice[0], "loss.temperature": choice[1], "optim.warmup_steps": steps // 10,
        "optim.name": "adamw", "optim.lr_rule": "constant", "optim.weight_decay": 1e-4, "optim.clip_norm": 0.0,
        "views.preset": "small", "model.projector_hidden": HIDDEN, "model.projector_dim": EMBEDDING,
        "data.workers": 0, "log.tensorboard": False, "checkpoint.every": steps,
        **{f"model.{name}": getattr(recipe.model, name) for name in ("encoder", "width", "stem")},
    }  # fmt: skip
    return config_of({}, settings)


def tuning_jobs(told: argparse.Namespace) -> dict[tuple[str, float, float], Job]:
    """By system, rate and temperature."""
    split, jobs = told.folder / "cifar" / "split", {}
    for system, temperatures in TEMPERATURES.items():
        for rate, temperature in itertools.product(RATES, temperatures):
            name = f"tuning {system} {rate:g} {temperature:g}"
            choice = rate, temperature
            config = config_for(name, told.folder, SETS["cifar"], split / "train", told.images // 3, choice=choice)
            jobs[system, rate, temperature] = Job(name, system, config, split / "train", split / "test")
    return jobs


def curve_jobs(told: argparse.Namespace, chosen: dict[str, tuple[float, float]]) -> list[Job]:
    """Seed by seed."""
    jobs = []
    for seed, of, system in itertools.product(range(told.seeds), SETS, NAMES):
        if of == "animals" and not told.animals:
            continue
        name, shards = f"{of} {system} {seed}", told.folder / of
        images = told.images if of == "cifar" else told.photos
        choice = chosen.get(system)
        config = config_for(name, told.folder, SETS[of], shards / "train", images, seed=seed, choice=choice)
        jobs.append(Job(name, system, config, shards / "train", shards / "test"))
    return jobs


def make_shards(told: argparse.Namespace) -> None:
    """Write all sets, once: `cifar/split` holds back a tenth of the training images; photos lose what no view shows."""
    train_images, test_images = told.cifar
    write_shards(train_images, told.folder / "cifar" / "train", processes=1)
    write_shards(test_images, told.folder / "cifar" / "test", processes=1)
    write_shards(train_images, told.folder / "cifar" / "split", processes=1, split=(0.9, 0.1))
    if told.animals:
        write_shards(told.animals, told.folder / "animals", processes=1, split=(0.8, 0.2), short_side=128)


def choose(results: Result, jobs: dict[tuple[str, float, float], Job]) -> dict[str, tuple[float, float]]:
    """Rate and temperature of each system."""

    def score(of: tuple[str, float, float]) -> float:
        record = results[jobs[of].name]
        return float(record["knn"][-1] + record["linear"][-1])

    best = {system: max((of for of in jobs if of[0] == system), key=score) for system in TEMPERATURES}
    return {system: (rate, temperature) for system, (_, rate, temperature) in best.items()}


def run(told: argparse.Namespace, results: Result) -> None:
    """Do what is not done."""
    writing = threading.Lock()

    def one(job: Job) -> None:
        record = measure(job, told.folder, told.peers)
        with writing:
            results[job.name] = record
            write_atomically(told.results, (json.dumps(results, indent=1) + "\n").encode())
        print(f"{job.name}: kNN {record['knn'][-1]:.1f}, linear {record['linear'][-1]:.1f}", flush=True)

    def work(jobs: Sequence[Job]) -> None:
        left = [job for job in jobs if job.name not in results]
        for shards, side in {(s, job.config.views.image_size) for job in left for s in (job.voting, job.asking)}:
            plain(shards, side or 0)
        with ThreadPoolExecutor(told.at_once) as pool:
            list(pool.map(one, left))

    make_shards(told)
    told.results.parent.mkdir(parents=True, exist_ok=True)
    jobs = tuning_jobs(told)
    work(list(jobs.values()))
    chosen, before = choose(results, jobs), results["about"].get("chosen", {})
    for system in chosen:
        if list(chosen[system]) != before.get(system):  # by rates that were added: its curves are of another one
            for name in [name for name in results if name.split()[1:2] == [system] and not name.startswith("tuning")]:
                shutil.rmtree(told.folder / "runs" / name.replace(" ", "-"), ignore_errors=True)
                del results[name]
    results["about"]["chosen"] = {system: list(choice) for system, choice in chosen.items()}
    work(curve_jobs(told, chosen))


class Point(NamedTuple):
    """The mean over seeds at a stop: kNN and linear with the half of their intervals."""

    images: float
    cpu: float
    knn: tuple[float, float]
    linear: tuple[float, float]


def curve(results: Result, of: str, system: str) -> list[Point]:
    """Of the seeds that are measured."""
    runs: list[Record] = [record for name, record in results.items() if name.rsplit(" ", 1)[0] == f"{of} {system}"]

    def mean(key: str, at: int) -> float:
        return statistics.fmean(run[key][at] for run in runs)

    def share(key: str, at: int) -> tuple[float, float]:
        middle, values = mean(key, at), [run[key][at] for run in runs]
        of_seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
        return middle, 1.96 * math.sqrt(of_seeds + middle * (100 - middle) / runs[0]["asked"][0])

    stops_there = range(len(runs[0]["images"]) if runs else 0)
    return [Point(mean("images", at), mean("cpu", at), share("knn", at), share("linear", at)) for at in stops_there]


def work_to_reach(points: Sequence[Point], by: str, top1: float) -> str:
    """The CPU seconds at which the line through `points` comes to `top1`."""
    here = [(point.cpu, getattr(point, by)[0]) for point in points]
    if here[0][1] >= top1:
        return f"less than {here[0][0]:.0f}"
    for (cpu, low), (later, high) in itertools.pairwise(here):
        if low < top1 <= high:
            return f"{cpu + (later - cpu) * (top1 - low) / (high - low):.0f}"
    return "never"


def report(results: Result, picture: Path) -> None:
    """Print the tables, and draw the picture."""
    sheets = []
    for of, about in SETS.items():
        curves = {NAMES[system]: points for system in NAMES if (points := curve(results, of, system))}
        if not curves:
            continue
        print(f"\n| {about.title} | images seen | CPU s | kNN, % | linear, % |\n|---|---|---|---|---|")
        for name, points in curves.items():
            for point in points:
                cells = [f"{middle:.1f} ± {half:.1f}" for middle, half in (point.knn, point.linear)]
                print(f"| {name} | {point.images:,.0f} | {point.cpu:.0f} | {' | '.join(cells)} |")
        print(f"\n| CPU s to where it ends | {' | '.join(curves)} |\n|---|{'---|' * len(curves)}")
        for name, points in curves.items():
            for by in ("knn", "linear"):
                top1 = getattr(points[-1], by)[0]
                reached = [work_to_reach(other, by, top1) for other in curves.values()]
                print(f"| {name}, {by} {top1:.1f} | {' | '.join(reached)} |")
        for axis, key in (("images seen", "images"), ("CPU seconds", "cpu")):
            charts = {
                f"{about.title}: {title}, top-1 %": {
                    name: [(getattr(point, key), getattr(point, by)[0]) for point in points] for name, points in curves.items()
                }
                for by, title in (("knn", "kNN"), ("linear", "linear probe"))
            }
            sheets.append(Image.open(BytesIO(charts_png(charts, axis))))
    print(f"\n{json.dumps(results['about'])}")
    if sheets:
        whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)))
        for place, sheet in enumerate(sheets):
            whole.paste(sheet, (0, sum(above.height for above in sheets[:place])))
        whole.save(picture)


def versions(python: str) -> tuple[dict[str, str], str]:
    """Of the packages that a Python has; or what is to be done where one is missing."""
    program = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {PACKAGES}}}))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
        if not done.returncode:
            return json.loads(done.stdout), ""
        why = (done.stderr.splitlines() or ["it says nothing"])[-1]
    except OSError as error:
        why = str(error.strerror)
    site = sysconfig.get_paths()["purelib"]
    venv = f"runs/peers/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    return {}, (
        f"--peers {python}: {why}; make one that borrows this one's torch: {sys.executable} -m venv runs/peers &&"
        f" echo {site} > {venv}/borrowed.pth && runs/peers/bin/pip install lightly==1.6.0 stable-pretraining==0.1.8"
        " and give --peers runs/peers/bin/python"
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", nargs=2, metavar=("TRAIN", "TEST"), help="CIFAR-10's images as Parquet")
    parser.add_argument("--animals", type=Path, metavar="FOLDER", help="photos in folders of classes")
    parser.add_argument("--folder", type=Path, help="where shards and runs go; without it the results are shown again")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the one that has the other libraries")
    parser.add_argument("--images", type=int, default=115_200, help="seen by a run of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=25_600, help="seen by a run of photos (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, a core each (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "benchmarks" / "results" / "curves.json")
    parser.add_argument("--picture", type=Path, default=HERE / "docs" / "curves.png")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)  # a process of its own: a library's name, and the config
    told = parser.parse_args()
    if told.train:
        return train_peer(told.train[0], Path(told.train[1]))
    torch.set_num_threads(1)
    results: Result = json.loads(told.results.read_text()) if told.results.exists() else {}
    if told.folder:
        if not told.cifar:
            parser.error("--cifar: the settings are chosen on it: give TRAIN.parquet TEST.parquet")
        installed, missing = versions(told.peers)
        if missing:
            parser.error(missing)
        recipe = hashlib.sha256(write_yaml(load_config(RECIPE).to_dict()).encode()).hexdigest()[:12]
        about = {
            "images": told.images, "photos": told.photos, "recipe": recipe,
            "versions": installed, "hardware": hardware("cpu", 1, [], f"{told.at_once} runs at once"),
        }  # fmt: skip
        before = {name: results.get("about", about)[name] for name in about}
        if before != about:
            parser.error(f"--results {told.results}: holds runs of {before}, not {about}; name another file and folder")
        results["about"] = results.get("about", {}) | about
        told.folder = told.folder.absolute()
        run(told, results)
    elif not results:
        parser.error(f"--results {told.results}: no such file; give --folder and --cifar to measure")
    return report(results, told.picture)


if __name__ == "__main__":
    main()
