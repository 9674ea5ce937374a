"""Find which earlier results still hold. Find also which baselines in them another encoder can use."""

from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist.evaluate.classify import protocol_settings
from simclr_dist.evaluate.result.file import SETS, SHAPE, TRAINED, Result
from simclr_dist.evaluate.settings import Settings


class Baselines(NamedTuple):
    """Rows of raw pixels and of the untrained encoder by protocol. Its signals, too.

    They hold for every encoder of this `shape`.

    `measured_for` is the encoder file that they were measured beside.
    """

    measured_for: str
    shape: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    signals: dict[str, Any]


def difference(result: Result, settings: Settings, *, encoder: str, **sets: str) -> str:
    """Say why an evaluation now could differ from `result`. Returns text like "k 200, now 20"; '' when it could not.

    `encoder` and `sets` (by `SETS`) are the digests of today's files. A result with baselines serves also where none are
    needed; batch size and number of workers change no result.
    """
    compared: list[tuple[str, Any, Any]] = [
        ("encoder", result["encoder"]["sha256"], encoder),
        *((f"{words} images", result.get(name, {}).get("digest"), sets.get(name)) for name, words in SETS.items()),
        ("layer", result["settings"]["layer"], settings.layer),
        ("precision", result["settings"]["precision"], settings.precision),
    ]
    wanted = protocol_settings(settings, result["train"].get("labelled", 0), chosen="val" in sets)
    for protocol, now in wanted.items() if result["classes"] else ():
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


def shape(encoder: dict[str, Any]) -> dict[str, Any]:
    """Return those values of a result's `encoder` that baselines depend on."""
    return {name: encoder[name] for name in SHAPE}
