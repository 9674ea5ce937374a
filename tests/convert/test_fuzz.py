"""Broken image files of the kinds whose readers answer with an error: an image that every reader can decode, or one line that
says why not. What images.py keeps from a reader is not among them."""

import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pictures import encoded, stored
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.pixels import images
from simclr_dist.data.pixels.decode import decode
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import DataError

KINDS = ("JPEG", "PNG", "WEBP")
SECONDS = 5.0  # a case takes some milliseconds


def originals() -> dict[str, bytes]:
    """Images of these kinds, also of the sorts that are converted."""
    found = {kind: encoded(7, kind, 40, 30) for kind in KINDS}
    found |= {
        "gray": encoded(7, "JPEG", 40, 30, mode="L"),
        "progressive": encoded(7, "JPEG", 40, 30, progressive=True),
        "CMYK": encoded(7, "JPEG", 40, 30, mode="CMYK"),
        "palette": encoded(7, "PNG", 40, 30, mode="P"),
        "lossless": encoded(7, "WEBP", 40, 30, lossless=True),
    }
    return found


def broken(whole: bytes, rng: random.Random) -> bytes:
    """Cut off, changed or mixed up at random places."""
    content = bytearray(whole)
    match rng.randrange(6):
        case 0:
            del content[rng.randrange(len(content)) :]
        case 1:
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 2:
            place = rng.randrange(len(content))
            content[place : place + rng.randrange(1, 32)] = rng.randbytes(rng.randrange(32))
        case 3:
            place = rng.randrange(len(content))
            content[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"))
        case 4:
            content[min(len(content), rng.randrange(2, 64)) :] = rng.randbytes(rng.randrange(600))
        case _:
            content = bytearray(rng.randbytes(rng.randrange(800)))
    return bytes(content)


def check(content: bytes) -> str:
    """The reason; "" for an image that training can read, "unread" for one that its reader will name as a bad sample."""
    begin = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):  # as in a process of its own, where warnings are no errors
            image = prepare_image(content)
    except DataError as error:
        reason = str(error)
        assert reason
        assert reason.isprintable()
        return reason
    finally:
        assert time.process_time() - begin < SECONDS
    try:
        decoded = decode(image.content)
    except DataError:
        return "unread"
    assert decoded.shape == (3, image.height, image.width)
    assert decoded.dtype == torch.uint8
    return ""


def cases(seed: int, count: int) -> Iterator[bytes]:
    """Broken images of all originals in turn."""
    rng = random.Random(seed)
    wholes = list(originals().values())
    for number in range(count):
        yield broken(wholes[number % len(wholes)], rng)


def test_broken_images_are_one_line_or_can_be_read() -> None:
    reasons = [check(content) for content in cases(0, 600)]
    assert 50 < reasons.count("") < 500, "neither side may be empty, or the test tests nothing"
    assert reasons.count("unread") <= 6, "what the two libraries read differently is rare"


@pytest.mark.slow
def test_many_broken_images() -> None:
    for seed in range(1, 11):
        for content in cases(seed, 1000):
            check(content)


def png(width: int, height: int) -> bytes:
    """A PNG's header that promises so many pixels, and little behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def resized(kind: str, width: int, height: int) -> bytes:
    """A small image whose header says another size."""
    content = bytearray(encoded(7, kind, 40, 30))
    if kind == "JPEG":
        at = re.search(rb"\xff\xc0..\x08", content, re.DOTALL)
        assert at
        struct.pack_into(">HH", content, at.end(), height, width)
    elif kind == "WEBP":
        at = re.search(rb"\x9d\x01\x2a", content)
        assert at
        struct.pack_into("<HH", content, at.end(), min(width, 16383), min(height, 16383))
    else:
        return png(width, height)
    return bytes(content)


def test_a_png_that_does_not_fit_its_checksum_reaches_no_other_reader() -> None:
    """Shown on an image that all of them refuse with an error."""
    content = bytearray(encoded(7, "PNG", 40, 30))
    content[content.index(b"IDAT") + 20] ^= 1
    with pytest.raises(DataError, match=r"^damaged: its IDAT chunk does not fit its checksum$"):
        images.is_sound_png(bytes(content))


@pytest.mark.parametrize("kind", KINDS)
def test_headers_that_promise_much(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def load(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for side in (10_001, 12_000):
        reason = check(resized(kind, side, side))
        assert "megapixels" in reason or "not an image" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_image(kind: str) -> None:
    assert check(encoded(7, kind, 1, 1)) == ""


def test_a_folder_of_broken_files(tmp_path: Path) -> None:
    """Through the whole conversion: whatever an extension claims, each bad file has its line, each good one is stored."""
    source = tmp_path / "src"
    source.mkdir()
    wrong = {}
    for number, content in enumerate(cases(99, 120)):
        name = f"{number:03d}{('.jpg', '.png', '.webp', '.gif')[number % 4]}"
        (source / name).write_bytes(content)
        wrong[name] = check(content) if content else "an empty file"
    for name, content in (
        ("good.png", encoded(1, "JPEG")),
        ("large.jpg", png(10_001, 10_000)),
        ("one.webp", encoded(2, "WEBP", 1, 1)),
    ):
        (source / name).write_bytes(content)
        wrong[name] = check(content)
    summary = write_shards(source, tmp_path / "out", processes=1)
    good = {name for name, reason in wrong.items() if reason in ("", "unread")}
    assert dict(summary.rejected) == {name: reason for name, reason in wrong.items() if name not in good}
    assert set(stored(tmp_path / "out")) == good
