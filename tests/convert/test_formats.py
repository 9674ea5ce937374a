"""Formats of their own: what each one's library or specification writes comes out as the same images and labels, in order.
What is damaged, pickled or unclear is one line. `formats/write.py` made the files in formats/."""

import io
import itertools
import json
import random
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import lmdb
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from pictures import contents, encoded, stored
from simclr_dist.cli.manual import ABOUT
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.sources import imagenet, indexed, npz
from simclr_dist.convert.sources.find import KINDS, find_source
from simclr_dist.data.pixels.channels import write_png
from simclr_dist.system.errors import ConfigError, DataError

FORMATS = Path(__file__).with_name("formats")
NO_LABELS = {"label_column": "none"}


def refused(source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        write_shards(source, out, processes=1, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def labels_of(folder: Path) -> list[int]:
    """Labels in the source's order."""
    return [label for _, (label, _) in sorted(stored(folder).items(), key=lambda item: int(item[0].rpartition("#")[2]))]


def shards_of(source: Path | str, out: Path, **options: Any) -> dict[str, tuple[int, bytes]]:
    """What one process makes of it; two make the same bytes."""
    write_shards(source, out, processes=1, **options)
    write_shards(source, out.with_name("again"), processes=2, **options)
    assert contents(out) == contents(out.with_name("again"))
    shutil.rmtree(out.with_name("again"))
    return stored(out)


def test_every_kind_is_in_the_help_and_in_the_guide() -> None:
    guide = Path(__file__).parents[2].joinpath("docs/guide.md").read_text().replace("`", "")
    for kind in KINDS:
        assert kind.what in ABOUT["shard"].replace("\n", " "), kind.what
        assert kind.what in guide, kind.what


# ---- arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pixels_keep_all_their_bits(shape: tuple[int, ...], kind: type) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    content = write_png(array)
    assert content == write_png(array)
    expected = array[:, :, 0] if shape[2:] == (1,) else array
    if kind is np.uint16:  # Pillow shows RGB with 8 bits
        assert content[24:26] == bytes([16, 2 if shape[2:] == (3,) else 0])
        packed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        read = torch.ops.image.decode_image(packed, 0, False)  # as it is
        assert np.array_equal(read.numpy().transpose(1, 2, 0).reshape(expected.shape), expected)
    else:
        assert np.array_equal(pixels_of(content), expected)


# ---- CIFAR and STL-10


def pictures(count: int, side: int, channels: int = 3) -> np.ndarray:
    shape = (count, side, side, channels) if channels > 1 else (count, side, side)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def write_cifar(folder: Path, name: str, images: np.ndarray, *labels: list[int]) -> Path:
    """By its page: a record is the labels, then red, green and blue, each row by row."""
    folder.mkdir(exist_ok=True)
    records = [bytes(label[i] for label in labels) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)]
    (folder / name).write_bytes(b"".join(records))
    return folder / name


def test_cifar10(tmp_path: Path) -> None:
    source = tmp_path / "cifar-10-batches-bin"
    images = pictures(150, 32)
    for number in (1, 2):
        part = slice(0, 140) if number == 1 else slice(140, 150)
        write_cifar(source, f"data_batch_{number}.bin", images[part], [i % 2 for i in range(150)][part])
    write_cifar(source, "test_batch.bin", pictures(3, 32), [1, 1, 0])
    (source / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    (source / "readme.html").write_text("<html>")
    one = f"holds training and test images; name one: '{source}/data_batch_*.bin' or {source}/test_batch.bin"
    assert one in refused(source, tmp_path / "out")
    found = shards_of(source / "data_batch_*.bin", tmp_path / "train")
    assert len(found) == 150
    for i in range(150):
        label, content = found[f"data_batch_1.bin#{i}" if i < 140 else f"data_batch_2.bin#{i - 140}"]
        assert label == i % 2
        assert np.array_equal(pixels_of(content), images[i])
    test = write_shards(source / "test_batch.bin", tmp_path / "test", processes=1)
    assert test.classes == ("airplane", "automobile")
    assert labels_of(tmp_path / "test") == [1, 1, 0]
    write_shards(source / "test_batch.bin", tmp_path / "bare", processes=1, **NO_LABELS)
    assert labels_of(tmp_path / "bare") == [-1] * 3
    assert "takes none here" in refused(source / "test_batch.bin", tmp_path / "out", label_column="fine")
    assert "--image-column: 'x' has no effect" in refused(source / "test_batch.bin", tmp_path / "out", image_column="x")
    for path in source.glob("data_batch_*"):
        path.unlink()
    write_cifar(source, "test_batch.bin", pictures(2, 32), [0, 7])
    summary = write_shards(source, tmp_path / "folder", processes=1)
    assert summary.rejected == (("test_batch.bin#1", "label 7 is not one of 2 classes"),)
    assert summary.skipped == ()
    (source / "test_batch.bin").write_bytes((source / "test_batch.bin").read_bytes()[:-1])
    assert "is cut off, or another format: it is no multiple of 3073 bytes" in refused(source, tmp_path / "out")


def test_cifar100_has_two_kinds_of_labels(tmp_path: Path) -> None:
    source = tmp_path / "cifar-100-binary"
    write_cifar(source, "train.bin", pictures(4, 32), [0, 1, 1, 0], [5, 6, 7, 5])
    write_cifar(source, "test.bin", pictures(2, 32), [0, 1], [5, 6])
    (source / "coarse_label_names.txt").write_text("fish\nfruit\n")
    (source / "fine_label_names.txt").write_text("\n".join("abcdefgh"))
    assert f"several splits (test, train); name one, like {source}/test.bin" in refused(source, tmp_path / "out")
    fine = write_shards(source / "train.bin", tmp_path / "fine", processes=1)
    coarse = write_shards(source / "train.bin", tmp_path / "coarse", processes=1, label_column="coarse")
    assert (fine.classes, coarse.classes) == (tuple("abcdefgh"), ("fish", "fruit"))
    assert (labels_of(tmp_path / "fine"), labels_of(tmp_path / "coarse")) == ([5, 6, 7, 5], [0, 1, 1, 0])


@pytest.mark.parametrize("names", [["data_batch_1", "test_batch", "batches.meta"], ["train", "test", "meta"]])
def test_pickled_cifar_is_not_unpickled(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / "src" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"\x80\x02cos\nabort\n)R.")
    for source in (tmp_path / "src" / names[0], tmp_path / "src"):
        assert "pickled and never unpickled; take its binary version" in refused(source, tmp_path / "out")


def test_stl10_is_what_torchvision_reads(tmp_path: Path) -> None:
    source = tmp_path / "stl10_binary"
    source.mkdir()
    images = pictures(130, 96)
    by_columns = images.transpose(0, 3, 2, 1)
    for name, count in (("train", 130), ("test", 5), ("unlabeled", 4)):
        (source / f"{name}_X.bin").write_bytes(by_columns[:count].tobytes())
        (source / f"{name}_y.bin").write_bytes(bytes(i % 2 + 1 for i in range(count)) if name != "unlabeled" else b"")
    (source / "unlabeled_y.bin").unlink()
    (source / "class_names.txt").write_text("airplane\nbird\n")
    assert f"several splits (test, train, unlabeled); name one, like {source}/test_X.bin" in refused(source, tmp_path / "out")
    found = shards_of(source / "train_X.bin", tmp_path / "train")
    reader = object.__new__(torchvision.datasets.STL10)
    reader.root = str(tmp_path)
    read, labels = reader._STL10__loadfile("train_X.bin", "train_y.bin")
    assert len(found) == 130
    for i in range(130):
        label, content = found[f"train_X.bin#{i}"]
        assert label == labels[i]
        assert np.array_equal(pixels_of(content).transpose(2, 0, 1), read[i])
        assert np.array_equal(pixels_of(content), images[i])
    bare = write_shards(source / "unlabeled_X.bin", tmp_path / "bare", processes=1)
    assert bare.classes == ()
    assert labels_of(tmp_path / "bare") == [-1] * 4
    assert write_shards(source / "test_X.bin", tmp_path / "test", processes=1).classes == ("airplane", "bird")
    (source / "test_y.bin").write_bytes(b"\1")
    assert "has 1 labels for the 5 images of test_X.bin" in refused(source / "test_X.bin", tmp_path / "out")
    (source / "test_y.bin").unlink()
    assert "or take none with --label-column none" in refused(source / "test_X.bin", tmp_path / "out")
    assert write_shards(source / "test_X.bin", tmp_path / "none", processes=1, **NO_LABELS).classes == ()


# ---- MedMNIST


def med(count: int = 300, shape: tuple[int, ...] = (28, 28), kind: type = np.uint8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", count), ("val", 5), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, np.iinfo(kind).max, (n, *shape), kind)
        arrays[f"{split}_labels"] = rng.integers(0, 9, (n, 1), np.uint8)
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(28, 28), (64, 64, 3)])
def test_medmnist(tmp_path: Path, save: Callable[..., None], shape: tuple[int, ...]) -> None:
    path, arrays = tmp_path / "src" / "pathmnist.npz", med(300, shape)
    path.parent.mkdir()
    save(path, **arrays)
    for source in (path, path.parent):
        assert f"has images of train, val, test; name one, like {path}/train" in refused(source, tmp_path / "out")
    assert "has images of train, val, test" in refused(path / "trian", tmp_path / "out")
    assert len(find_source(path / "train").chunks) == 3
    found = shards_of(path / "train", tmp_path / "train")
    assert len(found) == 300
    for i in range(300):
        label, content = found[f"pathmnist.npz/train#{i}"]
        assert label == arrays["train_labels"][i, 0]
        assert np.array_equal(pixels_of(content), arrays["train_images"][i])
    write_shards(path / "test", tmp_path / "test", processes=1)
    assert labels_of(tmp_path / "test") == arrays["test_labels"][:, 0].tolist()
    write_shards(path / "val", tmp_path / "bare", processes=1, **NO_LABELS)
    assert labels_of(tmp_path / "bare") == [-1] * 5


def test_a_large_array_has_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "IMAGES_A_CHUNK", 2)
    np.savez_compressed(tmp_path / "a.npz", **med(100))
    chunks = find_source(tmp_path / "a.npz" / "train").chunks
    assert (len(chunks), sum(map(len, chunks))) == (15, 100)


def test_16_bits_come_through_a_npz(tmp_path: Path) -> None:
    arrays = med(3, (8, 8), np.uint16)
    np.savez(tmp_path / "a.npz", **arrays)
    originals = [original for chunk in find_source(tmp_path / "a.npz" / "train").chunks for original in chunk.read()]
    assert [np.array_equal(pixels_of(o.content), arrays["train_images"][i]) for i, o in enumerate(originals)] == [True] * 3


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def says(**changed: Any) -> str:
        np.savez_compressed(path, **(med(4) | changed))
        return refused(path / "train", tmp_path / "out")

    assert "train_images.npy: volumes of uint8, and no images" in says(train_images=np.zeros((4, 28, 28, 28), np.uint8))
    assert "an array [4, 28, 28] of float32, and no images" in says(train_images=np.zeros((4, 28, 28), np.float32))
    several = says(train_labels=np.zeros((4, 14), np.uint8))
    assert "[4, 14] is not one label for each of 4 images; take none with --label-column none" in several
    assert "holds pickled objects, which are never unpickled" in says(train_labels=np.array([[1], [2], [3], None], object))
    assert "holds pickled objects" in says(train_images=np.array([None] * 4, object))
    assert "-7 is no label" in says(train_labels=np.array([1, 2, 3, -7]))
    assert "labels are float64" in says(train_labels=np.zeros((4, 1)))
    assert "kept by columns" in says(train_images=np.asfortranarray(np.zeros((4, 28, 28), np.uint8)))
    assert "no image in it" in says(train_images=np.zeros((0, 28, 28), np.uint8))
    assert "train_images.npy: 10000 x 10001 is more than 100 megapixels" in says(
        train_images=np.zeros((1, 10000, 10001), np.uint8)
    )
    np.savez(path, images=np.zeros((4, 28, 28), np.uint8))
    assert "has images of no split" in refused(path, tmp_path / "out")
    path.write_bytes(b"hello")
    assert "not a readable .npz file" in refused(path, tmp_path / "out")


def test_a_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, **med(300))
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo("train_images.npy").header_offset + 5000
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "train_images.npy: is damaged" in refused(path / "train", tmp_path / "out")
        path.write_bytes(whole[:at])
        assert "not a readable .npz file" in refused(path / "train", tmp_path / "out")


def test_a_npz_that_lies_about_its_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", header.getvalue())
    said = len(header.getvalue())
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", said), struct.pack("<I", 2**32 - 2)))
    assert "says that it is larger than it can be" in refused(path, tmp_path / "out", **NO_LABELS)


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4)}\n"


@pytest.mark.parametrize(
    ("header", "version"),
    [
        (HEADER, 3),
        (HEADER.replace("(2, 4, 4)", "(-2, -4, 4)"), 1),
        ("{'descr': '|u1', (((\n", 1),
        ("(" * 9000 + "\n", 1),
        ("  x\n y\n", 1),
    ],
)
def test_headers_that_numpy_does_not_write(tmp_path: Path, header: str, version: int) -> None:
    path, length = tmp_path / "a.npz", len(header).to_bytes(4 if version > 1 else 2, "little")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + bytes(32))
    assert "not a readable .npz file" in refused(path, tmp_path / "out", **NO_LABELS)


# ---- ImageNet


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_training(path: Path) -> Path:
    members = {}
    for synset in ("n02000000", "n01000000"):
        number = itertools.count(int(synset[2:3]) * 10)
        images = {f"{synset}_{i}.JPEG": encoded(next(number), "JPEG") for i in range(3)} | {"notes.txt": b"x"}
        members[f"{synset}.tar"] = write_tar(path.with_name("inner.tar"), images).read_bytes()
    path.with_name("inner.tar").unlink()
    return write_tar(path, members)


def test_imagenet_trains_from_its_tar_of_tars(tmp_path: Path) -> None:
    source = write_training(tmp_path / "ILSVRC2012_img_train.tar")
    found = shards_of(source, tmp_path / "out")
    assert find_source(source).classes == ("n01000000", "n02000000")
    assert found == {
        f"ILSVRC2012_img_train.tar/n0{k}000000/n0{k}000000_{i}.JPEG": (k - 1, encoded(10 * k + i, "JPEG"))
        for k in (1, 2)
        for i in range(3)
    }
    whole = source.read_bytes()
    for end, says in ((len(whole) // 2, "ILSVRC2012_img_train.tar"), (3000, "n02000000.tar")):
        source.write_bytes(whole[:end])
        assert says in refused(source, tmp_path / "none")
    source.write_bytes(whole.replace(b"n02000000_1.JPEG", b"../000000_1.JPEG"))
    assert "damaged" in refused(source, tmp_path / "none")  # its header has a checksum
    inner = write_tar(tmp_path / "inner.tar", {"n01000000_0.JPEG": encoded(0, "JPEG")}).read_bytes()
    write_tar(source, {"n01000000.tar": inner.rstrip(b"\0").ljust(-(-len(inner.rstrip(b"\0")) // 512) * 512, b"\0")})
    assert "ILSVRC2012_img_train.tar/n01000000.tar: ends without an end mark" in refused(source, tmp_path / "none")


def write_validation(folder: Path, count: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": encoded(i, "JPEG") for i in range(1, count + 1)}
    return write_tar(folder / "ILSVRC2012_img_val.tar", images)


SYNSETS = ["n03", "n01", "n02", "n01", "n03", "n02"]


def test_imagenet_validates_by_its_ground_truth(tmp_path: Path) -> None:
    source = write_validation(tmp_path / "src")
    folder = source.parent
    said = refused(source, tmp_path / "out")
    assert "has no classes of the validation images; put imagenet_2012_validation_synset_labels.txt there, or ILSVRC" in said
    bare = shards_of(source, tmp_path / "bare", **NO_LABELS)
    assert {label for label, _ in bare.values()} == {-1}
    expected = [2, 0, 1, 0, 2, 1]
    ids = [f"{synset[:2]}{synset[2]}000000"[:9] for synset in SYNSETS]
    (folder / imagenet.SYNSETS).write_text("\n".join(ids) + "\n")
    found = shards_of(source, tmp_path / "synsets")
    assert [label for _, (label, _) in sorted(found.items())] == expected
    assert find_source(source).classes == ("n01000000", "n02000000", "n03000000")
    (folder / imagenet.SYNSETS).write_text("\n".join(ids[:-1]))
    assert "has 5 lines for the 6 images" in refused(source, tmp_path / "out")
    (folder / imagenet.SYNSETS).write_text("\n".join([*ids[:-1], "tench"]))
    assert "line 6: 'tench' is no class" in refused(source, tmp_path / "out")
    (folder / imagenet.SYNSETS).unlink()
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    number = {"n01000000": 3, "n02000000": 1, "n03000000": 2}
    (kit / imagenet.TRUTH).write_text("".join(f"{number[name]}\n" for name in ids))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(i, name, "a word", "a gloss", 0) for name, i in number.items()] + [(4, "n00000000", "animal", "", 3)]
    savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    assert shards_of(source, tmp_path / "kit") == found
    summary = write_shards(folder, tmp_path / "folder", processes=1)  # the folder holds nothing else
    assert (summary.classes, summary.skipped) == (("n01000000", "n02000000", "n03000000"), ())
    (kit / imagenet.TRUTH).write_text("7\n" * 6)
    assert "number 7 is none of" in refused(source, tmp_path / "out")
    (kit / "meta.mat").write_bytes(b"hello")
    assert "not the devkit's meta.mat" in refused(source, tmp_path / "out")
    write_training(folder / "ILSVRC2012_img_train.tar")
    assert f"several splits (train, val); name one, like {folder}/ILSVRC2012_img_train.tar" in refused(folder, tmp_path / "out")


def test_without_scipy_the_other_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_validation(tmp_path / "src")
    (source.parent / imagenet.TRUTH).write_text("1\n" * 6)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy, or put imagenet_2012_validation_synset_labels.txt" in refused(source, tmp_path / "out")


# ---- LMDB


def write_lmdb(path: Path, items: dict[bytes, bytes], **how: Any) -> Path:
    with lmdb.open(str(path), map_size=1 << 28, **how) as env, env.begin(write=True) as changes:
        for key, value in items.items():
            changes.put(key, value)
    return path


def test_lmdb(tmp_path: Path) -> None:
    """Values in their pages and in pages of their own, a tree of several floors, and pages that were freed."""
    items = {b"%s/%05d-%s" % ((b"cat", b"dog")[i % 2], i, b"x" * 400): encoded(i) for i in range(700)}
    large = b"dog/large"
    items[large] = encoded(1, "BMP", 120, 90)
    items |= {b"__len__": b"\x80\x04K\x05.", b"__keys__": b"x"}
    source = write_lmdb(tmp_path / "src", items)
    with lmdb.open(str(source), map_size=1 << 28) as env:
        for key in list(items)[0:700:7]:
            with env.begin(write=True) as changes:
                changes.delete(key)
            del items[key]
        assert env.stat()["depth"] > 2
    summary = write_shards(source, tmp_path / "one", processes=1)
    assert summary.classes == ("cat", "dog")
    assert summary.skipped == (("data.mdb/__keys__", "no image's key"), ("data.mdb/__len__", "no image's key"))
    found = shards_of(source / "data.mdb", tmp_path / "out")
    images = {key.decode(): value for key, value in items.items() if not key.startswith(b"__")}
    assert {name.removeprefix("data.mdb/") for name in found} == set(images)
    for name, content in images.items():
        label, kept = found[f"data.mdb/{name}"]
        assert label == name.startswith("dog")
        assert kept == content or name == large.decode()
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
    order = [original.name for chunk in find_source(source).chunks for original in chunk.read()]
    assert order == sorted(order)


def test_keys_of_an_lmdb(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "one.lmdb", {struct.pack(">I", i): encoded(i) for i in range(3)}, subdir=False)
    assert set(shards_of(source, tmp_path / "out")) == {f"one.lmdb/{i:08x}" for i in range(3)}
    mixed = write_lmdb(tmp_path / "mixed", {b"a": encoded(0), b"b/1": encoded(1), b"c/2": b"no image"})
    assert "put every image into a class folder, or none" in refused(mixed, tmp_path / "none")
    summary = write_shards(mixed, tmp_path / "bare", processes=1, **NO_LABELS)
    assert (summary.written, summary.rejected) == (2, (("data.mdb/c/2", "not an image"),))


def endless_lmdb(path: Path, depth: int = 30, keys: int = 100) -> Path:
    """All keys of a page lead to the next one, and the last one is empty: 100 ** 29 ways."""
    pages = bytearray()
    for number in range(2):
        roots = struct.pack("<IHHQQQQQ", 4096, 0, 0, 0, 0, 0, 0, 0) + struct.pack("<IHHQQQQQ", 0, 0, depth, 0, 0, 0, 1, 2)
        about = struct.pack("<QHHHHIIQQ", number, 0, 8, 0, 0, 0xBEEFC0DE, 1, 0, 1 << 30) + roots
        pages += (about + struct.pack("<QQ", 100, number)).ljust(4096, b"\0")
    for number in range(2, depth + 2):
        count = keys if number < depth + 1 else 0
        head = struct.pack("<QHHHH", number, 0, 1 if count else 2, 16 + 2 * count, 4096) + struct.pack("<H", 2048) * count
        node = struct.pack("<HHHH", number + 1, 0, 0, 0)
        pages += (head.ljust(2048, b"\0") + node).ljust(4096, b"\0")
    path.write_bytes(pages)
    return path


def test_lmdbs_that_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "named"), max_dbs=1) as env:
        inner = env.open_db(b"images")
        with env.begin(write=True) as changes:
            changes.put(b"a", encoded(), db=inner)
    assert "holds tables by name, like 'images'" in refused(tmp_path / "named", tmp_path / "out")
    assert "no image in it" in refused(write_lmdb(tmp_path / "empty", {}), tmp_path / "out")
    source = write_lmdb(tmp_path / "src", {b"%03d" % i: encoded(i) for i in range(200)} | {b"x": encoded(1, "BMP", 120, 90)})
    path = source / "data.mdb"
    whole = path.read_bytes()
    for end in (0, 100, 5000, 9000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:end])
        said = refused(source, tmp_path / "out")
        assert "data.mdb: " in said
        assert "cut off" in said
    with pytest.raises(DataError, match="pages lead back to each other"):
        find_source(endless_lmdb(tmp_path / "endless.mdb"))
    newer = bytearray(whole)
    for page in (0, 4096):
        newer[page + 20] = 2
    path.write_bytes(newer)
    assert "has format 2 of LMDB" in refused(source, tmp_path / "out")


# ---- TFRecord


def pictured(i: int, kind: str = "JPEG") -> bytes:
    """As formats/write.py makes them."""
    target = io.BytesIO()
    Image.new("RGB", (10, 8), (30 * i, 200, 9 * i)).save(target, kind)
    return target.getvalue()


def record(content: bytes) -> bytes:
    def crc(part: bytes) -> bytes:
        value = google_crc32c.value(part)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(content))
    return length + crc(length) + content + crc(content)


def test_what_tensorflow_writes(tmp_path: Path) -> None:
    source = shutil.copytree(FORMATS, tmp_path / "src", ignore=lambda _, names: [n for n in names if "tfrecord" not in n])
    found = shards_of(source, tmp_path / "out")
    places = {i: f"pictures-train.tfrecord-{i // 4:05d}-of-00002#{i % 4}" for i in range(7)}
    assert {name: label for name, (label, _) in found.items()} == {places[i]: i % 3 for i in range(7)}
    assert all(abs(pixels_of(found[places[i]][1]).astype(int) - (30 * i, 200, 9 * i)).max() < 4 for i in range(7))
    (source / "label.labels.txt").write_text("red\ngreen\nblue\n")
    summary = write_shards(source / "*-00001-of-00002", tmp_path / "one", processes=1)
    assert (summary.written, summary.classes) == (3, ("red", "green", "blue"))
    write_shards(source, tmp_path / "bare", processes=1, **NO_LABELS)
    assert {label for label, _ in stored(tmp_path / "bare").values()} == {-1}
    (source / "label.labels.txt").write_text("red\ngreen\n")
    summary = write_shards(source, tmp_path / "few", processes=1)
    assert {problem.reason for problem in summary.rejected} == {"label 2 is not one of 2 classes"}
    shutil.copy(source / "pictures-train.tfrecord-00000-of-00002", source / "pictures-test.tfrecord-00000-of-00001")
    assert f"several splits (test, train); name one, like {source}/pictures-test" in refused(source, tmp_path / "none")


def test_features_are_chosen(tmp_path: Path) -> None:
    source = FORMATS / "pictures-train.tfrecord-00000-of-00002"
    labels = {"label": [0, 1, 2, 0], "negative": [-1]}
    for name, expected in labels.items():
        summary = write_shards(source, tmp_path / name, processes=1, label_column=name)
        assert [label for _, (label, _) in sorted(stored(tmp_path / name).items())] == expected
    assert [problem.reason for problem in summary.rejected] == [f"label {-i} is not one of the classes" for i in (2, 3, 4)]
    for column, reason in (("many", "3 labels in feature 'many'"), ("none", "0 labels")):
        said = refused(source, tmp_path / "out", label_column=column) if column != "none" else None
        assert said is None or reason in said
    has = "its first record has image, label, many, negative, none, size"
    assert f"which feature is the image? Choose with --image-column; {has}" in refused(source, tmp_path / "x", image_column="y")
    assert f"no feature 'y' (--label-column); {has}" in refused(source, tmp_path / "x", label_column="y")
    assert "0 images in feature 'label'" in refused(source, tmp_path / "x", image_column="label")


def test_damaged_records(tmp_path: Path) -> None:
    whole = (FORMATS / "pictures-train.tfrecord-00000-of-00002").read_bytes()
    path = tmp_path / "a.tfrecord"
    for end in (5, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert f"{path}: is" in refused(path, tmp_path / "out")
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "is no TFRecord file, is damaged, or is cut off (at byte 0)" in refused(path, tmp_path / "out")
    path.write_bytes(b"\x1f\x8b" + whole)
    assert "is compressed; unpack that first" in refused(path, tmp_path / "out")
    path.write_bytes(b"")
    assert "has no records" in refused(path, tmp_path / "out")
    path.write_bytes(record(b"hello"))
    assert "its first record is no tf.train.Example" in refused(path, tmp_path / "out")
    path.write_bytes(record(bytes(0x78)) + record(bytes(0x8B1F)))  # their lengths look like zlib's and gzip's first bytes
    assert "its first record is no tf.train.Example" in refused(path, tmp_path / "out")
    at = whole.index(b"\xff\xd8") + 300
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] + record(b"hello") + record(b""))
    summary = write_shards(path, tmp_path / "some", processes=1)
    reasons = [(name, reason.split(" (")[0]) for name, reason in summary.rejected]
    assert reasons == [
        ("a.tfrecord#0", "its bytes do not fit its CRC"),
        ("a.tfrecord#4", "no tf.train.Example"),
        ("a.tfrecord#5", "an empty file"),
    ]


def test_without_the_checksums_package_the_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert "pip install 'simclr_dist[tfrecord]'" in refused(
        FORMATS / "pictures-train.tfrecord-00000-of-00002", tmp_path / "out"
    )


# ---- MDS and LitData


@pytest.mark.parametrize("name", ["mds", "mds-zstd", "mds-gz", "litdata", "litdata-zstd"])
def test_what_mosaic_and_lightning_write(tmp_path: Path, name: str) -> None:
    found = shards_of(FORMATS / name, tmp_path / "out")
    assert [label for _, (label, _) in sorted(found.items())] == [i % 3 for i in range(7)]
    summary = write_shards(FORMATS / name / "index.json", tmp_path / "raw", processes=1, image_column="raw", **NO_LABELS)
    assert (summary.skipped, summary.converted) == ((), 0)
    raw = stored(tmp_path / "raw")
    for i, place in enumerate(sorted(found)):
        assert abs(pixels_of(found[place][1]).astype(int) - (30 * i, 200, 9 * i)).max() < 4
        assert raw[place][0] == -1
        assert np.array_equal(pixels_of(raw[place][1]), np.full((8, 10, 3), (30 * i, 200, 9 * i)))
    assert "column 'name' (--label-column) is no integer" in refused(FORMATS / name, tmp_path / "none", label_column="name")
    said = refused(FORMATS / name, tmp_path / "none", image_column="name")
    assert "which column is the image? Choose with --image-column; it has image (jpeg), label (int), " in said


def test_columns_of_litdata_may_have_no_names(tmp_path: Path) -> None:
    write_shards(FORMATS / "litdata-tuple", tmp_path / "out", processes=1, label_column="1")
    found = stored(tmp_path / "out")
    assert [found[place] for place in sorted(found)] == [(i % 3, pictured(i, "PNG")) for i in range(7)]


def test_what_is_pickled_is_never_unpickled(tmp_path: Path) -> None:
    mds, lit = FORMATS / "mds-pkl", FORMATS / "litdata-pickle"
    assert "column 'image' (--image-column) is pickled, and never unpickled" in refused(
        mds, tmp_path / "out", image_column="image"
    )
    assert "column 'y' (--label-column) is pickled" in refused(mds, tmp_path / "out", label_column="y")
    assert "column 'label' (--label-column) is pickled" in refused(lit, tmp_path / "out")
    write_shards(mds, tmp_path / "mds", processes=1)
    write_shards(lit, tmp_path / "lit", processes=1, **NO_LABELS)
    assert [content for _, (_, content) in sorted(stored(tmp_path / "mds").items())] == [pictured(i, "PNG") for i in range(7)]
    assert {label for label, _ in stored(tmp_path / "lit").values()} == {-1}


def test_the_splits_and_parts_of_mds(tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(FORMATS / "mds", tmp_path / "src" / split)
    assert f"several splits (train, val); name one, like {tmp_path}/src/train" in refused(tmp_path / "src", tmp_path / "out")
    # merge_index writes an index of the folders below it
    index = json.loads((FORMATS / "mds" / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"0/{shard['raw_data']['basename']}"
    (tmp_path / "src" / "train").rename(tmp_path / "src" / "0")
    shutil.rmtree(tmp_path / "src" / "val")
    (tmp_path / "src" / "index.json").write_text(json.dumps(index))
    summary = write_shards(tmp_path / "src", tmp_path / "out", processes=1)
    assert (summary.written, summary.skipped) == (7, ())


@pytest.mark.parametrize("name", ["mds", "litdata"])
def test_damaged_samples(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(FORMATS / name, tmp_path / "src")
    index, first = source / "index.json", min(path for path in source.iterdir() if path.suffix != ".json")
    whole, listed = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, its index says {len(whole)}; copy it again" in refused(source, tmp_path / "out")
    first.write_bytes(b"\x05" + whole[1:])
    assert "is damaged, or has not the 4 samples that its index says" in refused(source, tmp_path / "out")
    first.write_bytes(whole[:4] + b"\xff\xff\xff\x7f" + whole[8:])
    summary = write_shards(source, tmp_path / "some", processes=1)
    assert [problem.reason for problem in summary.rejected] == ["its sizes do not fit; the file is damaged"]
    first.unlink()
    assert f"{first}: cannot be read: No such file" in refused(source, tmp_path / "out")
    first.write_bytes(whole)
    key = "basename" if name == "mds" else "filename"
    for text, says in (
        (listed.replace(f'"{key}": "', f'"{key}": "../'), "a path that leads out ('..')"),
        (listed.replace(f'"{key}": "', f'"{key}": "/'), "an absolute path"),
        (
            listed.replace('"samples": 4', '"samples": -4').replace('"chunk_size": 4, "dim"', '"chunk_size": -4, "dim"'),
            "samples",
        ),
        ("{}", "not an index of MDS or LitData"),
        (
            listed.replace("[null, 8", "[-1, 8").replace('"chunk_bytes": 3703', '"chunk_bytes": "x"'),
            "not an index of MDS or LitData",
        ),
        ("hello", "is damaged or cannot be read"),
        (
            listed.replace("[null, 8", "[null, 8.0").replace('"chunk_bytes": 3703', '"chunk_bytes": 3.5'),
            "not an index of MDS or LitData",
        ),
        *(
            (json.dumps({"chunks": [], "config": {"data_format": [], "data_spec": spec}}), "not an index of MDS or LitData")
            for spec in ("[]", "[" * 100_000)
        ),
    ):
        index.write_text(text)
        assert says in refused(source, tmp_path / "out")


def test_packed_and_unknown_files(tmp_path: Path) -> None:
    assert "is packed inside its files; write it anew with compression_level='chunk'" in refused(
        FORMATS / "litdata-framed", tmp_path / "out"
    )
    source = shutil.copytree(FORMATS / "mds-zstd", tmp_path / "src")
    index, first = source / "index.json", source / "shard.00000.mds.zstd"
    whole, listed = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-20])
    assert "shard.00000.mds.zstd: cannot be unpacked" in refused(source, tmp_path / "out")
    first.write_bytes(whole)
    index.write_text(listed.replace('"bytes": 3924', '"bytes": 3000'))
    assert "unpacks to more bytes than the 3000 that its index says" in refused(source, tmp_path / "out")
    index.write_text(listed.replace('"compression": "zstd:7"', '"compression": "snappy"'))
    assert "is packed by snappy, and not by zstd, gz, bz2, br; write it anew with zstd" in refused(source, tmp_path / "out")
    index.write_text(listed.replace('"bytes": 3924', f'"bytes": {indexed._MOST_UNPACKED + 1}'))
    assert "and 1024 MiB is the most; write smaller files" in refused(source, tmp_path / "out")
    lit = json.loads((FORMATS / "litdata" / "index.json").read_text())
    lit["config"]["encryption"] = "fernet"
    index.write_text(json.dumps(lit))
    assert "holds encrypted files" in refused(source, tmp_path / "out")


def test_lance_names_its_converter(tmp_path: Path) -> None:
    (tmp_path / "x.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "x.lance" / "data").mkdir()
    (tmp_path / "x.lance" / "data" / "0100.lance").write_bytes(b"LANC")
    said = refused(tmp_path / "x.lance", tmp_path / "out")
    assert f"`pip install pylance`, and in Python: pyarrow.parquet.write_table(lance.dataset('{tmp_path}/x.lance')" in said


# ---- all


@pytest.mark.parametrize("name", ["mds", "litdata", "litdata-zstd", "lmdb", "a.npz", "a.tfrecord"])
def test_broken_files_are_one_line(tmp_path: Path, name: str) -> None:
    """Bytes changed, cut out or put in at random: no other error, no endless tree."""
    source = tmp_path / name
    if name == "lmdb":
        write_lmdb(source, {b"%03d" % i: encoded(i) for i in range(150)} | {b"x": encoded(1, "BMP", 120, 90)})
        broken = source / "data.mdb"
    elif name == "a.npz":
        np.savez_compressed(source, train_images=pictures(5, 28, 1), train_labels=np.arange(5))
        broken = source
    elif name == "a.tfrecord":
        broken = shutil.copy(FORMATS / "pictures-train.tfrecord-00000-of-00002", source)
    else:
        shutil.copytree(FORMATS / name, source)
        broken = source / "index.json"
    rng, seen = random.Random(name), set()
    paths = [path for path in source.iterdir() if path.name != "lock.mdb"] if source.is_dir() else [broken]
    for _ in range(150):
        path = rng.choice(paths)
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(min(len(content), rng.choice((200, 1 << 20))))
            match rng.randrange(3):
                case 0:
                    content[at] ^= 1 << rng.randrange(8)
                case 1:
                    content[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
                case _:
                    del content[at : at + rng.randrange(1, 5)]
        path.write_bytes(content)
        try:
            for chunk in find_source(source).chunks:
                count = sum(1 for _ in chunk.read())
                assert count == len(chunk)
            seen.add("read")
        except DataError as error:
            seen.add("refused" if "\n" not in str(error) else str(error))
        path.write_bytes(whole)
    assert seen == {"read", "refused"}
