"""Decide the arithmetic of an encoder. fp32 keeps float32's digits everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from simclr_dist.system.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_problem(precision: str, device: torch.device) -> str:
    """Return why a device cannot compute so, with the cure; else ''."""
    if precision == "tf32" and device.type != "cuda":
        return f"precision: tf32: {device.type} has no TF32; take fp32"
    if precision in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name, cure = torch.cuda.get_device_name(device), "take fp32, or fp16 for training"
        return f"precision: {precision}: {name} is older than compute capability 8.0 and has none; {cure}"
    return ""


def settle(precision: str, device: torch.device) -> None:
    """Let this process's convolutions round to TF32, or not. Raises ConfigError for what the device has not."""
    if problem := precision_problem(precision, device):
        raise ConfigError(problem)
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch allows it by itself, but in no other product


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in this precision inside; afterwards torch's setting is what it was. Raises as `settle` does."""
    before = torch.backends.cudnn.allow_tf32
    settle(precision, device)
    try:
        with torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
