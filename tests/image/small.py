"""A base image of a few kilobytes, with this machine's own programs mounted into it, and wheels of what is installed here.

So docker/Dockerfile can be built in seconds and without a network: every instruction runs for real, in real pip with the real
constraints. What is not real is `apt-get`, whose packages are taken to be there, and packages of more than a few megabytes,
which are installed without their files.
"""

import base64
import hashlib
import importlib.metadata
import os
import shutil
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_WHOLE_UP_TO = 4 * 2**20  # bytes
_PYTHON = Path(sys.base_prefix)


def why_not() -> str:
    """Why this machine's programs cannot serve as a base image's, in a line; empty where they can."""
    if not Path("/bin").is_symlink():
        return "needs a system that has all its programs below /usr"
    return "" if shutil.which("useradd", path="/usr/sbin") else "not installed: useradd"


def make_root(root: Path) -> dict[str, str]:
    """The base image's files; returns its environment."""
    for name in ("etc", "usr", "var/lib/apt/lists", "var/cache/apt", "var/cache/ldconfig", "var/log", "stand-ins"):
        (root / name).mkdir(parents=True)
    (root / "var/lib/apt/lists/a-list").write_text("packages\n")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            (root / path.name).symlink_to(path.readlink())
    for name in ("ld.so.cache", "login.defs"):
        shutil.copy(Path("/etc", name), root / "etc")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    apt = root / "stand-ins/apt-get"
    apt.write_text('#!/bin/sh\necho "$@" >> /stand-ins/calls\n')
    apt.chmod(0o755)
    return {"PATH": f"/stand-ins:{_PYTHON / 'bin'}:/usr/sbin:/usr/bin"}


def volumes() -> list[str]:
    """What of this machine is mounted, for reading only."""
    folders = ["/usr"] if _PYTHON.is_relative_to("/usr") else ["/usr", str(_PYTHON)]
    return [f"{folder}:{folder}:ro" for folder in folders]


def make_wheels(folder: Path, names: list[str]) -> None:
    """Wheels of these packages and of all that they need, as they are installed here."""
    folder.mkdir()
    todo, done = [Requirement(name) for name in names], set[tuple[str, frozenset[str]]]()
    while todo:
        required = todo.pop()
        key = canonicalize_name(required.name), frozenset(required.extras)
        if key in done:
            continue
        done.add(key)
        distribution = importlib.metadata.distribution(required.name)
        _pack(distribution, folder)
        extras = ("", *required.extras)
        needed = map(Requirement, distribution.requires or [])
        todo += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def _pack(distribution: importlib.metadata.Distribution, folder: Path) -> None:
    files = {str(file): Path(os.fspath(file.locate())) for file in distribution.files or [] if ".." not in file.parts}
    about = next(name.partition("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
    left_out = [f"{about}/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")]
    files = {name: file for name, file in files.items() if not name.endswith(".pyc") and name not in left_out}
    if sum(file.stat().st_size for file in files.values()) > _WHOLE_UP_TO:
        files = {name: file for name, file in files.items() if name in (f"{about}/METADATA", f"{about}/WHEEL")}
    tags = [line.partition(": ")[2] for line in files[f"{about}/WHEEL"].read_text().splitlines() if line.startswith("Tag: ")]
    tag = "-".join(".".join(sorted(set(parts))) for parts in zip(*(tag.split("-") for tag in tags), strict=True))
    with zipfile.ZipFile(folder / f"{about.removesuffix('.dist-info')}-{tag}.whl", "w") as wheel:
        record = []
        for name, file in files.items():
            content = file.read_bytes()
            wheel.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f'"{name}",sha256={digest},{len(content)}\n')
        wheel.writestr(f"{about}/RECORD", f"{''.join(record)}{about}/RECORD,,\n")
