"""Many features lie in a file without a name, few in memory; and where no file can be, in memory too, with a warning."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluated import CARD, draw_images
from simclr_dist.data.reader import Sample
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate import space
from simclr_dist.evaluate.features.extraction import Features, extract
from simclr_dist.evaluate.features.file import About, read_features, write_features


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(space, "IN_MEMORY_BYTES", 2**10)
    return tmp_path


def private_bytes() -> int:
    """Count the memory that is this process's alone: no file gives it back."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_many_features_are_no_private_memory(folder: Path) -> None:
    before = private_bytes()
    many = space.empty(2**14, 2**10, np.float32)
    many[:] = 1
    assert many.sum(dtype=np.float64) == 2**24
    assert private_bytes() - before < 2**23 < many.nbytes
    assert list(folder.iterdir()) == []  # a kill leaves nothing
    assert space.empty(2, 3, np.uint8).shape == (2, 3)


def test_a_folder_without_room_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "none"))
    assert space.empty(300, 2, np.float32).shape == (300, 2)
    said = capfd.readouterr().err
    assert said.startswith(f"WARNING: {folder / 'none'}: no room for 2.24e-06 GiB of features: No such file or directory")
    assert said.count("\n") == 1


class _Images:
    def __init__(self, count: int) -> None:
        self._images = torch.from_numpy(draw_images(count, seed=0)[0]).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        return Sample(self._images[row], row % 3 - 1, row)


def test_extracted_and_read_features_are_the_same(
    folder: Path, make_encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(make_encoder())
    in_file = extract(_Images(23), {"h": encoder}, CARD, pixels=True, batch_size=5)
    about = About("", {}, "h", 8, "fp32", "", ())
    write_features(folder / "f.parquet", list(map(str, range(23))), np.zeros(23, np.int64), in_file["h"].h.numpy(), about)
    read = read_features(folder / "f.parquet")
    monkeypatch.setattr(space, "IN_MEMORY_BYTES", 2**29)
    in_memory = extract(_Images(23), {"h": encoder}, CARD, pixels=True, batch_size=5)
    for name, features in in_memory.items():
        for one, other in ((features, in_file[name]), (features.labelled(), in_file[name].labelled())):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert isinstance(in_file["h"], Features)
    assert np.array_equal(read.embedding, in_memory["h"].h.numpy())
