"""Images by row, each checked."""

import hashlib
import io
import os
import pickle
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_dist.data.manifest import ManifestRow, write_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.system.errors import DataError
from small_shards import write_small_shards

CLASSES = ("ant", "bee", "cow")


def open_files(folder: Path) -> set[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 (names, as some are gone)
    targets = [Path(os.readlink(link)) for link in links if link.is_symlink()]  # noqa: PTH115 (the link's text is wanted)
    return {target.name for target in targets if target.parent == folder and target.suffix == ".tar"}


def test_pixels_and_labels(images: Path) -> None:
    dataset = ShardDataset(images)
    assert len(dataset) == 52
    formats = set()
    for row in range(52):
        image, label, same_row = dataset[row]
        with Image.open(io.BytesIO(dataset.read(row))) as original:
            formats.add((original.format, original.mode))
            expected = np.asarray(original.convert("RGB"))
        assert image.dtype == torch.uint8
        assert tuple(image.shape) == (3, dataset.manifest.height[row], dataset.manifest.width[row])
        assert np.abs(image.numpy().transpose(1, 2, 0).astype(int) - expected).max() <= 2
        assert same_row == row
        assert abs(int(image[0, 2, 2]) - 100 * label) < 20
    # WebP has no gray.
    assert formats == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")}
    assert dataset.manifest.classes == CLASSES


def test_other_bytes_than_were_sharded_are_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged(30)
    with pytest.raises(DataError) as caught:
        dataset[30]
    m = dataset.manifest
    line = str(caught.value)
    assert line.startswith(f"{m.folder}/{m.shards[2]}: image {m.key[30]}: ")
    assert "sha256" in line
    assert "\n" not in line
    assert dataset[29].row == 29
    assert dataset[31].row == 31


def test_a_tar_cut_short_is_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged()
    m = dataset.manifest
    os.truncate(m.folder / m.shards[1], int(m.offset[20]) + 10)  # while the run reads
    assert dataset[19].row == 19
    for row in (20, 21):
        with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[1]}: image {m.key[row]}: [^\n]*$"):
            dataset[row]
    with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[1]}: has \d+ bytes, [^\n]*$"):
        ShardDataset(m.folder)


def test_a_tar_that_is_gone_is_one_line(damaged: Callable[..., ShardDataset]) -> None:
    dataset = damaged()
    m = dataset.manifest
    (m.folder / m.shards[4]).unlink()
    with pytest.raises(DataError, match=rf"^{m.folder}/{m.shards[4]}: image {m.key[50]}: cannot be read: No such file[^\n]*$"):
        dataset[50]


def test_bytes_that_are_no_image_are_one_line(tmp_path: Path) -> None:
    content = b"\x89PNG\r\n\x1a\n" + bytes(100)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    row = ManifestRow("0", "a.tar", 512, len(content), -1, 4, 4, hashlib.sha256(content).digest())
    write_manifest(tmp_path, ["a.tar"], [row], ())
    with pytest.raises(DataError, match=rf"^{tmp_path}/a.tar: image 0: cannot be decoded: [^\n]+$"):
        ShardDataset(tmp_path)[0]


def test_no_more_shards_are_open_than_asked_for(images: Path) -> None:
    before = open_files(images)
    dataset = ShardDataset(images, open_shards=2)
    first = [0, 12, 24, 36, 48]
    for shard in np.random.default_rng(0).integers(0, 5, 40):
        assert dataset[first[shard]].row == first[shard]
        assert len(open_files(images) - before) <= 2
    dataset = ShardDataset(images, open_shards=2)
    for shard in (0, 1, 0, 2):
        dataset.read(first[shard])
    assert open_files(images) - before == {dataset.manifest.shards[0], dataset.manifest.shards[2]}, "the least used goes first"
    del dataset
    assert open_files(images) == before


def test_a_wide_window_opens_no_more_files_than_the_process_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_shards(tmp_path, [1] * 100)
    for limit, most in ((90, 22), (2, 1), (resource.RLIM_INFINITY, 100)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        dataset = ShardDataset(tmp_path, open_shards=2 * 100)
        assert [dataset[row].row for row in range(100)] == list(range(100))
        assert len(open_files(tmp_path)) == most
        del dataset


def test_pickled_it_opens_its_own_files(images: Path) -> None:
    dataset = ShardDataset(images)
    expected = dataset[5].image
    copy = pickle.loads(pickle.dumps(dataset))
    del dataset
    assert torch.equal(copy[5].image, expected)
    assert copy.manifest.digest == ShardDataset(images).manifest.digest


def test_a_reader_needs_a_file(images: Path) -> None:
    with pytest.raises(ValueError, match=r"^ShardDataset: open_shards: 0 must be at least 1$"):
        ShardDataset(images, open_shards=0)
