"""Colour by Triton kernels: the values of `colour_views`, how many launches they take, and what they are compiled to."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fake_cuda import DEVICE, Launches, fake_cuda
from simclr_dist.data.views import colour
from test_compiled_views import draw, of_channels

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from simclr_dist.data.views import colour_cuda


def test_their_views_are_colour_views(tmp_path: Path) -> None:
    """On a GPU as they are; without one in Triton's interpreter, which takes minutes for more than this."""
    code = """
import torch
from test_compiled_views import crops_of, draw, of_channels
from simclr_dist.data.views import colour, colour_cuda
from simclr_dist.data.views.draws import ViewDraws
device = "cuda" if torch.cuda.is_available() else "cpu"
for count, size, channels, dtype, changed in (
    (9, 1, 3, torch.uint8, {}), (14, 7, 3, torch.uint8, {}), (14, 33, 3, torch.uint8, {}), (9, 40, 3, torch.uint16, {}),
    (6, 33, 1, torch.uint8, {}), (5, 20, 2, torch.uint16, {}), (3, 33, 4, torch.uint8, {}),
    (5, 33, 3, torch.uint8, {"jitter": 0.0}), (2, 33, 3, torch.uint8, {"blur": 0.0}), (0, 33, 3, torch.uint8, {}),
    (2, 70, 3, torch.uint8, {"blur": 1.0, "blur_sigma": (12.0, 12.0)}),
):
    settings = of_channels(channels, size, solarize=0.3, **changed)
    crops, draws = crops_of(count, size, channels, dtype), draw(settings, count)
    there = crops.to(device)
    before = there.clone()
    ours = colour_cuda.colour_views(there, draws, settings)
    expected = colour.colour_views(crops, draws, settings)
    assert ours.shape == expected.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.allclose(ours.cpu(), expected, rtol=0, atol=1e-4), (size, channels, (ours.cpu() - expected).abs().max())
    assert torch.equal(there, before)
    room = torch.full_like(ours, torch.nan)
    assert colour_cuda.colour_views(there.contiguous(memory_format=torch.channels_last), draws, settings, room) is room
    assert torch.equal(room, ours), "as decoders leave them, and into memory that is there"
    if count > 4:
        chosen = [4, 1, 3]
        part = ViewDraws(*(field[chosen] for field in draws))
        assert torch.equal(colour_cuda.colour_views(there[chosen], part, settings), ours[chosen]), "in any company"
print("equal")
"""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpreter, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("channels", [3, 4])
def test_a_portion_takes_four_launches_and_one_copy(channels: int) -> None:
    settings = of_channels(channels, 224)
    draws = draw(settings, 64)
    with fake_cuda() as launched:
        crops = torch.zeros(64, channels, 224, 224, dtype=torch.uint8, device=DEVICE)
        with Launches() as kernels:
            views = colour_cuda.colour_views(crops, draws, settings)
        with Launches() as plain:
            assert colour.colour_views(crops, draws, settings).shape == views.shape
    assert launched == [colour_cuda._colour] * 2 + [colour_cuda._blur] * 2
    assert kernels.names == ["_to_copy"]
    assert len(plain.names) > (250 if channels == 3 else 80), "what it takes without kernels"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_they_never_wait() -> None:
    settings = of_channels(3, 96)
    crops, draws = torch.zeros(16, 3, 96, 96, dtype=torch.uint8, device="cuda"), draw(settings, 16)
    colour_cuda.colour_views(crops, draws, settings)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        colour_cuda.colour_views(crops, draws, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def hopper_or_ampere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that kernels can be compiled for, and no more."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    yield
    for kernel in (colour_cuda._colour, colour_cuda._blur):
        kernel.device_caches.clear()


@pytest.mark.parametrize("hopper_or_ampere", [80, 90], indirect=True)
def test_they_stay_in_registers(hopper_or_ampere: None, tmp_path: Path) -> None:
    """Triton brings the assembler of any GPU along. A kernel that does not fit the registers would use far memory."""
    views, table, strides = torch.zeros(2, 3, 224, 224), torch.zeros(2, 37), (3 * 224**2, 224**2, 1)
    pixels = torch.zeros(6 * 224**2 + 1, dtype=torch.uint8)
    shape = {"SIZE": 224, "WIDTH": 37, "CHANNELS": 3, "grid": (1,)}
    sums = [
        colour_cuda._colour.warmup(crops, views, views, table, *strides, MEANS=means, MOST=255, **shape)
        for crops in (pixels[:-1], pixels[1:])
        for means in (True, False)
    ]
    assert sums[0].asm["ttgir"] == sums[2].asm["ttgir"], "a sum has the same order wherever a tensor begins"
    made = [*sums, *(colour_cuda._blur.warmup(views, views, table, DOWN=down, **shape) for down in (True, False))]
    for kernel in made:
        program = tmp_path / "kernel.cubin"
        program.write_bytes(kernel.asm["cubin"])
        lists = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listed = subprocess.run([lists, "--dump-resource-usage", program], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"STACK:(\d+)", listed) == ["0"]
