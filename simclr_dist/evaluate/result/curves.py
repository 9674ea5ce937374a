"""Find the results of a run that make one curve. This needs no torch."""

import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from simclr_dist.evaluate.result.file import Result, read_result
from simclr_dist.system.errors import DamagedError


def comparable(
    folder: Path, result: Result, say: Callable[[str], None] = lambda _: None
) -> dict[int, tuple[dict[str, Any], float]]:
    """Find results like `result`, itself among them. Returns by step their protocols, and when they were written (since 1970).

    They are in a run's `folder`, of the same layer, precision and images. Only protocols of the same settings are taken.
    A step's kept results (`file.write_result`) count too, as far as they are of the newest one's weights. `say` gets a line
    for a damaged one, which is left out.
    """
    by_step: dict[int, list[tuple[float, Result]]] = {}
    for path in folder.glob("step-*.json"):
        try:
            one = read_result(path)
        except DamagedError as error:
            say(str(error))
            continue
        if one and _images(one) == _images(result):
            by_step.setdefault(int(one["encoder"]["step"]), []).append((path.stat().st_mtime, one))
    points = {}
    wanted = curves(result)
    for step, several in by_step.items():
        several.sort(key=itemgetter(0))
        when, newest = several[-1]
        same = [one for _, one in several if one["encoder"]["sha256"] == newest["encoder"]["sha256"]]
        alike = ((name, one["protocols"][name]) for one in same for name, of in curves(one).items() if of == wanted.get(name))
        points[step] = dict(alike), when
    points[int(result["encoder"]["step"])] = dict(result["protocols"]), time.time()
    return {step: point for step, point in points.items() if point[0]}


def curves(result: Result) -> dict[str, dict[str, Any]]:
    """Return by protocol the values that accuracies of one curve share."""
    return {name: {**_images(result), **part["settings"]} for name, part in result["protocols"].items()}


def _images(result: Result) -> dict[str, Any]:
    settings = result["settings"]
    images = {f"{name} images": result[name]["digest"] for name in ("train", "test", "val") if name in result}
    return {"layer": settings["layer"], "precision": settings["precision"], **images}
