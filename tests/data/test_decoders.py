"""All decoders give the same bytes, turn nothing, and the one that is used stands in the record."""

import importlib
import io
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simclr_dist.data.pixels import decode as door
from simclr_dist.data.pixels.decode import DECODERS, decode, describe_decoders, turn_upright
from simclr_dist.data.pixels.images import prepare_image

SIZES = ((1, 1), (8, 8), (97, 61), (3, 500))


def saved(width: int, height: int, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, x * y % 256], -1).astype(np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, kind, **options)
    return target.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


OPTIONS: dict[str, dict[str, Any]] = {
    **{f"jpeg, subsampling {number}": {"kind": "JPEG", "subsampling": number} for number in range(3)},
    "jpeg, progressive": {"kind": "JPEG", "progressive": True, "quality": 60},
    "jpeg, gray": {"kind": "JPEG", "mode": "L"},
    "jpeg, restart marks": {"kind": "JPEG", "restart_marker_blocks": 2},
    "jpeg, stored as RGB": {"kind": "JPEG", "keep_rgb": True},
    "jpeg, profile": {"kind": "JPEG", "icc_profile": b"x" * 1000},
    "jpeg, EXIF": {"kind": "JPEG", "exif": exif(1)},
    "jpegs of a camera": {"kind": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
    "webp": {"kind": "WEBP", "quality": 80},
    "webp, lossless": {"kind": "WEBP", "lossless": True},
    "webp, EXIF": {"kind": "WEBP", "exif": exif(1)},
    "png": {"kind": "PNG"},
    "png, gray": {"kind": "PNG", "mode": "L"},
}


def by(name: str, content: bytes) -> Tensor:
    if name == "torchcodec":
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:  # each version goes with some of torch
            pytest.skip(f"torchcodec cannot be imported: {type(error).__name__}")
    return DECODERS[name](content)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_each_decoder_gives_the_same_bytes(name: str, kind: str) -> None:
    for width, height in SIZES:
        content = saved(width, height, **OPTIONS[kind])
        assert prepare_image(content).content is content, "of a kind that shards hold"
        pixels, ours = by(name, content), decode(content)
        assert torch.equal(pixels, ours)
        assert (pixels.dtype, pixels.shape, pixels.stride()) == (torch.uint8, (3, height, width), ours.stride())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_no_decoder_turns(name: str, kind: str) -> None:
    assert torch.equal(by(name, saved(31, 17, kind, exif=exif(6))), decode(saved(31, 17, kind)))


@pytest.mark.parametrize("orientation", range(10))
def test_turning(orientation: int) -> None:
    image = torch.arange(3 * 2 * 5, dtype=torch.uint8).view(3, 2, 5)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # of Image.Transpose
    expected = pillow if turn is None else pillow.transpose(Image.Transpose(turn))
    assert np.array_equal(turn_upright(image, orientation).permute(1, 2, 0), np.asarray(expected))


def test_torchvision_decodes_also_where_nothing_else_imports_it() -> None:
    code = "from simclr_dist.data.pixels.decode import decoder; print(decoder())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torchvision\n"


def test_without_torchvisions_decoder_pillow_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"torchvision 0\S+, PNG by pillow \d\S+", describe_decoders())
    monkeypatch.setattr(door, "decoder", lambda: "pillow")  # as where torchcodec is not installed either
    assert describe_decoders().startswith("pillow ")
    content = saved(97, 61, "JPEG")
    assert torch.equal(decode(content), DECODERS["torchvision"](content))
