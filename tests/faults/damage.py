"""Kinds of damage to a file of ours. Of lines of JSON, or of the values in an object, it comes to one in the middle."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

GARBAGE = bytes(range(256)) * 3
# Not of the content, but of the file's place.
OF_A_PLACE = ("folder", "dangling", "unreadable")


def _values(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """Change every value of an object, be it JSON, YAML or lines of JSON."""

    def damaged(content: bytes) -> bytes:
        lines = content.splitlines() if content.startswith(b"{") and content.count(b"\n{") else [content]
        objects = ({key: change(value) for key, value in yaml.safe_load(line).items()} for line in lines)
        return b"".join(json.dumps(values).encode() + b"\n" for values in objects)

    return damaged


def _numbers(number: float) -> Callable[[bytes], bytes]:
    return _values(lambda value: number if isinstance(value, int | float) else value)


_CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda _: GARBAGE,
    "no text": lambda content: b"\xff\xfe" + content,
    "list": lambda _: b"[1]\n",
    "number": lambda _: b"7\n",
    "null": lambda _: b"null\n",
    "keys": lambda _: b"{}\n",
    "deep": lambda _: b"[" * 10_000 + b"\n",
    "types": _values(lambda _: ["x"]),
    "nulls": _values(lambda _: None),
    "huge": _numbers(10**30),
    "future": _numbers(1e300),
    "negative": _numbers(-5),
    "nan": _numbers(float("nan")),
}
DAMAGES = (*_CONTENT, *OF_A_PLACE)  # the last one needs a user who is not root


def damage(path: Path, kind: str, *, whole: bool = False) -> None:
    """Do it. `whole`: to all of a file of lines."""
    if kind == "unreadable":
        path.chmod(0)
        return
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("not/there")
    elif path.suffix == ".jsonl" and not whole:
        lines = content.splitlines(keepends=True)
        lines[len(lines) // 2] = _CONTENT[kind](lines[len(lines) // 2])
        path.write_bytes(b"".join(lines))
    else:
        path.write_bytes(_CONTENT[kind](content))
    if path.exists():
        os.utime(path, (1e9, 1e9))  # long ago
