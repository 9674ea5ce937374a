"""Keep a result in a JSON file. No number of an older one of its name is lost, unless it was measured anew."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.system.errors import DamagedError, DataError, reason_of, refusing
from simclr_dist.system.files import fitting, write_atomically

Result = dict[str, Any]
FORMAT = "simclr_dist evaluation 3"
UNTRAINED, TRAINED = "untrained", "trained"
SETS = {"train": "training", "val": "validation", "test": "test"}  # in a result, and for people
NAMES = {"knn": "kNN", "linear": "linear", "sgd": "SGD", "mlp": "MLP", "finetune": "finetuned"}
SHAPE = ("name", "width", "stem", "layer", "feature_size", "image_size", "mean", "std")  # of an encoder: its baselines' too
_PARTS: dict[str, dict[str, Any]] = {
    "encoder": {"file": str, "sha256": str, "step": int, **dict.fromkeys(SHAPE, object)},
    "train": {"digest": str, "labelled?": int}, "test": {"digest": str},
    "settings": {"layer": str, "precision": str, "seed": object},
    "protocols": {}, "seconds": {},
}  # fmt: skip


def title(protocol: str) -> str:
    """Name what was measured for people. `protocol` is its name in a result, with the share of the labels below 1."""
    name, _, share = protocol.partition("@")
    return NAMES[name] + (f", {100 * float(share):g} % of the labels" if share else "")


class UnwrittenError(DataError):
    """A file of an evaluation cannot be made. `result` has the numbers; `stored` is the path of its JSON, where it is there."""

    def __init__(self, line: str, result: Result, *, stored: Path | None = None) -> None:
        super().__init__(line + (f"; the result itself is in {stored}" if stored else ""))
        self.result, self.stored = result, stored


def claim(path: Path, *, named: bool = False) -> None:
    """Make the result's folder before the work begins. Raises DataError where the result could not be written.

    A path that the user has `named` may be that of an encoder, or of its card: nothing but a result is overwritten there.
    """
    with refusing(f"{path}: cannot make the result's folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; --out names the result's file")
    if named and path.suffix != ".json":
        raise DataError(f"{path}: a result is a .json file; name one with --out")
    if named and path.exists() and not _is_result(path):
        raise DataError(f"{path}: is there and is no result of an evaluation; name another file with --out")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: its folder cannot be written to")


def write_result(path: Path, result: Result) -> str:
    """Write JSON atomically. The older result is kept, with its page, unless each of its numbers is in `result`.

    An older result of other images, another encoder or other settings becomes NAME.kept-XXXXXXXX.json. The eight digits are of
    what it measured, so the newest of each measurement is there. A damaged one becomes NAME.json.damaged-XXXXXXXX. Returns the
    line that says so, or ''. Raises UnwrittenError when the disk does not take the result; the older one is then where it was.
    """
    line = ""

    def keep() -> None:
        nonlocal line
        before, content = _read(path)
        if before is None and b'"top1": ' in content:
            name, what = f"{path.name}.damaged-{_digits(content)}", "a damaged result"
        elif before is not None and not _supersedes(result, before):
            digits = _digits(json.dumps(_measured(before), sort_keys=True).encode())
            name, what = f"{path.stem}.kept-{digits}.json", "a result of other images, weights or settings"
        else:
            return
        if (page := path.with_suffix(".html")).exists():
            page.replace(path.with_name(f"{name.removesuffix('.json')}.html"))  # first: where it may not, all stays as it was
        path.replace(path.with_name(name))
        line = f"{path}: there was {what}: kept as {name}"

    try:
        write_atomically(path, as_json(result).encode() + b"\n", allowed=keep)
    except OSError as error:
        raise UnwrittenError(f"{path}: cannot write the result: {reason_of(error)}", result) from None
    return line


def read_result(path: Path) -> Result:
    """Read the result at `path`. Returns {} when there is none of this format. Raises DamagedError for a damaged one."""
    try:
        content = path.read_bytes()
        if content.lstrip().startswith(b"{") and FORMAT.encode() not in content[:200]:  # its first key: others need no reading
            return {}
        result = fitting(json.loads(content), {"format": str, "classes": int, **dict.fromkeys(_PARTS, dict)})
        for name, kinds in _PARTS.items():
            fitting(result[name], kinds)
        for part in result["protocols"].values():
            fitting(fitting(part, {"settings": dict, "results": dict})["results"], {TRAINED: dict})
            for row in part["results"].values():
                fitting(row, {"top1": int | float})
        return result
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged or cannot be read ({reason_of(error)}); evaluate its encoder again") from None


def as_json(value: Any, indent: str = "") -> str:
    """Format JSON with a line for each key. A row of a table (a list of plain values, or a dict in a list) takes one line.

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


def _is_result(path: Path) -> bool:
    """Tell by its first key whether a file is a result. So a large file need not be read. True also for an empty one."""
    try:
        with path.open("rb") as file:
            ours = r'\Z|\s*{\s*"format": "simclr_dist (evaluation|finetuning|comparison)'
            return bool(re.match(ours, file.read(200).decode()))
    except (OSError, ValueError):
        return False


def _is_flat(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not any(isinstance(part, dict | list | tuple) for part in parts)


def _read(path: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Read a result of any format, with the file's bytes. None stands for what is no JSON object."""
    value, content = None, b""
    with suppress(OSError, ValueError, RecursionError):
        content = path.read_bytes()
        value = json.loads(content)
    return value if isinstance(value, dict) else None, content


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _supersedes(result: Result, before: dict[str, Any]) -> bool:
    """Tell whether `result` has each number of `before`, measured as it was."""
    now, then = _measured(result), _measured(before)
    pairs = [(part, now["protocols"].get(name)) for name, part in then["protocols"].items()]
    again = all(new and new["settings"] == old["settings"] and set(old["rows"]) <= set(new["rows"]) for old, new in pairs)
    return again and now["of"] == then["of"] and then["settings"].items() <= now["settings"].items()


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a result's numbers depend on. Some of it may be missing: the result may be of an older format."""
    parts = _dict(result, "protocols")
    protocols: dict[str, dict[str, Any]] = {}
    for name in parts:
        part = _dict(parts, name)
        protocols[name] = {"settings": part.get("settings"), "rows": sorted(_dict(part, "results"))}
    if _dict(result, "untrained_signals"):
        protocols["signals"] = {"settings": None, "rows": [UNTRAINED]}
    changes_nothing = set[str]() if "runs" in result else {"batch_size", "workers"}  # a finetuning learns from its batches
    if "runs" not in result and not any(UNTRAINED in part["rows"] for part in protocols.values()):
        changes_nothing.add("seed")  # of its weights
    sets = [part for part in ("train", "test", "val") if part != "val" or part in result]
    encoder, digests = _dict(result, "encoder"), [_dict(result, part).get("digest") for part in sets]
    # Of a published checkpoint one file may hold several encoders, and fit several shapes.
    which = [*map(encoder.get, ("sha256", "projector_sha256", *SHAPE)), _dict(encoder, "weights").get("prefix")]
    compared = [result.get(name) for name in ("encoders", "command")] if "verdicts" in result else []
    return {
        "of": json.dumps([result.get("format"), which, digests, compared]),
        "settings": {name: str(value) for name, value in _dict(result, "settings").items() if name not in changes_nothing},
        "protocols": protocols,
    }


def _dict(result: dict[str, Any], name: str) -> dict[str, Any]:
    part = result.get(name)
    return part if isinstance(part, dict) else {}
