"""Build the text of `simclr-dist --version` from files. So it comes at once."""

import importlib.metadata
import platform
import re
from pathlib import Path

from simclr_dist import __version__
from simclr_dist.system.provenance import revision

_DRIVER = Path("/proc/driver/nvidia")


def describe() -> str:
    """Describe this program, its libraries, GPUs and platform. Imports no package and touches no GPU."""
    checkout = revision()
    git = f" (git {checkout.commit[:12]}{', changed since' if checkout.changed else ''})" if checkout else ""
    cuda = _built_for("torch")
    information = [line for file in sorted(_DRIVER.glob("gpus/*/information")) for line in _lines(file)]
    driver = [word for line in _lines(_DRIVER / "version")[:1] for word in line.split()]
    rows = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": _installed("torch") + (f", {cuda}" if cuda else ""),
        "torchvision": _installed("torchvision"),
        "triton": _installed("triton"),
        "nccl": next(
            (f"{d.version} ({d.name})" for d in importlib.metadata.distributions() if d.name.startswith("nvidia-nccl")), "none"
        ),
        # From the driver's files: names, and a line like `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun ...`.
        "gpus": ", ".join(line.partition(":")[2].strip() for line in information if line.startswith("Model:")) or "none",
        "driver": next((word for word in driver if "." in word and word.replace(".", "").isdecimal()), "none"),
        "platform": platform.platform(),
    }
    return "\n".join([f"simclr-dist {__version__}{git}", *(f"{name:12s} {value}" for name, value in rows.items())])


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built_for(name: str) -> str | None:
    """Return what a torch build computes on, by its version.py. None if unreadable."""
    try:
        file = Path(str(importlib.metadata.distribution(name).locate_file(f"{name}/version.py")))
        text = file.read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return None
    for key, title in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if match := re.search(rf"^{key}\b[^=\n]*= *['\"](.+)['\"]", text, re.MULTILINE):
            return f"{title} {match[1]}"
    return "CPU only"


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
