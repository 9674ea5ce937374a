"""Results of earlier evaluations: whether one still holds, and what of it another encoder can use."""

import json
import time
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist.evaluate.measure import told
from simclr_dist.evaluate.options import Settings
from simclr_dist.evaluate.result.report import FORMAT, TRAINED, Result

_SHAPE = ("name", "width", "stem", "layer", "feature_size", "image_size", "mean", "std")


class Baselines(NamedTuple):
    """Raw pixels and the untrained encoder of each protocol that has them, as measured beside the encoder file `measured_for`.

    They hold for every encoder of that `shape`.
    """

    measured_for: str
    shape: dict[str, Any]
    protocols: dict[str, dict[str, Any]]


def read_result(path: Path) -> Result:
    """The result at `path`; {} when there is none of this format."""
    try:
        content = path.read_bytes()
        if FORMAT.encode() not in content[:200]:  # its first key: others need no reading
            return {}
        result: Result = json.loads(content)
    except (OSError, ValueError):
        return {}
    whole = isinstance(result, dict) and result.get("format") == FORMAT and "seconds" in result  # its last key
    return result if whole else {}


def difference(result: Result, settings: Settings, *, encoder: str, train: str, test: str) -> str:
    """Why an evaluation now could give other numbers than `result`, like "k 200, now 20"; empty when it could not.

    `encoder`, `train` and `test` are the digests of today's files. A result that has baselines serves also where none are
    asked for; batch size and number of workers change no result.
    """
    compared: list[tuple[str, Any, Any]] = [
        ("encoder", result["encoder"]["sha256"], encoder),
        ("training images", result["train"]["digest"], train),
        ("test images", result["test"]["digest"], test),
        ("layer", result["settings"]["layer"], settings.layer),
        ("precision", result["settings"]["precision"], settings.precision),
    ]
    for protocol, now in told(settings).items() if result["classes"] else ():
        before = result["protocols"].get(protocol)
        if before is None:
            compared.append((f"protocol {protocol}", "left out", "measured"))
        else:
            compared += [(name, before["settings"][name], value) for name, value in now.items()]
    if settings.baselines and result["classes"] and set(settings.protocols) - {"sgd"}:  # which has none
        compared.append(("baselines", "measured" if baselines(result) else "left out", "measured"))
        compared.append(("seed", result["settings"]["seed"], settings.seed))
    return ", ".join(f"{name} {str(old)[:12]}, now {str(new)[:12]}" for name, old, new in compared if old != new)


def baselines(result: Result) -> Baselines | None:
    """Those of `result`; None when they were left out."""
    found = {
        protocol: {name: measured for name, measured in part["results"].items() if name != TRAINED}
        for protocol, part in result["protocols"].items()
    }
    found = {protocol: rows for protocol, rows in found.items() if rows}
    if not found:
        return None
    source = result.get("baselines_measured_for") or Path(result["encoder"]["file"]).name
    return Baselines(source, shape(result["encoder"]), found)


def comparable(folder: Path, result: Result) -> dict[int, tuple[dict[str, Any], float]]:
    """By step, the protocols of results like `result` (itself among them) and when they were written (seconds since 1970).

    Out of a run's `folder` of results, those of the same layer, precision and images; of them the protocols of the same
    settings. A step's kept results (`kept.write_result`) count too, as far as they are of the newest one's weights.
    """
    by_step: dict[int, list[tuple[float, Result]]] = {}
    for path in folder.glob("step-*.json"):
        one = read_result(path)
        if one and _images(one) == _images(result):
            by_step.setdefault(int(one["encoder"]["step"]), []).append((path.stat().st_mtime, one))
    found = {}
    for step, several in by_step.items():
        several.sort(key=itemgetter(0))
        when, newest = several[-1]
        weights = newest["encoder"]["sha256"]
        same = [_alike(one, result) for _, one in several if one["encoder"]["sha256"] == weights]
        found[step] = {name: part for protocols in same for name, part in protocols.items()}, when
    found[int(result["encoder"]["step"])] = dict(result["protocols"]), time.time()
    return {step: part for step, part in found.items() if part[0]}


def _images(result: Result) -> tuple[Any, ...]:
    """What accuracies of one curve must share."""
    settings = result["settings"]
    return settings["layer"], settings["precision"], result["train"]["digest"], result["test"]["digest"]


def _alike(one: Result, result: Result) -> dict[str, Any]:
    told = {name: part["settings"] for name, part in result["protocols"].items()}
    return {name: part for name, part in one["protocols"].items() if name in told and part["settings"] == told[name]}


def shape(encoder: dict[str, Any]) -> dict[str, Any]:
    """What of a result's `encoder` the baselines depend on."""
    return {name: encoder[name] for name in _SHAPE}
