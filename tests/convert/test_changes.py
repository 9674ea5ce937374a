"""No pixel changes without a count, and no TIFF becomes another picture."""

import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pictures import encoded, stored
from simclr_dist.cli.main import main
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import DataError

Y, X = np.mgrid[:16, :24]
TRUTH = np.stack([X / 23, Y / 15, (X + Y) / 38], -1)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2


def tiff(
    channels: NDArray[np.float64], photometric: int, *,
    bits: int = 16, order: str = "<", planes: bool = False, most: int | None = None, turn: int = 1,
) -> bytes:  # fmt: skip
    """A baseline TIFF, not compressed, of channels [h, w, c] from 0 to 1. White is `most`."""
    height, width, count = channels.shape
    values = (channels * (most or 2**bits - 1)).round().astype(f"{order}u{2 if bits > 8 else 1}")
    parts = [values[..., channel].tobytes() for channel in range(count)] if planes else [values.tobytes()]
    if bits == 12:
        pairs = values.ravel().reshape(-1, 2).tolist()
        parts = [b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)]
    colours = 3 if photometric == RGB else 1
    entries = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [1]), 262: (3, [photometric]), 273: (4, []),
        274: (3, [turn]), 277: (3, [count]), 278: (4, [height]), 279: (4, [len(part) for part in parts]),
        284: (3, [2 if planes else 1]), 338: (3, [0] * (count - colours)),
    }  # fmt: skip
    tags = {tag: entry for tag, entry in entries.items() if entry[1] or tag == 273}
    at, body, out, more = 8 + 2 + 12 * len(tags) + 4, b"".join(parts), b"", b""
    tags[273] = (4, [at + sum(map(len, parts[:number])) for number in range(len(parts))])
    for tag, (kind, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            where, more = at + len(body) + len(more), more + packed
            packed = struct.pack(f"{order}I", where)
        out += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, len(tags)) + out + bytes(4) + body + more


def pixels(content: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


GRAY, FOUR = TRUTH[..., :1], np.concatenate([TRUTH, TRUTH[..., :1]], -1)
WRONG_IN_PILLOW = {  # 13.0: noise, noise, noise, a negative
    "planes": lambda **how: tiff(TRUTH, RGB, planes=True, **how),
    "planes of the other byte order": lambda **how: tiff(TRUTH, RGB, planes=True, order=">", **how),
    "planes of four channels": lambda **how: tiff(FOUR, RGB, planes=True, **how),
    "white is zero": lambda **how: tiff(1 - GRAY, WHITE_IS_ZERO, **how),
}


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("kind", WRONG_IN_PILLOW)
def test_tiffs_that_pillow_reads_wrongly_come_right(kind: str, turn: int) -> None:
    pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    truth = np.broadcast_to(GRAY if "white" in kind else TRUTH, (16, 24, 3))
    expected = np.rot90(truth, -1) if turn == 6 else truth
    assert np.abs(pixels(prepare_image(WRONG_IN_PILLOW[kind](turn=turn)).content) - 255 * expected).max() <= 1


@pytest.mark.parametrize("kind", WRONG_IN_PILLOW)
def test_without_tifffile_they_are_refused_with_the_cure(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"^a TIFF that Pillow reads wrongly \(16 bits .*`pip install 'simclr_dist\[tiff\]'`"):
        prepare_image(WRONG_IN_PILLOW[kind]())


READ_BY_PILLOW = [(8, BLACK_IS_ZERO), (12, BLACK_IS_ZERO), (16, BLACK_IS_ZERO), (8, RGB), (16, RGB)]  # it refuses 12 bits RGB


@pytest.mark.parametrize(("bits", "photometric"), READ_BY_PILLOW)
def test_what_pillow_reads_needs_nothing_more(bits: int, photometric: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    truth = TRUTH if photometric == RGB else GRAY
    assert np.abs(pixels(prepare_image(tiff(truth, photometric, bits=bits)).content) - 255 * truth).max() <= 1


@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, RGB])
def test_12_bits_in_16_are_not_stored_nearly_black(photometric: int) -> None:
    with pytest.raises(DataError, match=r"hold 12 at most: it would come out nearly black; multiply its values by 16$"):
        prepare_image(tiff(TRUTH if photometric == RGB else GRAY, photometric, most=4095))
    assert prepare_image(tiff(0 * GRAY, BLACK_IS_ZERO)).width == 24, "black is black"


def test_a_tiff_that_nothing_reads_is_called_one() -> None:
    with pytest.raises(DataError, match=r"^a TIFF that is damaged or of a kind that is not read"):
        prepare_image(tiff(np.concatenate([GRAY] * 5, -1), BLACK_IS_ZERO))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURE, OTHER = (Image.open(io.BytesIO(encoded(seed))) for seed in (1, 2))
DEEP, TIFF, PAGES = "16 bits a channel", "a TIFF file", "pages beyond the first dropped"
CHANGES: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "kept.png": (lambda: saved(PICTURE, "PNG"), set()),
    "deep.png": (lambda: saved(Image.fromarray((GRAY[..., 0] * 65535).astype(np.uint16)), "PNG"), {DEEP}),
    "deep.tif": (lambda: tiff(TRUTH, RGB), {TIFF, DEEP}),
    "deep.jp2": (
        lambda: saved(Image.fromarray((GRAY[..., 0] * 65535).astype(np.uint16)), "JPEG2000"), {"a JPEG2000 file", DEEP},
    ),
    "four.tif": (lambda: tiff(FOUR, RGB, bits=8), {TIFF, "channels beyond RGB or gray dropped"}),
    "pages.tif": (lambda: saved(PICTURE, "TIFF", save_all=True, append_images=[OTHER]), {TIFF, PAGES}),
    "turned.tif": (lambda: saved(PICTURE, "TIFF", exif=turned()), {TIFF, "rotated by its EXIF block"}),
    "turned.jpg": (lambda: saved(PICTURE, "JPEG", exif=turned()), {"rotated by its EXIF block"}),
    "alpha.png": (lambda: saved(PICTURE.convert("RGBA"), "PNG"), {"transparency dropped"}),
    "alpha.tif": (lambda: saved(PICTURE.convert("RGBA"), "TIFF"), {TIFF, "transparency dropped"}),
    "moving.gif": (
        lambda: saved(PICTURE, "GIF", save_all=True, append_images=[OTHER]),
        {"a GIF file", "pixels of mode P", "frames beyond the first dropped"},
    ),
}  # fmt: skip


def test_every_change_of_pixels_is_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, expected = tmp_path / "src", tmp_path / "out", dict[str, int]()
    source.mkdir()
    for name, (make, kinds) in CHANGES.items():
        (source / name).write_bytes(make())
        assert set(prepare_image(make()).changes) == kinds, name
        expected |= {kind: expected.get(kind, 0) + 1 for kind in kinds}
    lines = {f"re-encoded: {count} ({kind})" for kind, count in expected.items()}
    for again in (False, True):  # the second time from the record
        assert main(["shard", str(source), str(out), "--processes", "1"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].endswith("nothing is written") == again
        assert any(line.startswith(f"{len(CHANGES) - 1} re-encoded, ") for line in said)
        assert {line for line in said if line.startswith("re-encoded: ")} == lines
    assert json.loads((out / "conversion.json").read_text())["changes"] == expected


def test_duplicates_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number % 3))
    for _ in range(2):  # the second time from the record
        assert main(["shard", str(tmp_path / "src"), str(tmp_path / "out"), "--processes", "1"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert "0 re-encoded, 1 duplicates kept" in said
        assert "duplicate: b/1.png: the same bytes as a/0.png" in said
    (line,) = (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()
    assert json.loads(line) == {"source": "b/1.png", "reason": "the same bytes as a/0.png"}


def test_copies_on_both_sides_of_a_split_are_named(tmp_path: Path) -> None:
    for side, seeds in (("train", range(4)), ("test", range(3, 6))):
        (tmp_path / "src" / side).mkdir(parents=True)
        for seed in seeds:
            (tmp_path / "src" / side / f"{seed}.png").write_bytes(encoded(seed))
    write_shards(tmp_path / "src" / "train", tmp_path / "out" / "train", processes=1)
    write_shards(tmp_path / "src" / "train", tmp_path / "out" / "animals", processes=1)  # no side of a split
    summary = write_shards(tmp_path / "src" / "test", tmp_path / "out" / "test", processes=1)
    why = f"the same bytes as an image of {tmp_path / 'out' / 'train'}, so on both sides of the split"
    assert (summary.duplicates, summary.copies) == (0, (("3.png", why),))
    assert stored(tmp_path / "out" / "test").keys() == {"3.png", "4.png", "5.png"}


def test_copies_stay_on_one_side_of_a_split_that_is_ours(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(24):
        (tmp_path / "src" / f"{number:02d}.png").write_bytes(encoded(number % 8))
    summary = write_shards(tmp_path / "src", tmp_path / "out", processes=1, split=(0.5, 0.5))
    assert (summary.duplicates, len(summary.copies)) == (16, 16)
    sides = [{content for _, content in stored(tmp_path / "out" / side).values()} for side in ("train", "test")]
    assert not sides[0] & sides[1]
