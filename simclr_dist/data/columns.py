"""Hold the keys of a manifest as bytes. Count the images' sides, and compute the digest, from columns that come in parts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Keys:
    """Names of images as text, each decoded when it is asked for. A slice or an array of rows gives an array of text."""

    def __init__(self, begins: NDArray[np.int64], ends: NDArray[np.int64], text: NDArray[np.uint8]) -> None:
        self.parts = begins, ends, text

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, list | np.ndarray):
            rows = np.arange(len(self))[rows]  # of a mask, too
            return np.array([self[row] for row in rows], dtype=np.str_)
        if isinstance(rows, slice):
            return np.array(self.only(rows).tolist(), dtype=np.str_)
        begins, ends, text = self.parts
        return text[begins[rows] : ends[rows]].tobytes().decode(errors="replace")

    def only(self, rows: slice | list[int] | NDArray[Any]) -> "Keys":
        begins, ends, text = self.parts
        return Keys(begins[rows], ends[rows], text)

    def tolist(self) -> list[str]:
        begins, ends, text = self.parts
        first = int(begins.min(initial=len(text)))
        whole = text[first : int(ends.max(initial=first))].tobytes()
        places = zip((begins - first).tolist(), (ends - first).tolist(), strict=True)
        return [whole[begin:end].decode(errors="replace") for begin, end in places]


class Sides:
    """The median of images' shorter sides, and the sum of their pixels."""

    def __init__(self) -> None:
        self._short: Counter[int] = Counter()
        self.pixels = 0

    def add(self, width: NDArray[np.int32], height: NDArray[np.int32]) -> None:
        values, counts = np.unique(np.minimum(width, height), return_counts=True)
        self._short.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.pixels += int((width.astype(np.int64) * height).sum())

    def median(self) -> float:
        values = sorted(self._short)
        ends = np.cumsum([self._short[value] for value in values])
        low, high = ends.searchsorted([(ends[-1] - 1) // 2, ends[-1] // 2], side="right").tolist()
        return float(values[low] + values[high]) / 2


def content_digest(
    keys: Iterable[list[str]], classes: Sequence[str], hashes: Iterable[NDArray[np.uint8]], labels: Iterable[NDArray[np.int64]]
) -> str:
    """Compute `Manifest.digest` of images whose columns come in parts.

    It is the sha256 of json.dumps([keys, classes]), hashes and labels.
    """
    digest, between = hashlib.sha256(b"[["), b""
    for part in filter(None, keys):
        digest.update(between + json.dumps(part)[1:-1].encode())
        between = b", "
    digest.update(b"], " + json.dumps(list(classes)).encode() + b"]")
    for hashed in hashes:
        digest.update(np.ascontiguousarray(hashed).data)
    for label in labels:
        digest.update(label.astype("<i8").data)
    return digest.hexdigest()
