"""Images to shards: what is stored, the same for any number of processes; what is refused; what a kill leaves."""

import gc
import hashlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cpu_time
from faults.small_disk import SmallDisk, why_not
from simclr_dist.convert.index import index_shards
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.verify import verify_shards
from simclr_dist.data.manifest import MANIFEST_NAME, load_manifest
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.system.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the images of {path}")
    return path


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def picture(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture without symmetry, so that a wrong rotation shows."""
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // width, y * 255 // height
    return Image.fromarray(np.stack([red, green, np.full_like(x, seed * 37 % 256)], -1).astype(np.uint8))


def copy_animals(folder: Path, a_class: int = 4) -> Path:
    """A small ImageFolder of real images."""
    for source in sorted(real("animals10-mini").iterdir()):
        (folder / source.name).mkdir(parents=True)
        for image in sorted(source.iterdir())[:a_class]:
            (folder / source.name / image.name).write_bytes(image.read_bytes())
    return folder


def flat(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encode(picture(i), "PNG"))
    return folder


def members(shard: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes, in the tar's order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            key, extension = member.name.split(".")
            found.setdefault(key, {})[extension] = file.read()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_folder(folder: Path) -> dict[str, str]:
    """Every manifest row against the tars' bytes; returns key -> source name."""
    manifest = load_manifest(folder)
    sources: dict[str, str] = {}
    stored: dict[str, dict[str, bytes]] = {}
    for name in manifest.shards:
        stored |= members(folder / name)
    assert list(stored) == manifest.key.tolist()
    for row, key in enumerate(manifest.key):
        with (folder / manifest.shards[manifest.shard[row]]).open("rb") as file:
            file.seek(manifest.offset[row])
            content = file.read(manifest.size[row])
        assert hashlib.sha256(content).digest() == manifest.sha256[row].tobytes()
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (manifest.width[row], manifest.height[row])
        sample = stored[key]
        about = json.loads(sample["json"])
        label = int(manifest.label[row])
        assert sample.get("cls") == (str(label).encode() if label >= 0 else None)
        assert (about["width"], about["height"]) == image.size
        if manifest.classes and label >= 0:
            assert about["class_name"] == manifest.classes[label]
        sources[str(key)] = about["source"]
    return sources


# ---- the three kinds of source, with real images


def test_class_folders(tmp_path: Path) -> None:
    source = copy_animals(tmp_path / "src")
    summary = write_shards(source, tmp_path / "out", shard_size=12)
    manifest = load_manifest(tmp_path / "out")
    sources = check_folder(tmp_path / "out")
    names = sorted(path.name for path in source.iterdir())
    assert manifest.classes == summary.classes == tuple(names)
    assert manifest.shard_sizes.tolist() == [12, 12, 12, 4]
    assert (summary.written, summary.shards, summary.converted, summary.duplicates) == (40, 4, 0, 0)
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert summary.destinations == (tmp_path / "out",)
    for key, label in zip(manifest.key, manifest.label, strict=True):
        assert sources[key].split("/")[0] == names[label]
    for name in manifest.shards:
        for key, sample in members(tmp_path / "out" / name).items():
            assert sample["jpg"] == (source / sources[key]).read_bytes()
    assert len(set(manifest.label[:12].tolist())) > 4, "labels must be mixed within a shard"


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for path in sorted(real("photos").iterdir())[:12]:
        (source / path.name).write_bytes(path.read_bytes())
    write_shards(source, tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert len(check_folder(tmp_path / "out")) == 12
    assert manifest.label.tolist() == [-1] * 12
    assert manifest.classes == ()


def cifar(path: Path, rows: int = 200, row_group_size: int = 30) -> pa.Table:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetFile(real("cifar10") / "test.parquet") as file:
        table = file.read_row_group(0).slice(0, rows)
    pq.write_table(table, path, row_group_size=row_group_size)
    return table


def test_parquet(tmp_path: Path) -> None:
    table = cifar(tmp_path / "src" / "test.parquet")
    write_shards(tmp_path / "src", tmp_path / "out", shard_size=64)
    sources = check_folder(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.classes[:2] == ("airplane", "automobile")
    rows = {row: i for i, row in enumerate(manifest.key)}
    for key, name in sources.items():
        file, number = name.split("#")
        assert file == "test.parquet"
        image, label = table["img"][int(number)].as_py(), table["label"][int(number)].as_py()
        assert manifest.label[rows[key]] == label
        assert manifest.sha256[rows[key]].tobytes() == hashlib.sha256(image["bytes"]).digest()


def test_parquet_of_plain_bytes_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    images = [encode(picture(i), "PNG") for i in range(6)]
    for i in range(2):
        table = pa.table({"pixels": images[i * 3 : i * 3 + 3], "label": pa.array([0, None, -1], pa.int32())})
        pq.write_table(table, tmp_path / "src" / f"train-{i}.parquet")
    write_shards(tmp_path / "src" / "train-*.parquet", tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert sorted(check_folder(tmp_path / "out").values()) == [f"train-{i}.parquet#{row}" for i in range(2) for row in range(3)]
    assert sorted(manifest.label.tolist()) == [-1, -1, -1, -1, 0, 0]
    assert manifest.classes == ()


@pytest.mark.slow  # starts two processes that import torch
def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    source = copy_animals(tmp_path / "animals", 16)  # more than one chunk
    (source / "cane" / "bad.jpg").write_text("no image")
    cifar(tmp_path / "cifar" / "test.parquet")
    for name, options in (("animals", {"split": (0.8, 0.2), "short_side": 64}), ("cifar", {})):
        for processes in (1, 2):
            out = tmp_path / f"{name}-{processes}"
            write_shards(tmp_path / name, out, shard_size=25, processes=processes, **options)  # type: ignore[arg-type]
        one, two = contents(tmp_path / f"{name}-1"), contents(tmp_path / f"{name}-2")
        assert one.keys() == two.keys()
        assert [path for path in one if one[path] != two[path]] == []


def test_the_seed_sets_the_order(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 40)
    orders = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_shards(source, tmp_path / name, seed=seed, shard_size=7)
        orders.append(load_manifest(tmp_path / name).key.tolist())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


def test_a_dropped_image_does_not_reorder_the_others(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 30)
    write_shards(source, tmp_path / "all")
    (source / "005.png").write_bytes(b"")
    write_shards(source, tmp_path / "fewer")
    everything = load_manifest(tmp_path / "all").key.tolist()
    assert [key for key in everything if key != "000000005"] == load_manifest(tmp_path / "fewer").key.tolist()


# ---- the tars


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    source = copy_animals(tmp_path / "src", 2)
    write_shards(source, tmp_path / "out", shard_size=8)
    manifest = load_manifest(tmp_path / "out")
    pattern = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == manifest.key.tolist()
    assert [sample["cls"] for sample in samples] == manifest.label.tolist()
    assert [sample["jpg"].size for sample in samples] == list(zip(manifest.width, manifest.height, strict=True))
    assert all(sample["json"]["source"].endswith(("jpg", "jpeg")) for sample in samples)
    gc.collect()  # webdataset leaves its files to the collector, whose warnings must not reach another test


def test_tars_are_plain_ustar_and_say_nothing_of_the_machine(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "Käse" / ("x" * 120)).mkdir(parents=True)  # a source's long and foreign names must not reach the headers
    (source / "Käse" / ("x" * 120) / "ü.png").write_bytes(encode(picture(), "PNG"))
    write_shards(source, tmp_path / "out")
    data = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    position, kinds = 0, []
    while data[position] != 0:
        header = data[position : position + 512]
        kinds.append(header[156:157])
        assert header[257:265] == b"ustar\x0000"
        assert int(header[136:148].rstrip(b"\0 "), 8) == 0, "mtime"
        assert int(header[108:116].rstrip(b"\0 "), 8) == int(header[116:124].rstrip(b"\0 "), 8) == 0, "uid, gid"
        assert header[265:297].rstrip(b"\0") == header[297:329].rstrip(b"\0") == b"bigdata"
        position += 512 + -(-int(header[124:136].rstrip(b"\0 "), 8) // 512) * 512
    assert kinds == [b"0"] * 3, "regular files only: no PAX ('x', 'g') and no GNU ('L') records"
    assert json.loads(members(tmp_path / "out" / "shard-000000.tar")["000000000"]["json"])["source"].endswith("/ü.png")
    assert load_manifest(tmp_path / "out").classes == ("Käse",)


# ---- what is converted


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def png16(values: np.ndarray[Any, Any]) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write; values uint16 [h, w, 3]."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP")])
def test_plain_images_stay_as_they_are(mode: str, kind: str) -> None:
    content = encode(picture().convert(mode), kind)
    image = prepare_image(content)
    assert image.content is content
    assert (image.extension, image.width, image.height) == ({"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], 24, 16)


def test_a_camera_file_of_two_jpegs_stays_as_it_is() -> None:
    content = encode(picture(), "MPO", save_all=True, append_images=[picture(5)])
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "MPO"
    assert prepare_image(content).content is content
    assert prepare_image(content).extension == "jpg"


GRAY16 = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
CONVERTED: dict[str, Callable[[], bytes]] = {
    "palette": lambda: encode(picture().quantize(256), "PNG"),
    "alpha": lambda: encode(picture().convert("RGBA"), "PNG"),
    "alpha webp": lambda: encode(
        Image.merge("RGBA", (*picture().split(), Image.new("L", (24, 16), 200))), "WEBP", lossless=True
    ),
    "transparent colour": lambda: encode(picture(), "PNG", transparency=(0, 0, 0)),
    "gray and alpha": lambda: encode(picture().convert("LA"), "PNG"),
    "one bit": lambda: encode(picture().convert("1"), "PNG"),
    "two bits": lambda: encode(picture().convert("L").quantize(4), "PNG", bits=2),
    "16-bit gray": lambda: encode(Image.fromarray(GRAY16), "PNG"),
    "16-bit RGB": lambda: png16(np.asarray(picture()).astype(np.uint16) * 257),
    "16-bit TIFF": lambda: encode(Image.fromarray(GRAY16), "TIFF"),
    "bmp": lambda: encode(picture(), "BMP"),
    "gif": lambda: encode(picture(), "GIF"),
    "tiff": lambda: encode(picture(), "TIFF"),
    "animation": lambda: encode(picture(), "WEBP", save_all=True, append_images=[picture(5)], lossless=True),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_others_become_rgb_png(name: str) -> None:
    content = CONVERTED[name]()
    image = prepare_image(content)
    assert image.extension == "png"
    assert image.content[24:26] == b"\x08\x02", "8 bits, RGB"
    with Image.open(io.BytesIO(image.content)) as stored:
        assert "transparency" not in stored.info
        assert (stored.mode, stored.format, stored.size) == ("RGB", "PNG", (24, 16))
        assert "icc_profile" not in stored.info
    if "16-bit" in name and "RGB" not in name:
        expected = np.repeat(np.round(GRAY16 / 257).astype(int)[..., None], 3, -1)
        assert np.abs(pixels(image.content) - expected).max() <= 1, "16 bits are scaled, not cut off"
    else:
        assert np.array_equal(pixels(image.content), pixels(content))


def test_cmyk_jpeg_becomes_rgb_jpeg() -> None:
    image = prepare_image(encode(picture(width=64, height=64).convert("CMYK"), "JPEG", quality=95))
    assert image.extension == "jpg"
    with Image.open(io.BytesIO(image.content)) as stored:
        assert (stored.mode, stored.format) == ("RGB", "JPEG")
    assert np.abs(pixels(image.content) - np.asarray(picture(width=64, height=64)).astype(int)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(), kind, exif=exif)
    image = prepare_image(content)
    assert (image.content == content) == (orientation == 1)
    assert (image.width, image.height) == ((24, 16) if orientation < 5 else (16, 24))
    with Image.open(io.BytesIO(content)) as original, Image.open(io.BytesIO(image.content)) as stored:
        assert stored.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(ImageOps.exif_transpose(original)).astype(int) - pixels(image.content)).mean() < 3


def test_garbage_in_exif_does_not_cost_the_image() -> None:
    content = encode(picture(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert prepare_image(content).content is content


def test_short_side_shrinks_only() -> None:
    large = encode(picture(width=301, height=200), "PNG")
    image = prepare_image(large, short_side=100)
    assert (image.extension, image.width, image.height) == ("jpg", 150, 100)
    assert np.abs(pixels(image.content) - np.asarray(picture(width=301, height=200).resize((150, 100))).astype(int)).mean() < 3
    assert len(prepare_image(large, short_side=100, quality=20).content) < len(image.content)
    assert prepare_image(large, short_side=200).content is large
    assert prepare_image(large, short_side=500).content is large


def test_what_is_too_long_for_a_jpeg_becomes_a_png() -> None:
    for width, kind in ((81_875, "jpg"), (81_876, "png")):
        image = prepare_image(encode(picture(width=width, height=10), "PNG"), short_side=8)
        assert (image.extension, image.width, image.height) == (kind, round(width * 0.8), 8)
        assert np.asarray(pixels(image.content)).shape[:2] == (8, image.width)


class Counting:
    """zlib's decompressor, and how many bytes go in and come out."""

    packed = unpacked = 0

    def __init__(self) -> None:
        self.real = REAL_DECOMPRESSOR()

    def decompress(self, part: bytes, *most: int) -> bytes:
        content = self.real.decompress(part, *most)
        Counting.packed, Counting.unpacked = Counting.packed + len(part), Counting.unpacked + len(content)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


REAL_DECOMPRESSOR = zlib.decompressobj


def test_a_png_is_checked_once_over(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8))
    content = encode(noise, "PNG", compress_level=0)
    monkeypatch.setattr("zlib.decompressobj", Counting)
    monkeypatch.setattr(Counting, "packed", 0)
    assert prepare_image(content).content is content
    assert 1500 * 4500 < Counting.packed <= len(content)


def black_png(*bodies: bytes) -> bytes:
    """A PNG of 8 x 8 pixels, whose data are in these chunks."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), *((b"IDAT", body) for body in bodies), (b"IEND", b"")]
    framed = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


BLACK = zlib.compress(bytes(8 * 25))


@pytest.mark.parametrize("bodies", [(BLACK,), (BLACK[:7], BLACK[7:]), (b"", *(bytes([byte]) for byte in BLACK), b"")])
def test_a_png_that_holds_its_pixels_is_kept(bodies: tuple[bytes, ...]) -> None:
    assert prepare_image(content := black_png(*bodies)).content is content


@pytest.mark.parametrize(
    "bodies",
    [(BLACK + b"x",), (BLACK, b"x"), (BLACK[:-2],), (BLACK[:-1] + b"x",), (zlib.compress(bytes(8 * 25 + 1)),)],
    ids=["more behind", "a chunk behind", "cut off", "another checksum", "one byte more"],
)
def test_a_png_that_holds_something_else_is_encoded_again(bodies: tuple[bytes, ...]) -> None:
    try:
        image = prepare_image(black_png(*bodies))
    except DataError:
        return  # Pillow does not take it either
    assert image.reason == "an incomplete or unusual PNG"


def test_a_png_with_far_more_than_its_pixels_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.decompressobj", Counting)
    monkeypatch.setattr(Counting, "unpacked", 0)
    assert prepare_image(black_png(zlib.compress(bytes(50_000_000)))).reason == "an incomplete or unusual PNG"
    assert 0 < Counting.unpacked < 6_000_000


def test_a_jpeg_full_of_fill_bytes_is_read_in_one_go() -> None:
    """Many 0xFF before a 0x00 are one 0xFF of data. A quadratic search takes minutes for these."""
    jpeg = encode(picture(), "JPEG")
    scan = jpeg.rindex(b"\xff\xd9")
    with cpu_time.at_most(10):
        prepare_image(jpeg[:scan] + b"\xff" * 200_000 + b"\0" + jpeg[scan:])


def test_shrinking_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    stored = pixels(prepare_image(encode(stripes, "PNG"), short_side=64).content)
    assert np.abs(stored[8:-8, 8:-8] - 127).max() < 20


def promising(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than the file holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    body = zlib.compress(bytes(1000))
    data = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + crc + data


@pytest.mark.parametrize(("width", "height"), [(10001, 10000), (9000, 12000)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def load(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(DataError, match="megapixels"):
        prepare_image(promising(width, height))


def test_reasons_are_one_line() -> None:
    for content in (b"text\n", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", encode(picture(), "PNG")[:60]):
        with pytest.raises(DataError) as caught:
            prepare_image(content)
        assert "\n" not in str(caught.value)
        assert str(caught.value)
    with pytest.raises(DataError, match=r"^not an image$"):  # a reader of Pillow's would start Ghostscript
        prepare_image(encode(picture(), "EPS"))


# ---- what is refused or left out


def test_bad_images_are_listed_and_left_out(tmp_path: Path) -> None:
    source = copy_animals(tmp_path / "src", 2)
    good = next((source / "gatto").iterdir()).read_bytes()
    (source / "cane" / "text.jpg").write_text("this is no image")
    (source / "cane" / "empty.png").touch()
    (source / "cane" / "cut.jpeg").write_bytes(good[: len(good) // 2])
    (source / "gatto" / "large.png").write_bytes(promising(10_001, 10_000))
    (source / "gatto" / "notes.txt").write_text("not taken for an image")
    (source / ".hidden").mkdir()
    summary = write_shards(source, tmp_path / "out")
    reasons = dict(summary.rejected)
    assert set(reasons) == {"cane/text.jpg", "cane/empty.png", "cane/cut.jpeg", "gatto/large.png"}
    assert reasons["cane/text.jpg"] == "not an image"
    assert reasons["cane/empty.png"] == "an empty file"
    assert "truncated" in reasons["cane/cut.jpeg"]
    assert "10001 x 10000" in reasons["gatto/large.png"]
    assert set(dict(summary.skipped)) == {".hidden", "gatto/notes.txt"}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert {(line["source"], line["reason"]) for line in map(json.loads, lines)} == set(reasons.items())
    assert summary.written == len(check_folder(tmp_path / "out")) == 20

    with pytest.raises(DataError, match=r"strict, and 4 images cannot be used; the first: cane/cut.jpeg"):
        write_shards(source, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_bad_parquet_rows(tmp_path: Path) -> None:
    names = json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})
    table = pa.table({"image": [encode(picture(), "PNG"), None, b"text", encode(picture(1), "PNG")], "label": [0, 1, 1, 2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": names}), tmp_path / "src.parquet")
    summary = write_shards(tmp_path / "src.parquet", tmp_path / "out")
    assert summary.written == 1
    assert dict(summary.rejected) == {
        "src.parquet#1": "no image bytes",
        "src.parquet#2": "not an image",
        "src.parquet#3": "label 2 is not one of 2 classes",
    }


def nothing(path: Path) -> None:
    path.mkdir()


def only_text(path: Path) -> None:
    path.mkdir()
    (path / "a.jpg").write_text("hello")


def mixed(path: Path) -> None:
    flat(path, 1)
    flat(path / "class", 1)


def split_folders(path: Path) -> None:
    flat(path / "train" / "cat", 1)
    flat(path / "test" / "cat", 1)


def split_parquet(path: Path) -> None:
    path.mkdir()
    for name in ("train-00000-of-00001.parquet", "test.parquet"):
        pq.write_table(pa.table({"image": [b"x"]}), path / name)


def no_parquet(path: Path) -> None:
    path.mkdir()
    (path / "a.parquet").write_text("hello")


def text_parquet(path: Path) -> None:
    path.mkdir()
    pq.write_table(pa.table({"text": ["x"]}), path / "a.parquet")


def text_labels(path: Path) -> None:
    path.mkdir()
    pq.write_table(pa.table({"image": [b"x"], "label": ["cat"]}), path / "a.parquet")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: None, "no such folder"),
        (lambda path: path.write_text("hello"), "nor a .parquet, .arrow, .tar, .zip or .csv file"),
        (nothing, "no image found"),
        (only_text, r"none of its 1 images can be used; the first: a.jpg \(not an image\)"),
        (mixed, "holds both images"),
        (split_folders, "holds the splits test, train"),
        (split_parquet, r"several splits \(test, train\)"),
        (no_parquet, "not a readable Parquet file"),
        (text_parquet, "0 columns could hold image bytes"),
        (text_labels, "column 'label' is string"),
    ],
)
def test_unusable_sources(tmp_path: Path, make: Callable[[Path], Any], says: str) -> None:
    make(tmp_path / "src")
    with pytest.raises(DataError, match=says) as caught:
        write_shards(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "src") in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".tar", f"there/{'x' * 300}", "x" * 300 + "*"])
def test_names_that_no_file_has_are_one_line(tmp_path: Path, name: str) -> None:
    long = tmp_path / name
    with pytest.raises(DataError, match=f"^{re.escape(str(long))}: (no such folder|this pattern must)[^\n]*$"):
        write_shards(long, tmp_path / "out")
    for refused in (index_shards, verify_shards, load_manifest):
        with pytest.raises(DataError, match=f"^{re.escape(str(long))}: no such folder[^\n]*$"):
            refused(long)
    with pytest.raises(DataError, match=f"^{re.escape(str(long))}: cannot be written: File name too long$"):
        write_shards(flat(tmp_path / "src", 1), long)
    with pytest.raises(DataError, match=r"cannot be written: File name too long$"):
        write_shards(tmp_path / "src", tmp_path / ("x" * 250))


def test_a_used_destination_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 2)
    (tmp_path / "out").mkdir()
    write_shards(source, tmp_path / "out")  # an empty folder is fine
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"exists and is not empty; name a new folder$"):
        write_shards(source, tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == before
    for destination in (source / "shards", source, tmp_path):
        with pytest.raises(DataError, match="inside the source or holds it"):
            write_shards(source, destination)
    with pytest.raises(DataError, match="is a file"):
        write_shards(source, tmp_path / "out" / MANIFEST_NAME)


def test_a_folder_that_only_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    source = flat(tmp_path / "src", 2)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not made by simclr-dist"):
        write_shards(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shard_size": 0}, "shard_size: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"short_side": 0}, "short_side: 0"),
        ({"quality": 101}, "quality: 101"),
        ({"quality": 50, "channels": 1}, "quality: 50 has no effect on 1 channel of 8 bits, stored without loss"),
        ({"processes": 0}, "processes: 0"),
        ({"split": (0.8, 0.3)}, "split: 0.8/0.3"),
        ({"split": (1.0, 0.0)}, "split: 1/0"),
        ({"split": (0.5, 0.3, 0.1, 0.1)}, "split: 0.5/0.3/0.1/0.1"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        write_shards(flat(tmp_path / "src", 2), tmp_path / "out", **settings)


# ---- split


def test_split_is_stratified_and_disjoint(tmp_path: Path) -> None:
    source = copy_animals(tmp_path / "src", 10)
    first = sorted((source / "cane").iterdir())[0]
    for i in range(6):
        (source / "cane" / f"copy{i}.jpeg").write_bytes(first.read_bytes())
    summary = write_shards(source, tmp_path / "out", split=(0.8, 0.2))
    assert summary.destinations == (tmp_path / "out" / "train", tmp_path / "out" / "test")
    assert summary.duplicates == 6
    train, test = (load_manifest(folder) for folder in summary.destinations)
    assert len(train) + len(test) == summary.written == 106
    assert not set(train.key) & set(test.key)
    hashes = [{row.tobytes() for row in part.sha256} for part in (train, test)]
    assert not hashes[0] & hashes[1], "an image, and its copies, must be on one side only"
    assert train.classes == test.classes == summary.classes
    different = Counter(label for label, _ in {(int(m), h.tobytes()) for m, h in zip(test.label, test.sha256, strict=True)})
    assert different == dict.fromkeys(range(10), 2)
    for folder in summary.destinations:
        check_folder(folder)
    write_shards(source, tmp_path / "other", split=(0.8, 0.2), seed=1)
    assert set(load_manifest(tmp_path / "other" / "test").key) != set(test.key)


def test_split_of_small_classes_keeps_the_share_of_the_whole(tmp_path: Path) -> None:
    for label in range(10):
        flat(tmp_path / "src" / f"class{label}", 3)
        for i, path in enumerate(sorted((tmp_path / "src" / f"class{label}").iterdir())):
            path.write_bytes(encode(picture(label * 3 + i, width=20 + label), "PNG"))
    write_shards(tmp_path / "src", tmp_path / "out", split=(0.9, 0.1))
    assert len(load_manifest(tmp_path / "out" / "test")) == 3


def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves one side empty"):
        write_shards(flat(tmp_path / "src", 3), tmp_path / "out", split=(0.8, 0.2))
    assert not (tmp_path / "out").exists()


# ---- kills

SCRIPT = """
import sys
from simclr_dist.convert.index import index_shards
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.verify import verify_shards
if __name__ == "__main__":
    write_shards(sys.argv[1], sys.argv[2], shard_size=50, processes=int(sys.argv[3]))
"""


def start(tmp_path: Path, source: Path, processes: int) -> "subprocess.Popen[bytes]":
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), str(processes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def session_of(leader: int) -> list[int]:
    """Live processes of the session that `leader` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "moment"), [(1, "out/*.tar"), (2, "units/*"), (2, "out/*.tar")])
def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path, processes: int, moment: str) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to list processes")
    cifar(tmp_path / "src" / "data.parquet", rows=1000)
    run = start(tmp_path, tmp_path / "src", processes)
    assert run.stderr is not None
    try:
        wait_for(lambda: run.poll() is not None or list(tmp_path.glob(f"out.partial/{moment}")))
        assert run.poll() is None, "the run ended before it could be killed"
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial").exists()
        wait_for(lambda: not session_of(run.pid))  # its workers must not stay behind
    finally:
        run.stderr.close()
    write_shards(tmp_path / "src", tmp_path / "out", shard_size=50, processes=1)
    write_shards(tmp_path / "src", tmp_path / "straight", shard_size=50, processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_second_run_and_a_killed_worker_end_in_one_line(tmp_path: Path) -> None:
    cifar(tmp_path / "src" / "data.parquet", rows=1000)
    run = start(tmp_path, tmp_path / "src", 2)
    assert run.stderr is not None
    with run.stderr:
        wait_for(lambda: list(tmp_path.glob("out.partial/units/*")))
        os.kill(run.pid, signal.SIGSTOP)
        worker = max(set(session_of(run.pid)) - {run.pid})
        with pytest.raises(DataError, match="another run is writing it"):
            write_shards(tmp_path / "src", tmp_path / "out")
        os.kill(worker, signal.SIGKILL)
        os.kill(run.pid, signal.SIGCONT)
        message = run.stderr.read().decode().splitlines()[-1]
    assert run.wait() == 1
    assert "ReadError" in message
    assert "a worker process died" in message
    assert not (tmp_path / "out").exists()
    write_shards(tmp_path / "src", tmp_path / "out", shard_size=50)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
def test_a_worker_that_is_stopped_holds_no_run_up(tmp_path: Path, ends: str) -> None:
    cifar(tmp_path / "src" / "data.parquet", rows=1000)
    silent = "from simclr_dist.convert import workers\nworkers._SILENT_SECONDS = 1.0\n" if ends == "by itself" else ""
    (tmp_path / "script.py").write_text(silent + SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "src"), str(tmp_path / "out"), "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True) as run:
        wait_for(lambda: list(tmp_path.glob("out.partial/units/*")))
        for worker in sorted(set(session_of(run.pid)) - {run.pid})[-2:]:
            os.kill(worker, signal.SIGSTOP)
        if ends == "by Ctrl-C":
            time.sleep(0.5)
            run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
        wait_for(lambda: not session_of(run.pid))
    assert ("no worker process has done anything" if ends == "by itself" else "KeyboardInterrupt") in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_shared_memory_without_room_for_a_semaphore_is_one_line(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    cifar(tmp_path / "src" / "data.parquet", rows=1000)
    with SmallDisk(Path("/dev/shm"), 1) as shared:
        shared.fill()
        command = [sys.executable, "-m", "simclr_dist", "shard", str(tmp_path / "src"), str(tmp_path / "out"), "--processes=2"]
        done = subprocess.run([*shared.enter, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("simclr-dist: /dev/shm: no worker process can start: No space left on device; give it more")
