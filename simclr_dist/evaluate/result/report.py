"""Summarise a result, and format its table for people."""

import dataclasses
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

from simclr_dist.config.networks import titled
from simclr_dist.evaluate.features.extraction import RAW_PIXELS
from simclr_dist.evaluate.protocols.knn import neighbours
from simclr_dist.evaluate.protocols.scores import DENSE, ON_VALIDATION, ClassScores, Scores, class_report
from simclr_dist.evaluate.result.file import SETS, TRAINED, UNTRAINED, Result, title
from simclr_dist.evaluate.signals import flat, meanings
from simclr_dist.method.distributed import World
from simclr_dist.system.machine import cores

Say = Callable[[str], None]
DEVIATION = "±: the standard deviation of a row's runs (parts of the labels, seeds, or both); the number is their mean"


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
    titles = list(map(title, parts))
    names = [name for name in labels if any(name in part["results"] for part in parts.values())]
    lines += [
        f"{counts(result)}, largest class {result['largest_class_percent']:.1f} % of the test images",
        *grid(titles, {labels[name]: [cell(part["results"].get(name, {})) for part in parts.values()] for name in names}),
    ]
    intervals = [part["results"][TRAINED]["interval"] for part in parts.values()]
    ranges = (f"{one} {low:.2f}-{high:.2f}" for one, (low, high) in zip(titles, intervals, strict=True))
    lines.append(f"95 % intervals of the trained encoder: {', '.join(ranges)}")
    lines += protocol_notes(result, labels)
    return "\n".join([*lines, *unlabelled(result)])


def deviation(row: Mapping[str, Any]) -> list[float]:
    """Return [the standard deviation of a row's runs]. Return [] for a single run."""
    return [sd] if (sd := row.get("spread", {}).get("top1", {}).get("sd")) is not None else []


def percent(top1: float | None, *deviation: float) -> str:
    """Show a percentage, with its `deviation` where that is given. Show '' for none."""
    return "" if top1 is None else " ±".join(f"{value:.2f}" for value in (top1, *deviation))


def cell(row: Mapping[str, Any]) -> str:
    """Show the top-1 of a result's row."""
    return percent(row.get("top1"), *deviation(row))


def grid(titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Format percentages: a line a name, a column a title."""
    lines = {"top-1 %": titles, **rows}
    widths = [max(6, *map(len, column)) for column in zip(*lines.values(), strict=True)]
    first = max(map(len, lines))
    return ["  ".join([f"{name:<{first}}", *map("{:>{}}".format, line, widths)]) for name, line in lines.items()]


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
    """Warn where percentages include images that were learnt from, or chosen by."""
    shared = {words: result.get(f"test_images_in_{name}") for name, words in SETS.items()}
    line = "WARNING: {} test images are among the {} images, byte for byte: on new ones it would do worse"
    return [line.format(count, words) for words, count in shared.items() if count]


def unlabelled(result: Result) -> list[str]:
    """Say how many images without a label were left out. Each set has a line."""
    sets = {words: result[name] for name, words in SETS.items() if name in result}
    left_out = {words: part["images"] - part["labelled"] for words, part in sets.items()}
    return [f"left out: {count} {words} images without a label" for words, count in left_out.items() if count]


def protocol_notes(result: Result, labels: dict[str, str]) -> list[str]:
    """Say what a reader must know of each protocol's settings."""
    lines, parts = [], result["protocols"]
    for name, part in parts.items():
        if chosen := _chosen_values(part["results"]):
            each = (f"{values} ({', '.join(by)})" for values, by in chosen.items())
            lines.append(f"{title(name)}: {'; '.join(each if len(chosen) > 1 else chosen)}, chosen on {ON_VALIDATION}")
    if (knn := parts.get("knn")) and knn["settings"]["k_used"] is not None:
        k, used, temperature = (knn["settings"][name] for name in ("k", "k_used", "temperature"))
        images = result["train"]["labelled"]
        of = "" if used == k <= images / 2 else f" (of {images} training images)"
        wish = "" if used == neighbours(None, images) else f"; {k} asked"
        every = f" (all training images{wish})" if used == images < k else of
        lines.append(f"kNN: k={used}{every}, temperature {temperature:g}")
    if linear := parts.get("linear"):
        rows = linear["results"]
        where = next((row["choice"].get("chosen_on") for row in rows.values() if row["choice"]), "")
        penalties = ", ".join(f"{row['l2']:.2g} ({name.replace('_', ' ')})" for name, row in rows.items())
        lines.append(f"linear: l2 {penalties}{f', chosen on {where}' if where else ''}")
        lines += _choices({name: row["choice"] for name, row in rows.items() if (row["choice"] or {}).get("runner_up")})
        ends = defaultdict[str, list[str]](list)
        for name, row in rows.items():
            if row["choice"] and row["choice"]["at_edge"]:
                grid = row["choice"]["grid"]
                ends[f"{grid[0]:.2g} to {grid[-1]:.2g}"].append(labels[name])
        for tried, named in ends.items():
            end = f"an end of what was tried ({tried}), a better one may lie beyond"
            lines.append(f"linear: this l2 is {end}: {'; '.join(named)}")
        if stopped := [labels[name] for name, row in rows.items() if not row["converged"]]:
            lines.append(f"linear probe stopped before it had converged: {'; '.join(stopped)}")
    if any(deviation(part["results"][TRAINED]) for part in parts.values()):
        lines.append(DEVIATION)
    if sgd := parts.get("sgd"):
        row = sgd["results"][TRAINED]
        paper = "" if row["as_in_paper"] else f"; the paper's {row['paper_epochs']}"
        lines.append(f"SGD: {row['epochs']} epochs of new crops{paper}")
    if mlp := parts.get("mlp"):
        row = mlp["results"][TRAINED]
        if result["classes"] > DENSE:
            return [*lines, f"MLP: the first seed's {result['classes']} classes, one by one, are in the result"]
        names = result["class_names"] or None
        fields = {field.name: row[field.name] for field in dataclasses.fields(Scores)}
        per_class = tuple(ClassScores(**one) for one in row["per_class"])
        first = Scores(**{**fields, "per_class": per_class, "top1": row["spread"]["top1"]["values"][0]})
        lines += ["", "MLP, the first seed, class by class:", *class_report(first, names).splitlines()]
    return lines


def _chosen_values(rows: Mapping[str, Any]) -> dict[str, dict[str, None]]:
    """Name the rows that have chosen the same values, by these. Parts of the labels that chose differently have numbers."""
    chosen = defaultdict[str, dict[str, None]](dict)
    for name, row in rows.items():
        choices = [choice for part in row.get("subsets", [row]) if "values" in (choice := part.get("choice") or {})]
        values = list(map(_spelled, choices))
        for number, words in enumerate(values, 1):
            chosen[words][name.replace("_", " ") + f" {number}" * (len(set(values)) > 1)] = None
    return chosen


def _spelled(choice: Mapping[str, Any]) -> str:
    """Spell the values of a choice. Some were set, or alone."""
    values, tried = choice["values"].items(), choice["tried"]
    fixed = {key for key, value in values if all(one[key] == value for one in tried)}
    return ", ".join(f"{key} {value:g}{' (fixed)' * (key in fixed)}" for key, value in values)


def _choices(choices: dict[str, dict[str, Any]]) -> list[str]:
    """Say how sure the choice of each l2 is."""
    if not choices:
        return []
    one = next(iter(choices.values()))
    if one["folds"] > 1:
        how, unit = f"cross-entropy, each of {one['validation_rows']} images held out once in {one['folds']} folds", ""
    else:
        held_out = ON_VALIDATION if one.get("chosen_on") == ON_VALIDATION else "images held out"
        by = one.get("by", "top-1")  # which results of older versions lack
        how, unit = f"{by} of {one['validation_rows']} {held_out}", " points" if by == "top-1" else ""
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
