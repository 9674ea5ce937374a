"""Colour that a C++ compiler makes for this machine: the values of `colour_views`, and its promises."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr_dist.data.views import compiled
from simclr_dist.data.views.colour import Colour, colour_views
from simclr_dist.data.views.crops import normalise
from simclr_dist.data.views.draws import PRESETS, ViewDraws, ViewSettings, draw_views
from simclr_dist.system.errors import ConfigError


@pytest.fixture(scope="module")
def native(compiler: None) -> Colour:
    return compiled.compile_colour()


def crops_of(count: int, size: int, channels: int = 3, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Smooth and noisy images, and some of one tone, or of black and white."""
    most = torch.iinfo(dtype).max
    generator = torch.Generator().manual_seed(size)
    noise = torch.rand(count, channels, size, size, generator=generator)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size)
    images = torch.where((torch.arange(count) % 3 == 0)[:, None, None, None], noise, smooth)
    images[1::7] = images[1::7, :1]
    images[2::7] = (noise[2::7] > 0.5).float()
    return torch.from_numpy((images * most).round().numpy().astype(f"uint{8 * dtype.itemsize}"))


def draw(settings: ViewSettings, count: int) -> ViewDraws:
    sides = [300] * count
    return draw_views(settings, seed=0, epoch=0, rows=np.arange(count), view=0, heights=sides, widths=sides)


def of_channels(channels: int, size: int, **changed: float) -> ViewSettings:
    colourless = {} if channels == 3 else {"saturation": 0.0, "hue": 0.0, "gray": 0.0}
    statistics = {"mean": (0.5, 0.4, 0.3, 0.6)[:channels], "std": (0.2, 0.3, 0.25, 0.2)[:channels]}
    return replace(PRESETS["imagenet"], image_size=size, **statistics, **colourless, **changed)


@pytest.mark.parametrize("size", [1, 7, 20, 33, 64, 97, 224])
def test_its_views_are_colour_views(native: Colour, size: int) -> None:
    count = 24 if size == 224 else 90
    settings = of_channels(3, size, solarize=0.3)
    crops, draws = crops_of(count, size), draw(settings, count)
    before = crops.clone()
    ours = native(crops, draws, settings)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert (ours - colour_views(crops, draws, settings)).abs().max() < 1e-4
    assert torch.equal(crops, before)
    room = torch.full_like(ours, torch.nan)
    assert native(crops, draws, settings, room) is room
    assert torch.equal(room, ours)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_channels_and_bits(native: Colour, channels: int, dtype: torch.dtype) -> None:
    settings = of_channels(channels, 48, solarize=0.5)
    crops, draws = crops_of(40, 48, channels, dtype), draw(settings, 40)
    assert (native(crops, draws, settings) - colour_views(crops, draws, settings)).abs().max() < 1e-4


def test_a_blur_of_more_taps_than_a_block(native: Colour) -> None:
    settings = of_channels(3, 700, blur=1.0, blur_sigma=(12.0, 12.0))
    crops, draws = crops_of(2, 700), draw(settings, 2)
    assert (native(crops, draws, settings) - colour_views(crops, draws, settings)).abs().max() < 1e-4


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [30, 224])
def test_a_view_has_the_same_bits_in_any_company_and_on_any_threads(native: Colour, size: int) -> None:
    settings = of_channels(3, size)
    crops, draws = crops_of(20, size), draw(settings, 20)
    with threads(1):
        together = native(crops, draws, settings)
    with threads(4):
        assert torch.equal(native(crops, draws, settings), together)
    for chosen in ([3], [19, 4, 11], list(range(1, 14))):
        part = ViewDraws(*(field[chosen] for field in draws))
        assert torch.equal(native(crops[chosen], part, settings), together[chosen])
    assert torch.equal(native(crops.contiguous(memory_format=torch.channels_last), draws, settings), together)
    assert native(crops[:0], ViewDraws(*(field[:0] for field in draws)), settings).shape == (0, 3, size, size)


def test_where_no_thread_can_start_one_does_it_all(tmp_path: Path) -> None:
    """Threads whose stacks no memory can hold; those of torch and numpy are told to be small."""
    code = (
        "import sys, torch; from test_compiled_views import *; torch.set_num_threads(4); native = compiled.compile_colour();"
        "settings = of_channels(3, 30); torch.save(native(crops_of(20, 30), draw(settings, 20), settings), sys.argv[1])"
    )
    limited = ["sh", "-c", f'ulimit -s {2**36} && exec "$@"', "sh", sys.executable, "-c", code, str(tmp_path / "views.pt")]
    small = {
        "OMP_STACKSIZE": "4M",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    subprocess.run(limited, env=os.environ | small, check=True)
    settings = of_channels(3, 30)
    ours = compiled.compile_colour()(crops_of(20, 30), draw(settings, 20), settings)
    assert torch.equal(torch.load(tmp_path / "views.pt", weights_only=True), ours)


def test_a_view_without_colour_changes_is_only_normalised(native: Colour) -> None:
    settings = of_channels(3, 16, jitter=0.0, gray=0.0, blur=0.0)
    crops = crops_of(9, 16)
    plain = normalise(crops, settings.mean, settings.std)
    assert (native(crops, draw(settings, 9), settings) - plain).abs().max() < 2e-6


@pytest.mark.usefixtures("compiler")
def test_tiny_numbers_stay_what_they_are() -> None:
    """With -ffast-math a library would flush them to 0 in the whole process that loads it."""
    use = "from simclr_dist.data.views.compiled import compile_colour; compile_colour()"
    code = f"import torch; {use}; print(float(torch.ones(1) * 1e-40) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.usefixtures("compiler")
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    compiled.compile_colour()
    assert not list(tmp_path.iterdir())


def script(folder: Path, text: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return os.fspath(file)


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path, "echo 'x.cpp: In function' >&2; echo 'x.cpp:1: fatal error: vector: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ConfigError) as refused:
        compiled.compile_colour()
    assert str(refused.value) == (
        f"compile: true: {compiler} failed: x.cpp:1: fatal error: vector: No such file; name another compiler in CXX, or set"
        " compile: false"
    )


def test_a_library_that_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that is mounted noexec."""
    monkeypatch.setenv("CXX", script(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'))
    with pytest.raises(ConfigError, match=r"^compile: true: cannot load what was compiled: .*; set TMPDIR to a folder from"):
        compiled.compile_colour()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo 'Fehler' >&2; printf 'zwei\\033[31m\\377' >&2; exit 1", r"failed: zwei\x1b[31m�;"),
        ("exit 7", "failed: exit code 7;"),
    ],
)
def test_what_a_compiler_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, text))
    with pytest.raises(ConfigError) as refused:
        compiled.compile_colour()
    assert why in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_machine_without_a_folder_to_compile_in_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error of one rank alone would leave the others waiting."""
    monkeypatch.setattr(compiled.tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(ConfigError, match=r"^compile: true: cannot load what was compiled: .*; set TMPDIR to a folder"):
        compiled.compile_colour()


def test_a_folder_that_stays_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS what is loaded stays under another name until the process ends, and its folder with it."""

    def not_empty(path: object, **options: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "rmdir", not_empty)
    assert callable(compiled.compile_colour())


def test_memory_of_others_is_not_touched(native: Colour) -> None:
    """What does not fit together is an error here, and not a read behind an array's end."""
    settings, crops = of_channels(3, 8), crops_of(2, 8)
    draws = draw(settings, 2)
    wrong: list[tuple[Tensor, Tensor | None]] = [
        (crops[:, :1], None), (crops, torch.empty(2, 3, 8, 8, dtype=torch.float64)), (crops, torch.empty(1, 3, 8, 8)),
        (crops.float(), None),
    ]  # fmt: skip
    for given, out in wrong:
        with pytest.raises(AssertionError):
            native(given, draws, settings, out)
