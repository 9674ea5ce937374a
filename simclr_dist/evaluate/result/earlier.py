"""Find which earlier results still hold. Find also which baselines in them another encoder can use."""

import time
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist.evaluate.classify import protocol_settings
from simclr_dist.evaluate.result.file import SHAPE, read_result
from simclr_dist.evaluate.result.report import TRAINED, Result, Say
from simclr_dist.evaluate.settings import Settings
from simclr_dist.system.errors import DamagedError


class Baselines(NamedTuple):
    """Rows of raw pixels and of the untrained encoder by protocol. Its signals, too.

    They hold for every encoder of this `shape`.

    `measured_for` is the encoder file that they were measured beside.
    """

    measured_for: str
    shape: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    signals: dict[str, Any]


def difference(result: Result, settings: Settings, *, encoder: str, train: str, test: str) -> str:
    """Say why an evaluation now could differ from `result`. Returns text like "k 200, now 20"; '' when it could not.

    `encoder`, `train` and `test` are the digests of today's files. A result with baselines serves also where none are needed;
    batch size and number of workers change no result.
    """
    compared: list[tuple[str, Any, Any]] = [
        ("encoder", result["encoder"]["sha256"], encoder),
        ("training images", result["train"]["digest"], train),
        ("test images", result["test"]["digest"], test),
        ("layer", result["settings"]["layer"], settings.layer),
        ("precision", result["settings"]["precision"], settings.precision),
    ]
    for protocol, now in protocol_settings(settings, result["train"].get("labelled", 0)).items() if result["classes"] else ():
        before = result["protocols"].get(protocol)
        if before is None:
            compared.append((f"protocol {protocol}", "left out", "measured"))
        else:
            same_k = before["settings"].get("k") == now.get("k")
            used = ((name, value) for name, value in now.items() if same_k or name != "k_used")
            compared += [(name, before["settings"].get(name), value) for name, value in used]
    if settings.baselines and (not result["classes"] or set(settings.protocols) - {"sgd"}):  # which has none
        compared.append(("baselines", "measured" if baselines(result) else "left out", "measured"))
        compared.append(("seed", result["settings"]["seed"], settings.seed))
    return ", ".join(f"{name} {str(old)[:12]}, now {str(new)[:12]}" for name, old, new in compared if old != new)


def baselines(result: Result) -> Baselines | None:
    """Return the baselines of `result`. Returns None when they were left out."""
    parts = result["protocols"].items()
    every = {name: {kind: row for kind, row in part["results"].items() if kind != TRAINED} for name, part in parts}
    by_protocol = {name: rows for name, rows in every.items() if rows}
    source = result.get("baselines_measured_for") or Path(result["encoder"]["file"]).name
    of_signals = result.get("untrained_signals") or {}
    return Baselines(source, shape(result["encoder"]), by_protocol, of_signals) if by_protocol or of_signals else None


def comparable(folder: Path, result: Result, say: Say = lambda _: None) -> dict[int, tuple[dict[str, Any], float]]:
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
    images = {f"{name} images": result[name]["digest"] for name in ("train", "test")}
    return {"layer": settings["layer"], "precision": settings["precision"], **images}


def shape(encoder: dict[str, Any]) -> dict[str, Any]:
    """Return those values of a result's `encoder` that baselines depend on."""
    return {name: encoder[name] for name in SHAPE}
