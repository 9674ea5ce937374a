"""Compile colour for this machine's CPU.

It has the values of `colour_views`, in two or three passes over a view instead of dozens.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr_dist.data.views.colour import Colour, half_kernels
from simclr_dist.data.views.draws import ViewDraws, ViewSettings
from simclr_dist.system.errors import ConfigError, printable, refusing
from simclr_dist.system.machine import cpp_compiler

_SOURCE = Path(__file__).with_name("colour.cpp")
# Sums may be reordered, as pixels are no NaN. Not -ffast-math: it would change how the whole process rounds tiny numbers.
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffinite-math-only", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)


class _Draws(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("jitter", "gray", "solarize", "order", "reach", "factors", "taps")]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("views", "channels", "size", "radius", "threads")),
        *((name, ctypes.c_void_p) for name in ("mean", "scale")),
    ]


def compile_colour() -> Colour:
    """Compile `colour_views` for CPUs. It takes a second. Raises ConfigError where that cannot be."""
    compiler = cpp_compiler()
    cure = "set TMPDIR to a folder from which programs may be run, or compile: false"
    # Of one rank alone, maybe: as a ConfigError it reaches the others.
    refused = refusing("compile: true: cannot load what was compiled", ConfigError, f"; {cure}")
    # Not kept: it is only good for this kind of processor, and nobody has to trust a file that lies about.
    # (NFS keeps what is loaded under another name, in a folder that cannot be removed then.)
    with refused, tempfile.TemporaryDirectory(prefix="simclr_dist-", ignore_cleanup_errors=True) as folder:
        library = Path(folder, "colour.so")
        _compile(compiler, library)
        native = ctypes.CDLL(str(library)).simclr_colour
    native.restype = None

    def colour(crops: Tensor, draws: ViewDraws, settings: ViewSettings, out: Tensor | None = None) -> Tensor:
        count, channels, size, _ = crops.shape
        assert len(draws.jitter) == count, "one draw for each crop"
        assert len(settings.mean) == channels, "one mean for each channel"
        crops = crops.contiguous()
        views = torch.empty(crops.shape) if out is None else out
        assert crops.dtype in (torch.uint8, torch.uint16), crops.dtype
        assert views.is_contiguous(), "without gaps"
        assert (views.shape, views.dtype) == (crops.shape, torch.float32), (views.shape, views.dtype)
        taps = half_kernels(draws.blur_sigma, size // 10 // 2)
        reach = np.count_nonzero(taps[:, 1:], axis=1).astype(np.int64)
        jitter, gray, solarize = (np.ascontiguousarray(field) for field in (draws.jitter, draws.gray, draws.solarize))
        order, factors = np.ascontiguousarray(draws.order), np.ascontiguousarray(draws.factors)
        mean, scale = np.array(settings.mean, np.float32), (1 / np.array(settings.std)).astype(np.float32)
        terms = _Draws(*(field.ctypes.data for field in (jitter, gray, solarize, order, reach, factors, taps)))
        threads = max(1, torch.get_num_threads() - 1)  # as `colour_views`: a core is left to the reading process
        shape = _Shape(count, channels, size, taps.shape[1] - 1, threads, mean.ctypes.data, scale.ctypes.data)
        places = ctypes.c_void_p(crops.data_ptr()), ctypes.c_void_p(views.data_ptr())
        native(ctypes.c_int64(8 * crops.element_size()), *places, ctypes.byref(shape), ctypes.byref(terms))
        return views

    return colour


def _compile(compiler: str, library: Path) -> None:
    command, plain = [compiler, *_FLAGS, str(_SOURCE), "-o", str(library)], {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=plain, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = done.stderr.splitlines()
        why = next((line for line in said if "error" in line), said[-1] if said else f"exit code {done.returncode}")
        raise ConfigError(
            f"compile: true: {compiler} failed: {printable(why)}; name another compiler in CXX, or set compile: false"
        )
