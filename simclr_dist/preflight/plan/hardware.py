"""Look up speed and memory of GPUs and networks. By name or assumed; needs no torch."""

import re
from dataclasses import dataclass

from simclr_dist.config.strict_yaml import suggest
from simclr_dist.system.errors import ConfigError

GIB = 2**30
# GPU memory that tensors cannot have: context, kernels, cuDNN's work space, NCCL's buffers; and the share that the allocator
# loses in gaps. Assumed, not measured.
RESERVED_BYTES, GAPS = 1.5 * GIB, 0.05
# Share of the peak that a ResNet's training reaches, assumed: tensor cores wait for memory at BatchNorm and ReLU.
UTILISATION = {"bf16": 0.2, "fp16": 0.2, "fp32": 0.5, "fp64": 0.5}

# Memory in MiB as the driver reports it; peak dense TFLOP/s (data sheets, SXM where there are several) in 16 bit, float32
# without TF32 (which the trainer turns off), float64 without tensor cores.
_GPUS: dict[str, tuple[int, float, float, float]] = {
    "t4": (15_360, 65.0, 8.1, 0.25),
    "v100-16": (16_160, 125.0, 15.7, 7.8),
    "v100-32": (32_510, 125.0, 15.7, 7.8),
    "rtx3090": (24_576, 71.0, 35.6, 0.56),
    "rtx4090": (24_564, 165.0, 82.6, 1.3),
    "a10": (23_028, 125.0, 31.2, 0.97),
    "l4": (23_034, 121.0, 30.3, 0.47),
    "l40s": (46_068, 362.0, 91.6, 1.4),
    "a100-40": (40_536, 312.0, 19.5, 9.7),
    "a100-80": (81_251, 312.0, 19.5, 9.7),
    "h100": (81_079, 989.0, 67.0, 34.0),
    "h200": (143_167, 989.0, 67.0, 34.0),
    "b200": (182_642, 2250.0, 75.0, 37.0),
}
_WITHOUT_BF16 = ("t4", "v100-16", "v100-32")
_COLUMN = {"bf16": 1, "fp16": 1, "fp32": 2, "fp64": 3}
_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8, "MB/s": 1e6, "GB/s": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, and peak FLOP/s by `precision` (empty if unknown)."""

    name: str
    memory: float
    peak: dict[str, float]

    @property
    def usable(self) -> float:
        """Return the bytes that tensors can have."""
        return (self.memory - RESERVED_BYTES) * (1 - GAPS)


@dataclass(frozen=True)
class Machines:
    """Assumptions about the machines; bytes, seconds."""

    gpu: Gpu | None = None
    bandwidth: float | None = None  # of the slowest link of the ring
    latency: float = 20e-6
    utilisation: float | None = None  # None: UTILISATION
    images_per_second: float | None = None  # measured on one rank, with the config's micro-batches
    on_cuda: bool = True


def gpu(text: str) -> Gpu:
    """Look up a GPU by name (`h100`) or memory (`24GiB`). Raises ConfigError."""
    if text.lower() in _GPUS:
        name = text.lower()
        row = _GPUS[name]
        peak = {precision: row[column] * 1e12 for precision, column in _COLUMN.items()}
        if name in _WITHOUT_BF16:
            del peak["bf16"]
        return Gpu(name, row[0] * 2**20, peak)
    size = _number(text, _SIZES)
    if size is None:
        near = suggest(text.lower(), list(_GPUS))
        raise ConfigError(f"--gpu: {text!r} is unknown{near}; known: {', '.join(_GPUS)}, or its memory, as 24GiB")
    if size <= RESERVED_BYTES:
        raise ConfigError(f"--gpu: {text!r} is less than the {RESERVED_BYTES / GIB:g} GiB that CUDA and NCCL take themselves")
    return Gpu(text, size, {})


def bandwidth(text: str) -> float:
    """Parse `25Gbit`, `200Mbit`, `300GB/s` to bytes a second. Raises ConfigError."""
    # A small b is a bit: Gb/s and GB/s are not one rate, and gb/s is neither.
    rate = _number(text if text.strip().endswith("/s") else text.lower(), _RATES)
    if not rate:
        raise ConfigError(f"--bandwidth: {text!r} is not a rate like 25Gbit, 200Mbit or 300GB/s")
    return rate


def seconds(text: str) -> float:
    """Parse `20us`, `0.3ms` to seconds; raises ConfigError."""
    time = _number(text, _TIMES)
    if time is None:
        raise ConfigError(f"--latency: {text!r} is not a time like 20us or 0.3ms")
    return time


def _number(text: str, units: dict[str, float]) -> float | None:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(\S+)", text.strip())
    return float(match[1]) * units[match[2]] if match and match[2] in units else None
