"""Summarise a result, and format its table for people."""

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from simclr_dist.config.networks import titled
from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.protocols.scores import DENSE, ClassScores, Scores, class_report
from simclr_dist.evaluate.result.file import NAMES, TRAINED, UNTRAINED, Result
from simclr_dist.evaluate.signals import flat, meanings
from simclr_dist.method.distributed import World
from simclr_dist.system.machine import cores

Say = Callable[[str], None]


def summary(result: Result) -> dict[str, dict[str, float]]:
    """Return top-1 in percent. Like {"knn": {"raw_pixels": .., "untrained": .., "trained": ..}, "linear": {same keys}}."""
    return {
        protocol: {features: measured["top1"] for features, measured in part["results"].items()}
        for protocol, part in result["protocols"].items()
    }


def table(result: Result) -> str:
    """Format top-1 % by protocol: raw pixels, untrained and trained encoder. It adds what a reader must know beside it."""
    encoder, parts = result["encoder"], result["protocols"]
    trained = f"trained encoder, step {encoder['step']}" if not encoder["weights"] else "published encoder"
    trained += "" if encoder["init"] == "random" else f", started from {encoder['init'].partition(': ')[0]}"
    labels = {RAW_PIXELS: "raw pixels", UNTRAINED: "untrained encoder", TRAINED: trained}
    layer = "" if encoder["layer"] == "h" else f", layer {encoder['layer']}"
    lines = [f"{titled(encoder['name'], encoder['width'])}{layer}, {encoder['file']}"]
    if not parts:
        lines.append(counts(result))
        for name, trained, untrained, good in signal_rows(result):
            plain, beside = (f"{value:.3f}" if isinstance(value, float) else value for value in (trained, untrained))
            lines.append(f"{name}: {plain}" + (f", untrained {beside}" if beside is not None else "") + (good and f" ({good})"))
        return "\n".join(lines)
    lines += leak(result)
    names = [name for name in labels if any(name in part["results"] for part in parts.values())]
    width = max(len(labels[name]) for name in [*names, TRAINED])
    lines += [
        f"{counts(result)}, largest class {result['largest_class_percent']:.1f} % of the test images",
        f"{'top-1 %':<{width}}" + "".join(f"  {NAMES[protocol]:>6}" for protocol in parts),
    ]
    for name in names:
        rows = (part["results"].get(name) for part in parts.values())
        lines.append(f"{labels[name]:<{width}}" + "".join(f"  {row['top1']:6.2f}" if row else f"  {'':6}" for row in rows))
    intervals = [part["results"][TRAINED]["interval"] for part in parts.values()]
    ranges = (f"{NAMES[protocol]} {low:.2f}-{high:.2f}" for protocol, (low, high) in zip(parts, intervals, strict=True))
    lines.append(f"95 % intervals of the trained encoder: {', '.join(ranges)}")
    lines += _protocol_notes(result, labels)
    return "\n".join([*lines, *unlabelled(result)])


def counts(result: Result) -> str:
    """Count the images that were measured, and their classes."""
    which, of = ("labelled", f"{result['classes']} classes") if result["classes"] else ("images", "none with a label")
    return f"{result['train'][which]} training and {result['test'][which]} test images, {of}"


def signal_rows(result: Result) -> list[tuple[str, Any, Any, str]]:
    """List the signals: name, trained, untrained, and how to read it."""
    measured, beside = result["signals"], flat(result.get("untrained_signals") or {})
    good = meanings(measured)
    return [
        (name, value, beside.get(name) if name in good else None, good.get(name, "")) for name, value in flat(measured).items()
    ]


def leak(result: Result) -> list[str]:
    """Warn in one line where percentages include images that were learnt from."""
    shared = result["test_images_in_train"]
    line = f"WARNING: {shared} test images are among the training images, byte for byte: on new ones it would do worse"
    return [line] if shared else []


def unlabelled(result: Result) -> list[str]:
    """Say how many images without a label were left out. Each set has a line."""
    sets = (("training", result["train"]), ("test", result["test"]))
    left_out = {name: part["images"] - part["labelled"] for name, part in sets}
    return [f"left out: {count} {name} images without a label" for name, count in left_out.items() if count]


def _protocol_notes(result: Result, labels: dict[str, str]) -> list[str]:
    """Say what a reader must know of each protocol's settings."""
    lines, parts = [], result["protocols"]
    if knn := parts.get("knn"):
        k, used, temperature = (knn["settings"][name] for name in ("k", "k_used", "temperature"))
        images = result["train"]["labelled"]
        of = "" if used == k <= images / 2 else f" (of {images} training images)"
        every = f" (all training images; {k} asked)" if used == images < k else of
        lines.append(f"kNN: k={used}{every}, temperature {temperature:g}")
    if linear := parts.get("linear"):
        rows = linear["results"]
        chosen = any(row["choice"] for row in rows.values())
        penalties = ", ".join(f"{row['l2']:.2g} ({name.replace('_', ' ')})" for name, row in rows.items())
        lines.append(f"linear: l2 {penalties}{', chosen on training images' if chosen else ''}")
        lines += _choices({name: row["choice"] for name, row in rows.items() if (row["choice"] or {}).get("runner_up")})
        if ends := [labels[name] for name, row in rows.items() if row["choice"] and row["choice"]["at_edge"]]:
            grid = next(row["choice"]["grid"] for row in rows.values() if row["choice"])
            tried = f"what was tried ({grid[0]:.2g} to {grid[-1]:.2g})"
            lines.append(f"linear: this l2 is an end of {tried}, a better one may lie beyond: {'; '.join(ends)}")
        if stopped := [labels[name] for name, row in rows.items() if not row["converged"]]:
            lines.append(f"linear probe stopped before it had converged: {'; '.join(stopped)}")
    if sgd := parts.get("sgd"):
        row = sgd["results"][TRAINED]
        paper = "" if row["as_in_paper"] else f"; the paper's {row['paper_epochs']}"
        lines.append(f"SGD: {row['epochs']} epochs of new crops{paper}")
    if mlp := parts.get("mlp"):
        row = mlp["results"][TRAINED]
        sd = row["spread"]["top1"]["sd"]
        lines.append(f"MLP: mean of {row['spread']['runs']} seeds" + ("" if sd is None else f", deviation {sd:.2f}"))
        if result["classes"] > DENSE:
            return [*lines, f"MLP: the first seed's {result['classes']} classes, one by one, are in the result"]
        names = result["class_names"] or None
        fields = {field.name: row[field.name] for field in dataclasses.fields(Scores)}
        per_class = tuple(ClassScores(**one) for one in row["per_class"])
        first = Scores(**{**fields, "per_class": per_class, "top1": row["spread"]["top1"]["values"][0]})
        lines += ["", "MLP, the first seed, class by class:", *class_report(first, names).splitlines()]
    return lines


def _choices(choices: dict[str, dict[str, Any]]) -> list[str]:
    """Say how sure the choice of each l2 is."""
    if not choices:
        return []
    one = next(iter(choices.values()))
    if one["folds"] > 1:
        how, unit = f"cross-entropy, each of {one['validation_rows']} images held out once in {one['folds']} folds", ""
    else:
        how, unit = f"top-1 of {one['validation_rows']} images held out", " points"
    behind = {name: f"{one['margin']:.2g} ± {one['margin_error']:.1g}{unit}" for name, one in choices.items()}
    nexts = (f"{one['runner_up']:.2g} ({name.replace('_', ' ')}, worse by {behind[name]})" for name, one in choices.items())
    return [f"linear: l2 by {how}; next best, with the standard error: {', '.join(nexts)}"]


def hardware(world: World) -> dict[str, Any]:
    """Describe what the speed and the last digits depend on."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _cpu_name()
    return {"device": device, "world_size": world.size, "cpus": cores(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and torchvision."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
