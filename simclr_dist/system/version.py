"""`simclr-dist --version`: the program and what it runs on, read from files, so that it answers at once."""

import ast
import importlib.metadata
import platform
from pathlib import Path

from simclr_dist import __version__
from simclr_dist.system.provenance import revision

_DRIVER = Path("/proc/driver/nvidia")


def describe() -> str:
    """The version, with the revision of a git checkout, and a line each for Python, torch, CUDA, NCCL, GPUs and the platform.

    What is not installed is said; nothing is imported, and no GPU is touched.
    """
    found = revision()
    git = f" (git {found.commit[:12]}{', changed since' if found.changed else ''})" if found else ""
    cuda = _built_for("torch")
    rows = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": _installed("torch") + (f", {cuda}" if cuda else ""),
        "torchvision": _installed("torchvision"),
        "triton": _installed("triton"),
        "nccl": next(
            (f"{d.version} ({d.name})" for d in importlib.metadata.distributions() if d.name.startswith("nvidia-nccl")), "none"
        ),
        "gpus": ", ".join(_gpus()) or "none",
        "driver": _driver() or "none",
        "platform": platform.platform(),
    }
    return "\n".join([f"simclr-dist {__version__}{git}", *(f"{name:12s} {value}" for name, value in rows.items())])


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built_for(name: str) -> str | None:
    """What a build of torch computes on, as its version.py says; None when that cannot be read."""
    try:
        file = Path(str(importlib.metadata.distribution(name).locate_file(f"{name}/version.py")))
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, SyntaxError):
        return None
    values: dict[str, str] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(str(value))):
                values[name] = value
            case ast.AnnAssign(target=ast.Name(name), value=ast.Constant(str(value))):
                values[name] = value
    for key, title in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if key in values:
            return f"{title} {values[key]}"
    return "CPU only"


def _gpus() -> list[str]:
    """Names of NVIDIA's GPUs, as the driver tells them."""
    names = []
    for file in sorted(_DRIVER.glob("gpus/*/information")):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def _driver() -> str | None:
    """The version in a line like `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 ...`."""
    try:
        first = (_DRIVER / "version").read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word.count(".") >= 1 and word.replace(".", "").isdecimal()), None)
