"""Make a first run: built-in images, short pre-training, evaluation."""

import json
import shutil
from pathlib import Path

from simclr_dist.config.load import load_config
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.manifest import MANIFEST_NAME
from simclr_dist.encoder.names import encoders
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.preflight.demo.images import write_demo_images
from simclr_dist.run.commands import command, evaluate, printed, typed
from simclr_dist.run.folder import check_run_folder
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED
from simclr_dist.system.files import read_object, write_atomically
from simclr_dist.system.progress import Progress

CONFIG = Path(__file__).parents[2] / "demo.yaml"
DATA = Path("data/demo")
_STOPPED = "simclr-dist: stopped by {signal}; training is done and saved, and the same command goes on with the evaluation"
LEARNED_POINTS = 20.0  # a linear probe gains some 50 points over an untrained encoder; less than this is no learning


def run_demo(run: Path, *, seed: int = 0, processes: int = 2) -> int:
    """Generate, shard, train, evaluate, show. Skips finished parts. Returns the exit code."""
    overrides = ["--run_folder", str(run), "--seed", str(seed)]
    config = load_config(CONFIG, overrides)
    if check_run_folder(config) and (run / "summary.json").exists():
        print(f"{run} is a finished run; remove the folder to start anew\n")
    else:
        with Progress("images"):
            prepare_images()
        if code := torchrun(processes, ["-m", "simclr_dist.train", str(CONFIG), *overrides], run):
            return code
        with Progress("evaluation"):
            _measure(run)
    summary = read_object(run / "summary.json", {"linear": dict}, f"remove {run} to start anew")
    encoder = encoders(run)[-1]
    print((run / "summary.txt").read_text())
    print(f"picture: {run / 'demo.png'}")
    board = f"{typed('tensorboard')} --logdir {run / 'tb'}"
    print(printed(board, evaluate(encoder, config), command("shard", "YOUR_IMAGES", "data/mine")))
    gained = summary["linear"]["trained"] - summary["linear"]["untrained"]
    if gained < LEARNED_POINTS:
        print(f"\nThis run did not learn: the linear probe gained {gained:.1f} points of at least {LEARNED_POINTS:.0f}.")
        return 1
    return 0


def prepare_images() -> None:
    """Generate the images and make shards of them, unless they are there."""
    if (DATA / "test" / MANIFEST_NAME).exists():
        return
    images = DATA / ".simclr-dist-images"  # a name that is nobody else's, since it is removed
    print("generating 6,000 images", flush=True)
    if not images.exists():  # a killed start may have left them; they are whole if they are there
        write_demo_images(images)
    for split in ("train", "test"):
        if not (DATA / split / MANIFEST_NAME).exists():
            write_shards(images / split, DATA / split, shard_size=500, seed=0, processes=1, strict=True, progress=True)
    shutil.rmtree(images)


def _measure(run: Path) -> None:
    with signals.importing(PREEMPTED, _STOPPED):  # until here a signal was only noted
        from simclr_dist.evaluate import job
        from simclr_dist.evaluate.result.report import summary, table
        from simclr_dist.preflight.demo.picture import draw

    encoder = encoders(run)[-1]
    result = job.evaluate(encoder, DATA / "train", DATA / "test", workers=0)
    draw(run, encoder, DATA / "test")
    write_atomically(run / "summary.txt", table(result).encode() + b"\n")
    write_atomically(run / "summary.json", json.dumps(summary(result), indent=2).encode() + b"\n")
