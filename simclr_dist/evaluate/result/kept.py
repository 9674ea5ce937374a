"""The file of a result, and what becomes of an older one of the same name: no number that was not measured anew is lost."""

import hashlib
import json
from pathlib import Path
from typing import Any

from simclr_dist.evaluate.result.report import UNTRAINED, Result, UnwrittenError, as_json
from simclr_dist.system.files import write_atomically

_FILES = (("encoder", "sha256"), ("train", "digest"), ("test", "digest"))


def write_result(path: Path, result: Result) -> str:
    """Write JSON atomically; what it replaces is kept beside it, with its page, unless each number of it is in `result`.

    An older result of other images, another encoder or other settings becomes NAME.kept-XXXXXXXX.json, eight digits of what it
    measured: of each measurement the newest is there. Returns the line that says so, or ''. Raises UnwrittenError when the disk
    does not take the result; the older one is then where it was.
    """
    kept: Path | None = None

    def keep() -> None:
        nonlocal kept
        if (before := _read(path)) is not None and not _supersedes(result, before):
            kept = path.with_name(f"{path.stem}.kept-{_digest(before)}.json")
            path.replace(kept)
            if (page := path.with_suffix(".html")).exists():
                page.replace(kept.with_suffix(".html"))

    try:
        write_atomically(path, as_json(result).encode() + b"\n", allowed=keep)
    except OSError as error:
        why = f"{path}: cannot write the result: {error.strerror or error}"
        raise UnwrittenError(why, result, stored=False) from None
    return f"{path}: there was a result of other images, weights or settings: kept as {kept.name}" if kept else ""


def _read(path: Path) -> dict[str, Any] | None:
    """Of any format; None for what has no number, as it is not JSON."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _supersedes(result: Result, before: dict[str, Any]) -> bool:
    """Whether each number of `before` is measured in `result` as it was there."""
    now, then = _measured(result), _measured(before)
    return (
        now["of"] == then["of"]
        and then["settings"].items() <= now["settings"].items()
        and all(
            name in now["protocols"]
            and now["protocols"][name]["settings"] == part["settings"]
            and set(part["rows"]) <= set(now["protocols"][name]["rows"])
            for name, part in then["protocols"].items()
        )
    )


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """What the numbers of a result depend on, as far as it says so: it may be of an older format."""
    protocols = {
        name: {"settings": part.get("settings"), "rows": sorted(_dict(part, "results"))}
        for name, part in _dict(result, "protocols").items()
    }
    changes_nothing = set[str]() if "runs" in result else {"batch_size", "workers"}  # a finetuning learns from its batches
    if "runs" not in result and not any(UNTRAINED in part["rows"] for part in protocols.values()):
        changes_nothing.add("seed")  # of its weights
    return {
        "of": [result.get("format"), *(_dict(result, name).get(key) for name, key in _FILES)],
        "settings": {name: str(value) for name, value in _dict(result, "settings").items() if name not in changes_nothing},
        "protocols": protocols,
    }


def _dict(result: dict[str, Any], name: str) -> dict[str, Any]:
    found = result.get(name)
    return found if isinstance(found, dict) else {}


def _digest(before: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_measured(before), sort_keys=True).encode()).hexdigest()[:8]
