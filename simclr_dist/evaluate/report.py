"""The result of an evaluation: one JSON file beside the encoder's run, and a table for people."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

from simclr_dist.atomic import write_atomically
from simclr_dist.distributed import World
from simclr_dist.errors import DataError
from simclr_dist.evaluate.features import RAW_PIXELS

Result = dict[str, Any]
FORMAT = "simclr_dist evaluation 1"
UNTRAINED, TRAINED = "untrained", "trained"


def result_path(encoder: str | Path, out: str | Path | None = None) -> Path:
    """Where the result goes: `out`, else RUN/eval/NAME.json for RUN/encoders/NAME.safetensors, else NAME.eval.json.

    The last stands beside an encoder that is in no run folder, where NAME.json is its card.
    """
    if out is not None:
        return Path(out)
    encoder = Path(encoder)
    if len(encoder.parts) == 1:
        encoder = encoder.absolute()  # inside the folder of encoders, its name is not part of what was typed
    if encoder.parent.name == "encoders":
        return encoder.parent.parent / "eval" / f"{encoder.stem}.json"
    return encoder.with_name(f"{encoder.stem}.eval.json")


def claim(path: Path) -> None:
    """Make the result's folder before the work begins; raises DataError where the result could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot make the result's folder: {error.strerror}") from None
    if path.is_dir():
        raise DataError(f"{path}: is a folder; --out names the result's file")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: its folder cannot be written to")


def write_result(path: Path, result: Result) -> None:
    """Write JSON atomically; raises DataError when that cannot be."""
    try:
        write_atomically(path, json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot write the result: {error.strerror or error}") from None


def summary(result: Result) -> dict[str, dict[str, float]]:
    """Top-1 accuracies in percent: {"knn": {"raw_pixels": .., "untrained": .., "trained": ..}, "linear": {same keys}}."""
    return {
        protocol: {features: measured["top1"] for features, measured in part["results"].items()}
        for protocol, part in result["protocols"].items()
    }


def table(result: Result) -> str:
    """Raw pixels, untrained and trained encoder (with its start weights, if not random) by kNN and linear top-1 %."""
    encoder, train, test = result["encoder"], result["train"], result["test"]
    trained = f"trained encoder, step {encoder['step']}"
    if encoder["init"] != "random":
        trained += f", started from {encoder['init']}"
    labels = {RAW_PIXELS: "raw pixels", UNTRAINED: "untrained encoder", TRAINED: trained}
    knn = result["protocols"]["knn"]["settings"]
    linear = result["protocols"]["linear"]
    names = list(linear["results"])
    width = max(len(labels[name]) for name in [*names, TRAINED])
    lines = [
        f"{encoder['name']}, width {encoder['width']}, {encoder['file']}",
        f"{train['labelled']} training and {test['labelled']} test images, {result['classes']} classes, "
        f"largest class {result['largest_class_percent']:.1f} % of the test images",
        f"{'top-1 %':<{width}}  {'kNN':>6}  {'linear':>6}",
    ]
    for name in names:
        accuracy = (part["results"][name]["top1"] for part in result["protocols"].values())
        lines.append(f"{labels[name]:<{width}}  " + "  ".join(f"{value:6.2f}" for value in accuracy))
    k = f"k={knn['k_used']}" + (f" (all training images; {knn['k']} asked)" if knn["k_used"] != knn["k"] else "")
    lines.append(f"kNN: {k}, temperature {knn['temperature']:g}; linear: l2 {linear['settings']['l2']:g}")
    stopped = [labels[name] for name in names if not linear["results"][name]["converged"]]
    if stopped:
        lines.append(f"linear probe stopped before it had converged: {'; '.join(stopped)}")
    for name, part in (("training", train), ("test", test)):
        if part["labelled"] != part["images"]:
            lines.append(f"left out: {part['images'] - part['labelled']} {name} images without a label")
    if result["test_images_in_train"]:
        lines.append(f"{result['test_images_in_train']} test images are among the training images, byte for byte")
    return "\n".join(lines)


def hardware(here: World) -> dict[str, Any]:
    """What the speed and the last digits depend on."""
    on_gpu = here.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(here.device) if on_gpu else _cpu_name(),
        "world_size": here.size,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python, torch and torchvision."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
