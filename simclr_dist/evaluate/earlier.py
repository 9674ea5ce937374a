"""Results of earlier evaluations: whether one still holds, and what of it another encoder can use."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist.evaluate.options import Settings
from simclr_dist.evaluate.protocols import told
from simclr_dist.evaluate.report import FORMAT, TRAINED, Result

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
        result: Result = json.loads(path.read_bytes())
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


def shape(encoder: dict[str, Any]) -> dict[str, Any]:
    """What of a result's `encoder` the baselines depend on."""
    return {name: encoder[name] for name in _SHAPE}
