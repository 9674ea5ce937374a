"""The result of an evaluation: one JSON file beside the encoder's run, and a table for people."""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.protocols.scores import ClassScores, Scores, class_report
from simclr_dist.evaluate.signals import flat, meanings
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import DataError

Result = dict[str, Any]
Say = Callable[[str], None]
FORMAT = "simclr_dist evaluation 3"
UNTRAINED, TRAINED = "untrained", "trained"
NAMES = {"knn": "kNN", "linear": "linear", "sgd": "SGD", "mlp": "MLP"}


class UnwrittenError(DataError):
    """The disk does not take a file of an evaluation, whose numbers `result` has; `stored` is whether its JSON is there."""

    def __init__(self, line: str, result: Result, *, stored: bool) -> None:
        super().__init__(line)
        self.result = result
        self.stored = stored


def result_path(encoder: str | Path, out: str | Path | None = None, layer: str = "h") -> Path:
    """Where the result goes: `out`, else RUN/eval/NAME.json for RUN/encoders/NAME.safetensors, else NAME.eval.json.

    The last stands beside an encoder that is in no run folder, where NAME.json is its card. Of another layer than h, NAME is
    followed by the layer's.
    """
    if out is not None:
        return Path(out)
    encoder, of_layer = Path(encoder), "" if layer == "h" else f".{layer}"
    if len(encoder.parts) == 1:
        encoder = encoder.absolute()  # inside the folder of encoders, its name is not part of what was typed
    if encoder.parent.name == "encoders":
        return encoder.parent.parent / "eval" / f"{encoder.stem}{of_layer}.json"
    return encoder.with_name(f"{encoder.stem}{of_layer}.eval.json")


def claim(path: Path, *, named: bool = False) -> None:
    """Make the result's folder before the work begins; raises DataError where the result could not be written.

    A path that somebody has `named` may be that of an encoder, or of its card: nothing but a result is overwritten there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot make the result's folder: {error.strerror}") from None
    if path.is_dir():
        raise DataError(f"{path}: is a folder; --out names the result's file")
    if named and path.suffix != ".json":
        raise DataError(f"{path}: a result is a .json file; name one with --out")
    if named and path.exists() and not _is_result(path):
        raise DataError(f"{path}: is there and is no result of an evaluation; name another file with --out")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: its folder cannot be written to")


def _is_result(path: Path) -> bool:
    """By its first key; a large one need not be read for that. Also an empty file."""
    try:
        with path.open("rb") as file:
            head = file.read(200).decode()
    except (OSError, ValueError):
        return False
    return not head or bool(re.match(r'\s*{\s*"format": "simclr_dist (evaluation|finetuning)', head))


def as_json(value: Any, indent: str = "") -> str:
    """JSON text with a line for each key, but a row of a table (a list of plain values, or one dict in a list) in one line.

    Raises ValueError for a number that JSON has not.
    """
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        parts = (f"{deeper}{json.dumps(str(key))}: {as_json(part, deeper)}" for key, part in value.items())
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(part, dict | list | tuple) for part in value):
        rows = (deeper + (json.dumps(part, allow_nan=False) if _is_flat(part) else as_json(part, deeper)) for part in value)
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _is_flat(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not any(isinstance(part, dict | list | tuple) for part in parts)


def summary(result: Result) -> dict[str, dict[str, float]]:
    """Top-1 accuracies in percent: {"knn": {"raw_pixels": .., "untrained": .., "trained": ..}, "linear": {same keys}}."""
    return {
        protocol: {features: measured["top1"] for features, measured in part["results"].items()}
        for protocol, part in result["protocols"].items()
    }


def table(result: Result) -> str:
    """Raw pixels, untrained and trained encoder (with its start weights, if not random) by top-1 % of each protocol."""
    encoder, train, test, parts = result["encoder"], result["train"], result["test"], result["protocols"]
    trained = f"trained encoder, step {encoder['step']}" if not encoder["weights"] else "published encoder"
    if encoder["init"] != "random":
        trained += f", started from {encoder['init']}"
    labels = {RAW_PIXELS: "raw pixels", UNTRAINED: "untrained encoder", TRAINED: trained}
    layer = "" if encoder["layer"] == "h" else f", layer {encoder['layer']}"
    lines = [f"{encoder['name']}, width {encoder['width']}{layer}, {encoder['file']}"]
    if not parts:
        lines.append(f"{train['images']} training and {test['images']} test images, none with a label")
        good = meanings(result["signals"])
        for name, value in flat(result["signals"]).items():
            lines.append(f"{name}: {_plain(value)}" + (f" ({good[name]})" if name in good else ""))
        return "\n".join(lines)
    lines += filter(None, [leak(result)])
    names = [name for name in labels if any(name in part["results"] for part in parts.values())]
    width = max(len(labels[name]) for name in [*names, TRAINED])
    lines += [
        f"{train['labelled']} training and {test['labelled']} test images, {result['classes']} classes, "
        f"largest class {result['largest_class_percent']:.1f} % of the test images",
        f"{'top-1 %':<{width}}" + "".join(f"  {NAMES[protocol]:>6}" for protocol in parts),
    ]
    for name in names:
        found = (part["results"].get(name) for part in parts.values())
        lines.append(f"{labels[name]:<{width}}" + "".join(f"  {one['top1']:6.2f}" if one else f"  {'':6}" for one in found))
    intervals = [part["results"][TRAINED]["interval"] for part in parts.values()]
    told = (f"{NAMES[protocol]} {low:.2f}-{high:.2f}" for protocol, (low, high) in zip(parts, intervals, strict=True))
    lines.append(f"95 % intervals of the trained encoder: {', '.join(told)}")
    lines += _told(result, labels)
    for name, part in (("training", train), ("test", test)):
        if part["labelled"] != part["images"]:
            lines.append(f"left out: {part['images'] - part['labelled']} {name} images without a label")
    return "\n".join(lines)


def leak(result: Result) -> str:
    """A warning where the percentages are partly of images that were learnt from; empty where there is none."""
    if not (shared := result["test_images_in_train"]):
        return ""
    return f"WARNING: {shared} test images are among the training images, byte for byte: on new ones it would do worse"


def _told(result: Result, labels: dict[str, str]) -> list[str]:
    """What a reader must know of how the protocols were set."""
    lines, parts = [], result["protocols"]
    if knn := parts.get("knn"):
        told = knn["settings"]
        k = f"k={told['k_used']}" + (f" (all training images; {told['k']} asked)" if told["k_used"] != told["k"] else "")
        lines.append(f"kNN: {k}, temperature {told['temperature']:g}")
    if linear := parts.get("linear"):
        rows = linear["results"]
        chosen = any(row["choice"] for row in rows.values())
        penalties = ", ".join(f"{row['l2']:.2g} ({name.replace('_', ' ')})" for name, row in rows.items())
        lines.append(f"linear: l2 {penalties}{', chosen on training images' if chosen else ''}")
        if ends := [labels[name] for name, row in rows.items() if row["choice"] and row["choice"]["at_edge"]]:
            grid = next(row["choice"]["grid"] for row in rows.values() if row["choice"])
            lines.append(
                f"linear: this l2 is an end of what was tried ({grid[0]:.2g} to {grid[-1]:.2g}), a better one may lie beyond:"
                f" {'; '.join(ends)}"
            )
        if stopped := [labels[name] for name, row in rows.items() if not row["converged"]]:
            lines.append(f"linear probe stopped before it had converged: {'; '.join(stopped)}")
    if sgd := parts.get("sgd"):
        row = sgd["results"][TRAINED]
        lines.append(
            f"SGD: {row['epochs']} epochs of new crops" + ("" if row["as_in_paper"] else f"; the paper's {row['paper_epochs']}")
        )
    if mlp := parts.get("mlp"):
        row = mlp["results"][TRAINED]
        deviation = row["spread"]["top1"]["sd"]
        lines.append(
            f"MLP: mean of {row['spread']['runs']} seeds" + ("" if deviation is None else f", deviation {deviation:.2f}")
        )
        names = result["class_names"] or None
        lines += ["", "MLP, the first seed, class by class:", *class_report(_first_seed(row), names).splitlines()]
    return lines


def _first_seed(row: dict[str, Any]) -> Scores:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Scores)}
    per_class = tuple(ClassScores(**one) for one in row["per_class"])
    return Scores(**{**fields, "per_class": per_class, "top1": row["spread"]["top1"]["values"][0]})


def _plain(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


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
