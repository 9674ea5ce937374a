"""Images that are not 8-bit RGB: read with all their channels and bits, stored without loss, or refused."""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pictures import contents, encoded
from simclr_dist.cli.main import main
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.verify import verify_shards
from simclr_dist.data.manifest import read_manifest
from simclr_dist.data.pixels.channels import convert, pillow_pixels, prepare, read, write_png
from simclr_dist.data.pixels.images import FORMATS, prepare_image
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.data.reader import ShardDataset
from simclr_dist.system.errors import ConfigError, DataError
from test_changes import GRAY
from test_changes import tiff as packed_tiff

Pixels = NDArray[Any]
DEEP_GRAY, DEEP_RGB = Kind(1, 16), Kind(3, 16)


def noise(kind: Kind, height: int = 14, width: int = 19, seed: int = 0) -> Pixels:
    """Every bit of every channel matters."""
    dtype = np.uint16 if kind.bit_depth == 16 else np.uint8
    return np.random.default_rng(seed).integers(0, kind.most, (height, width, kind.channels), dtype, endpoint=True)


def png(pixels: Pixels) -> bytes:
    return write_png(pixels)


def pillow(pixels: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(target, kind, **options)
    return target.getvalue()


def tiff(pixels: Pixels, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    target, gray = io.BytesIO(), pixels.shape[-1] == 1
    plain = {"photometric": "minisblack", "planarconfig": None if gray else "contig"}
    tifffile.imwrite(target, pixels[..., 0] if gray else pixels, **plain | options)
    return target.getvalue()


KINDS = [Kind(count, bits) for count in (1, 2, 3, 4, 5, 13) for bits in (8, 16) if (count, bits) != RGB8]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_channels_and_bits_of_a_tiff_are_stored_and_read(kind: Kind) -> None:
    pixels = noise(kind)
    stored = prepare(tiff(pixels), kind)
    assert (stored.width, stored.height) == (19, 14)
    assert stored.extension == ("png" if kind.channels <= 4 else "tif")
    assert np.array_equal(read(stored.content, kind), pixels)
    assert np.array_equal(convert(tiff(pixels), kind), pixels)
    again = prepare(stored.content, kind)
    assert again.content is stored.content, "what is stored can stay: shards of shards, and --verify --decode"
    assert again.changes == ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.channels <= 4], ids=str)
def test_a_png_is_read_as_others_read_it_and_keeps_its_bytes(kind: Kind) -> None:
    """torchvision reads 16 bits rightly (0.29); Pillow shows the upper 8 of colours."""
    import torch
    import torchvision  # noqa: F401 (registers torch.ops.image)

    content = png(pixels := noise(kind))
    decoded = torch.ops.image.decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, False)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(read(content, kind), pixels)
    assert prepare(content, kind).content is content


def test_an_interlaced_png_of_16_bit_colours() -> None:
    """Pillow writes none. The seven passes hold every pixel once."""
    import struct
    import zlib

    pixels = noise(DEEP_RGB, 11, 9)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [pixels[y::down, x::across] for x, y, across, down in passes]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 9, 11, 16, 2, 0, 0, 1), b"IDAT" + zlib.compress(lines), b"IEND"]
    framed = b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    content = b"\x89PNG\r\n\x1a\n" + framed
    assert np.array_equal(read(content, DEEP_RGB), pixels)
    assert prepare(content, DEEP_RGB).content is content, "sound"


def upside_down(pixels: Pixels) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return pillow(pixels, exif=exif)


GRAY8, FIVE = noise(Kind(1, 8)), noise(Kind(5, 16))
DEEP1 = noise(DEEP_GRAY)
CHANGES: dict[str, tuple[Callable[[], bytes], Kind, Pixels, set[str]]] = {
    "gray JPEG": (lambda: encoded(mode="L", kind="JPEG"), Kind(1, 8), None, set()),
    "8 bits in a set of 16": (lambda: pillow(GRAY8), DEEP_GRAY, GRAY8.astype(np.uint16) * 257, set()),
    "gray in a set of RGB": (lambda: pillow(DEEP1), DEEP_RGB, np.repeat(DEEP1, 3, 2), set()),
    "alpha": (lambda: png(np.dstack([DEEP1, DEEP1])), DEEP_GRAY, DEEP1, {"transparency dropped"}),
    "alpha beside RGB": (
        lambda: png(noise(Kind(4, 16))), DEEP_RGB, noise(Kind(4, 16))[..., :3], {"transparency dropped"},
    ),
    "equal channels": (
        lambda: pillow(np.repeat(GRAY8, 3, 2)), Kind(1, 8), GRAY8, {"gray in three equal channels"},
    ),
    "turned": (lambda: upside_down(GRAY8), Kind(1, 8), GRAY8[::-1, ::-1], {"rotated by its EXIF block"}),
    "turned TIFF": (
        lambda: tiff(FIVE, extratags=[(274, "H", 1, 6, True)]), Kind(5, 16), np.rot90(FIVE, -1), {"rotated by its EXIF block"},
    ),
    "16 bits to 8": (lambda: pillow(DEEP1), Kind(1, 8), ((DEEP1 * np.int64(255) + 32767) // 65535), {"16 bits a channel"}),
    "palette": (lambda: encoded(mode="P"), DEEP_RGB, None, {"pixels of mode P"}),
    "CMYK": (lambda: encoded(mode="CMYK", kind="JPEG"), DEEP_RGB, None, {"pixels of mode CMYK"}),
    "GIF": (
        lambda: encoded(mode="L", kind="GIF", save_all=True, append_images=[Image.fromarray(GRAY8[..., 0])]), Kind(1, 8), None,
        {"a GIF file", "pixels of mode P", "gray in three equal channels", "frames beyond the first dropped"},
    ),
    "white is zero": (
        lambda: tiff(65535 - DEEP1, photometric="miniswhite"), DEEP_GRAY, DEEP1, {"a TIFF file", "white is zero"},
    ),
    "planes": (
        lambda: tiff(np.moveaxis(FIVE, -1, 0), planarconfig="separate"), Kind(5, 16), FIVE, set(),
    ),
    "packed": (lambda: tiff(FIVE, compression="zlib", predictor=False), Kind(5, 16), FIVE, {"a TIFF file"}),
    "a tile larger than the image": (
        lambda: tiff(FIVE, compression="zlib", predictor=False, tile=(64, 48)), Kind(5, 16), FIVE, {"a TIFF file"},
    ),
    "a page a channel": (
        lambda: tiff(np.moveaxis(FIVE, -1, 0), planarconfig=None), Kind(5, 16), FIVE, {"a TIFF file"},
    ),
    "ImageJ's channels": (
        lambda: tiff(np.moveaxis(FIVE, -1, 0), planarconfig=None, photometric=None, imagej=True, metadata={"axes": "CYX"}),
        Kind(5, 16), FIVE, {"a TIFF file"},
    ),
    "JPEG 2000": (lambda: jpeg_2000(DEEP1 >> 4, bits=16), DEEP_GRAY, DEEP1 >> 4, {"a JPEG2000 file"}),
    "JPEG 2000 of 12 bits": (
        lambda: jpeg_2000(DEEP1 >> 4, bits=12), DEEP_GRAY, ((DEEP1 >> 4) * np.int64(65535) + 2047) // 4095,
        {"a JPEG2000 file", "12 bits a channel"},
    ),
    "more pages": (
        lambda: tiff(np.stack([DEEP1[..., 0]] * 3), planarconfig=None), DEEP_GRAY, DEEP1,
        {"a TIFF file", "pages beyond the first dropped"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_said_and_the_rest_stays(name: str) -> None:
    make, kind, expected, changes = CHANGES[name]
    prepared = prepare(content := make(), kind)
    assert set(prepared.changes) == changes
    assert (prepared.content is content) == (not changes)
    stored = read(prepared.content, kind)
    assert stored.shape == (prepared.height, prepared.width, kind.channels)
    assert np.array_equal(convert(content, kind), stored)
    if expected is not None:
        assert np.array_equal(stored, expected)


# 8 x 8 pixels of 10 bits, written by imagecodecs' avif_encode(pixels, level=50, bitspersample=10).
DEEP_AVIF = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAOcG"
    "l0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAfAAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABq"
    "aXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAAB"
    "dpcG1hAAAAAAAAAAEAAQQBAoMEAAAAhG1kYXQSAAoIOAi/bwICBpAybhlCYwTAADQACAD/XBBM9XeOoukx/hdjBLLzn5O7Ngr0Wx+2pXsxT/g0"
    "S2i0vCWj+fER/9leo9BZumgZm8RAVAg57gpNKtPG0iMGpQPt+HZUF67adUOfjHCnrkkl/+PIJTjDEW5SMm6uOYGzw77A"
)
REFUSED: dict[str, tuple[Callable[[], bytes], Kind, str]] = {
    "RGB for one channel": (lambda: encoded(), Kind(1, 8), r"^has 3 channels, and 1 are asked for$"),
    "gray for four": (lambda: pillow(GRAY8), Kind(4, 8), r"^has 1 channel, and 4 are asked for"),
    "five for four": (lambda: tiff(FIVE), Kind(4, 16), r"^has 5 channels, and 4 are asked for"),
    "floats": (lambda: tiff(DEEP1.astype(np.float32)), DEEP_GRAY, r"mode F|a TIFF that is damaged or of a kind"),
    "signs": (lambda: tiff(FIVE.astype(np.int16)), Kind(5, 16), r"^a TIFF that is damaged or of a kind that is not read"),
    "deep JPEG 2000": (lambda: deep_jpeg_2000(noise(DEEP_RGB)), DEEP_RGB, r"^a JPEG2000 with pixels of mode RGB and 16 bits"),
    "deep AVIF": (
        lambda: DEEP_AVIF,
        DEEP_RGB,
        "^a AVIF with pixels of mode RGB and 10 bits a channel; save it as PNG|^not an image$",
    ),
    "deep PPM": (
        lambda: b"P6 # colours\n19 14\n65535\n" + noise(DEEP_RGB).astype(">u2").tobytes(),
        DEEP_RGB,
        "^a PPM with pixels of mode RGB and 16 bits a channel; save it as PNG",
    ),
    "inks": (
        lambda: tiff(noise(Kind(4, 16)), photometric="separated"),
        Kind(4, 16),
        r"^a TIFF that is damaged or of a kind",
    ),
    "pages of two sizes": (lambda: two_pages(), Kind(2, 16), r"^a TIFF whose pages, one a channel, differ in size or bits$"),
    "garbage": (lambda: b"II*\0" + bytes(100), Kind(5, 16), "."),
    "12 bits as 8": (lambda: pillow(DEEP1 // 16), Kind(1, 8), "it would come out nearly black"),
    "no image": (lambda: b"text", DEEP_GRAY, "^not an image$"),
}


def jpeg_2000(pixels: Pixels, bits: int) -> bytes:
    """Gray of few bits, not changed. Pillow writes 8 and 16 alone: of the latter, the middle says that it is all."""
    middle = pixels + np.uint16((1 << 15) - (1 << bits - 1))
    content = bytearray(pillow(middle, "JPEG2000", irreversible=False))
    for place in (content.find(b"ihdr") + 14, content.find(b"\xff\x51") + 40):
        assert content[place] == 15
        content[place] = bits - 1
    return bytes(content)


def deep_jpeg_2000(pixels: Pixels) -> bytes:
    with Image.open(io.BytesIO(pillow((pixels >> 8).astype(np.uint8), "JPEG2000"))) as image:
        target = io.BytesIO()
        image.save(target, "JPEG2000")
    content = bytearray(target.getvalue())
    content[content.find(b"ihdr") + 14] = 15  # says 16 bits
    return bytes(content)


def two_pages() -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    target = io.BytesIO()
    with tifffile.TiffWriter(target) as file:
        for pixels in (DEEP1[..., 0], DEEP1[:5, :, 0]):
            file.write(pixels, photometric="minisblack")
    return target.getvalue()


def test_old_programs_pass_over_an_index_of_other_kinds(tmp_path: Path) -> None:
    """They would take its images for 8-bit RGB. By the manifest they refuse it."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.png").write_bytes(pillow(DEEP1))
    for kind, end in ((DEEP_GRAY, b"simclr-2"), (DEEP_RGB, b"simclr-2"), (RGB8, b"simclr-1")):
        out = tmp_path / end.decode() / str(kind)
        write_shards(source, out, channels=kind.channels, bit_depth=kind.bit_depth)
        assert (out / "manifest.index").read_bytes().endswith(end)
        (out / "manifest.parquet").touch()  # the index is looked at anew
        assert ShardDataset(out).kind == kind
        assert (out / "manifest.index").read_bytes().endswith(end)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    make, kind, words = REFUSED[name]
    content = make()
    for work in (prepare, convert):
        with pytest.raises(DataError, match=words):
            work(content, kind)


def test_a_set_of_8_bits_says_which_bits_it_lost() -> None:
    if "AVIF" in FORMATS:  # not in each build of Pillow
        assert prepare_image(DEEP_AVIF).changes == ("a AVIF file", "10 bits a channel")
    assert prepare_image(b"P6 1 1 65535 " + bytes(range(100, 106))).changes == ("a PPM file", "16 bits a channel")


@pytest.mark.parametrize("kind", [DEEP_GRAY, Kind(1, 8)], ids=str)
def test_12_bits_are_scaled_to_the_full_channel(kind: Kind) -> None:
    prepared = prepare(packed_tiff(GRAY, 1, bits=12), kind)
    assert set(prepared.changes) >= {"a TIFF file", "12 bits a channel"}
    assert np.abs(read(prepared.content, kind) / kind.most - GRAY).max() <= 0.5 / min(4095, kind.most) + 1e-9


def test_a_picture_of_12_bits_is_scaled_as_in_shards() -> None:
    content = packed_tiff(GRAY, 1, bits=12)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(pillow_pixels(image, DEEP_GRAY), convert(content, DEEP_GRAY))


def test_a_tiff_does_not_unpack_to_more_than_it_says() -> None:
    """A few kilobytes of zlib can hold gigabytes."""
    import zlib

    content = bytearray(tiff(np.zeros((8, 8, 5), np.uint16), compression="zlib", predictor=False))
    bomb = zlib.compress(bytes(50_000_000))
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        (start,), tag = file.pages[0].dataoffsets, file.pages[0].tags[279]
        assert file.pages[0].databytecounts != (len(bomb),)
    content = content[:start] + content[start:].ljust(start + len(bomb))
    content[tag.valueoffset : tag.valueoffset + tag.valuebytecount] = len(bomb).to_bytes(tag.valuebytecount, "little")
    content[start : start + len(bomb)] = bomb
    with pytest.raises(DataError):
        prepare(bytes(content), Kind(5, 16))


def test_without_tifffile_many_channels_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    content, gray = tiff(FIVE), tiff(DEEP1)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"^a TIFF of many channels.*`pip install 'simclr_dist\[tiff\]'`"):
        prepare(content, Kind(5, 16))
    assert np.array_equal(read(prepare(gray, DEEP_GRAY).content, DEEP_GRAY), DEEP1), "Pillow reads gray ones"


def test_a_shrunk_image_keeps_its_bits_and_channels() -> None:
    pixels = np.broadcast_to(np.linspace(0, 65535, 60).astype(np.uint16)[None, :, None], (40, 60, 5))
    stored = prepare(tiff(np.ascontiguousarray(pixels)), Kind(5, 16), short_side=20)
    small = read(stored.content, Kind(5, 16)).astype(int)
    assert (stored.width, stored.height) == (30, 20)
    assert abs(small[10, 5:-5, 3] - (pixels[0, 10:-10:2, 3].astype(int) + pixels[0, 11:-9:2, 3]) // 2).max() < 40
    assert "its shorter side exceeds 20 pixels" in stored.changes


def source(folder: Path, kind: Kind, count: int = 12) -> list[Pixels]:
    """TIFFs of this kind in two class folders. They are brighter by channel."""
    images = []
    for number in range(count):
        pixels = noise(kind, 20, 24, number) // (1 + np.arange(kind.channels, dtype=np.uint16)) + number
        images.append(pixels := pixels.astype(np.uint16 if kind.bit_depth == 16 else np.uint8))
        path = folder / "ab"[number % 2] / f"{number:02}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(pixels))
    return images


@pytest.mark.parametrize("kind", [DEEP_GRAY, Kind(5, 16), Kind(4, 8)], ids=str)
def test_shards_hold_and_name_their_kind(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = source(tmp_path / "src", kind)
    out = tmp_path / "out"
    options = ["--channels", str(kind.channels), "--bit-depth", str(kind.bit_depth), "--processes", "1"]
    for again in (False, True):
        assert main(["shard", str(tmp_path / "src"), str(out), *options]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith("nothing is written") == again
    assert json.loads((out / "conversion.json").read_text())["channels"] == kind.channels
    dataset = ShardDataset(out)
    assert dataset.kind == read_manifest(out, fresh=True).kind == kind
    read_back = sorted(dataset[row].image.permute(1, 2, 0).numpy().tobytes() for row in range(len(dataset)))
    assert read_back == sorted(pixels.tobytes() for pixels in images)
    assert verify_shards(out, decode=True, processes=1).bad == 0

    assert main(["shard", "--statistics", str(out), "--processes", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"# 12 images, {kind}; on the scale 0-1, each image counts alike"
    mean, std = (json.loads(line.partition(": ")[2]) for line in printed[2:])
    whole = np.stack(images).reshape(-1, kind.channels) / np.float64(kind.most)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, whole.std(0), rtol=1e-5)

    (out / "manifest.parquet").unlink()
    (out / "manifest.index").unlink()
    assert main(["shard", "--index", str(out), *options]) == 0
    assert ShardDataset(out).kind == kind, "tars of others, too"

    with pytest.raises(ConfigError, match=rf"have {kind}, and data.channels and data.bit_depth ask for 3 channels of 8 bits"):
        ShardDataset(out, kind=RGB8)


def test_the_bytes_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    source(tmp_path / "src", Kind(5, 16))
    for processes in (1, 2):
        write_shards(tmp_path / "src", tmp_path / str(processes), channels=5, bit_depth=16, processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_statistics_refuse_a_channel_that_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        (tmp_path / "src" / f"{number}.png").write_bytes(png(np.dstack([noise(Kind(1, 8), seed=number), GRAY8 * 0 + 255])))
    write_shards(tmp_path / "src", tmp_path / "out", channels=2, processes=1)
    assert main(["shard", "--statistics", str(tmp_path / "out")]) == 2
    assert "channel 2 is the same in all pixels" in capsys.readouterr().err


def test_a_manifest_of_8_bit_rgb_is_what_it_was(tmp_path: Path) -> None:
    """Version 1, without a word on kinds, and a conversion.json as before: old and new programs read each other's."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "0.png").write_bytes(encoded())
    write_shards(tmp_path / "src", tmp_path / "out", processes=1)
    import pyarrow.parquet as pq

    about = json.loads(pq.read_schema(tmp_path / "out" / "manifest.parquet").metadata[b"simclr_dist"])
    assert about["version"] == 1
    assert about.keys() == {"format", "version", "shards", "classes"}
    assert "channels" not in json.loads((tmp_path / "out" / "conversion.json").read_text())
