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

_NVIDIA, _IMAGES = "https://www.nvidia.com/", "https://images.nvidia.com/"
_SHEETS = {
    "t4": f"{_NVIDIA}content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
    "volta": f"{_IMAGES}content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    "a10": f"{_NVIDIA}content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
    "ga102": f"{_NVIDIA}content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf",
    "a100": f"{_NVIDIA}content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    "rtx3060": "https://technologyforyou.org/nvidia-designed-its-new-rtx-3060-gpu-to-get-gtx-1060-owners-to-upgrade",
    "rtx4060": "https://pangoly.com/en/blog/the-mid-range-makes-a-comeback-with-nvidias-rtx-4060-and-amds-rx-7600/192",
    "ada": f"{_IMAGES}aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    "l4": f"{_IMAGES}aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf",
    "l40s": "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
    "h100": "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306",
    "h200": f"{_NVIDIA}en-us/data-center/h200/",
    "b200": "https://www.primeline-solutions.com/media/categories/server/nach-gpu/nvidia-hgx-h200/nvidia-blackwell-b200-datasheet.pdf",
    "rtx50": f"{_IMAGES}aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    "mi300x": "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
}
# Memory in MiB as the driver reports it; peak dense TFLOP/s (SXM where there are several) in 16 bit summed in float32, float32
# without TF32 (which the trainer turns off), float64 without tensor cores. What NVIDIA announced of the x060 is sparse, and
# summed otherwise: a quarter of the RTX 3060's counts here, an eighth (8 bit) of the 4060s'.
_GPUS: dict[str, tuple[int, float, float, float, str]] = {
    "t4": (15_360, 65.0, 8.1, 0.25, "t4"), "v100-16": (16_160, 125.0, 15.7, 7.8, "volta"),
    "v100-32": (32_510, 125.0, 15.7, 7.8, "volta"), "rtx3060": (12_288, 25.3, 12.7, 0.2, "rtx3060"),
    "rtx3070": (8_192, 40.6, 20.3, 0.32, "ga102"), "rtx3080": (10_240, 59.5, 29.8, 0.47, "ga102"),
    "rtx3090": (24_576, 71.0, 35.6, 0.56, "ga102"), "a6000": (49_140, 154.8, 38.7, 0.6, "ga102"),
    "rtx4060": (8_188, 30.3, 15.0, 0.24, "rtx4060"), "rtx4060ti-16": (16_380, 44.1, 22.0, 0.34, "rtx4060"),
    "rtx4080": (16_376, 97.5, 48.7, 0.76, "ada"), "rtx4090": (24_564, 165.2, 82.6, 1.3, "ada"),
    "rtx5070": (12_227, 61.7, 30.9, 0.48, "rtx50"), "rtx5070ti": (16_303, 87.9, 43.9, 0.69, "rtx50"),
    "rtx5080": (16_303, 112.6, 56.3, 0.88, "rtx50"), "rtx5090": (32_607, 209.5, 104.8, 1.6, "rtx50"),
    "a10": (23_028, 125.0, 31.2, 0.97, "a10"), "l4": (23_034, 121.0, 30.3, 0.47, "l4"),
    "l40s": (46_068, 362.0, 91.6, 1.4, "l40s"), "a100-40": (40_536, 312.0, 19.5, 9.7, "a100"),
    "a100-80": (81_251, 312.0, 19.5, 9.7, "a100"), "h100": (81_079, 989.0, 67.0, 34.0, "h100"),
    "h200": (143_167, 989.0, 67.0, 34.0, "h200"), "b200": (182_642, 2250.0, 75.0, 37.0, "b200"),
    "mi300x": (196_592, 1307.4, 163.4, 81.7, "mi300x"),
}  # fmt: skip
_WITHOUT_BF16 = ("t4", "v100-16", "v100-32")
_COLUMN = {"bf16": 1, "fp16": 1, "fp32": 2, "fp64": 3}
_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8, "MB/s": 1e6, "GB/s": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Gpu:
    """Holds memory in bytes, and peak FLOP/s by `precision`. `sheet` is where they stand; both are empty if unknown."""

    name: str
    memory: float
    peak: dict[str, float]
    sheet: str = ""

    @property
    def usable(self) -> float:
        """Return the bytes that tensors can have."""
        return (self.memory - RESERVED_BYTES) * (1 - GAPS)


@dataclass(frozen=True)
class Measured:
    """Holds how long some steps took on `ranks` ranks, and where."""

    steps: int
    seconds: float
    ranks: int
    where: str


@dataclass(frozen=True)
class Machines:
    """Assumptions about the machines; bytes, seconds."""

    gpu: Gpu | None = None
    bandwidth: float | None = None  # of the slowest link of the ring
    latency: float = 20e-6
    utilisation: float | None = None  # None: UTILISATION
    images_per_second: float | None = None  # measured on one rank, with the config's micro-batches
    on_cuda: bool = True
    measured: Measured | None = None  # of the config itself, exchange and all


def gpu(text: str) -> Gpu:
    """Look up a GPU by name (`h100`) or memory (`24GiB`). Raises ConfigError."""
    name = re.sub(r"nvidia|geforce|tesla|amd|instinct|rtx(?= ?a)|[ _]", "", text.lower())  # as the driver says it
    if row := _GPUS.get(name):
        peak = {key: float(row[at]) * 1e12 for key, at in _COLUMN.items() if key != "bf16" or name not in _WITHOUT_BF16}
        return Gpu(name, row[0] * 2**20, peak, _SHEETS[row[-1]])
    size = _number(text, _SIZES)
    if size is None:
        same_number = [each for each in _GPUS if re.findall(r"[0-9]+", each)[0] in name or sorted(each) == sorted(name)]
        near = suggest(name, [each for each in same_number if each.startswith(name)] or same_number)
        near = near or suggest(f"rtx{name}", same_number)
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
