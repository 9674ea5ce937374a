"""The verb `duplicates`: the same pairs as all cosines at once give, equal ones marked, and test images of a training set."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from evaluated import draw_images
from simclr_dist.cli.main import main
from simclr_dist.data.manifest import load_manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate import duplicates as verb
from simclr_dist.evaluate.duplicates import _groups

Make = Callable[..., Path]


def shards(folder: Path, name: str, seed: int, copies: Path | None = None) -> Path:
    """Shards of 12 images in two classes. With `copies` four more of one there: bytes, pixels, brighter, another class."""
    for number, image in enumerate(draw_images(12, seed=seed)[0]):
        path = folder / name / ("cat", "dog")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    if copies is not None:
        one = copies / "cat" / "04.png"
        shutil.copy(one, folder / name / "cat" / "bytes.png")
        Image.open(one).save(folder / name / "cat" / "pixels.png", compress_level=1)
        Image.open(one).point(lambda value: min(255, round(value * 1.05))).save(folder / name / "cat" / "bright.png")
        shutil.copy(one, folder / name / "dog" / "other.png")
    assert main(["shard", str(folder / name), str(folder / f"{name}-shards"), "--processes", "1"]) == 0
    return folder / f"{name}-shards"


def typed(encoder: Path, *more: object) -> int:
    return main(["duplicates", str(encoder), *map(str, more), "--device", "cpu", "--workers", "0"])


def cosines(encoder: Path, *sets: Path) -> np.ndarray:
    network = load_encoder(encoder)
    read = [ShardDataset(folder) for folder in sets]
    h = [network.embed([one[row].image for row in range(len(one))]).double() for one in read]
    return np.asarray(torch.nn.functional.cosine_similarity(h[0][:, None], h[-1][None], dim=2))


def test_pairs_of_a_set(
    make_encoder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder, folder = make_encoder(), shards(tmp_path, "train", 0, tmp_path / "train")
    every, manifest = cosines(encoder, folder), load_manifest(folder)
    above = float(np.quantile(every[np.triu_indices(16, 1)], 0.9))
    capsys.readouterr()
    assert typed(encoder, folder, "--above", above) == 0
    said = capsys.readouterr().out
    rows, columns = np.nonzero(np.triu(every > above, 1))
    order = np.argsort(-every[rows, columns], kind="stable")
    table = pq.read_table("duplicates/duplicates.parquet").to_pydict()
    np.testing.assert_allclose(table["cosine"], every[rows, columns][order], atol=1e-5)
    assert set(zip(table["key"], table["other_key"], strict=True)) == {
        (str(manifest.key[a]), str(manifest.key[b])) for a, b in zip(rows, columns, strict=True)
    }
    equal = {
        frozenset((a.partition("/")[2], b.partition("/")[2]))
        for a, b, same in zip(table["source"], table["other_source"], table["equal"], strict=True)
        if same
    }
    of_bytes = ["04.png", "bytes.png", "other.png"]
    assert equal == {frozenset(pair) for pair in (of_bytes[:2], of_bytes[1:], of_bytes[::2])}
    assert {(a, b) for a, b in zip(table["class_name"], table["other_class_name"], strict=True)} >= {("cat", "dog")}
    assert f"16 images: {len(rows)} pairs with a cosine above" in said
    assert "3 of the pairs are equal byte for byte\n" in said
    nearest = np.sort(np.where(np.eye(16, dtype=bool), -1, every).max(1))
    assert f"half {nearest[7]:.3f}, 90 % {nearest[13]:.3f}" in said
    page = Path("duplicates/duplicates.html").read_text()
    for word in ("3 of the pairs are equal byte for byte", "<td>cat/04.png</td>", "<td>bytes</td>", "data:image/png;base64"):
        assert word in page


def test_test_images_that_are_training_images(
    make_encoder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verb, "_KEPT", 5)
    encoder, train = make_encoder(), shards(tmp_path, "train", 0)
    test = shards(tmp_path, "test", 1, tmp_path / "train")
    every = cosines(encoder, test, train)
    assert typed(encoder, test, "--among", train, "--above", 0.5, "--out", "leak") == 0
    said = capsys.readouterr().out
    assert f"16 images and 12 others: {(every > 0.5).sum()} pairs" in said
    assert "the nearest 5 pairs are in the table; a larger --above leaves the others out" in said
    table = pq.read_table("leak/duplicates.parquet").to_pydict()
    np.testing.assert_allclose(table["cosine"], np.sort(every.flatten())[::-1][:5], atol=1e-5)
    equal = zip(table["source"], table["other_source"], table["equal"], strict=True)
    assert {of for of in equal if of[2]} == {(f"{name}.png", "cat/04.png", True) for name in ("cat/bytes", "dog/other")}
    kept = list((encoder.parents[1] / "eval" / "features").glob("*.parquet"))
    assert len(kept) == 2
    assert typed(encoder, test, "--among", train, "--out", "leak") == 0
    assert capsys.readouterr().err.count("features of 1") == 2, "nothing is read again"


def test_a_group_has_what_is_near_to_its_first() -> None:
    """2 is near to 1 alone, which 0 has taken; between two sets nothing is taken."""
    pairs = [(0, 1, 0.98), (1, 2, 0.99), (0, 4, 0.985), (3, 5, 0.999)]
    assert _groups(pairs, apart=False) == [(3, [(5, 0.999)]), (0, [(4, 0.985), (1, 0.98)])]
    assert _groups(pairs, apart=True) == [(3, [(5, 0.999)]), (1, [(2, 0.99)]), (0, [(4, 0.985), (1, 0.98)])]


def test_no_pairs_and_mistakes(
    make_encoder: Make, make_shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = draw_images(3, seed=0)
    encoder, folder, others = (
        make_encoder(),
        make_shards("set", images, labels),
        make_shards("other", images[:2], labels[:2], ()),
    )
    assert typed(encoder, folder, "--above", 0.9999999) == 0
    assert "3 images: 0 pairs" in capsys.readouterr().out
    assert len(pq.read_table("duplicates/duplicates.parquet")) == 0
    assert typed(encoder, folder, "--among", others) == 0, "one set has names of classes, the other none"
    (tmp_path / "alone").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "alone" / "one.png")
    assert main(["shard", "alone", "alone-shards", "--processes", "1"]) == 0
    for more, line in (
        (["--above", "1"], "above: 1.0 must be above 0 and below 1"),
        (["--among", folder], "has the same images as"),
        (["--among", "nowhere"], "nowhere: no such folder of shards"),
        ([], "alone-shards: there is no other image to be near to"),
        (["--out", "set"], "set: is there, and holds other things"),
    ):
        assert typed(encoder, folder if more else tmp_path / "alone-shards", *more) == 2
        assert line in capsys.readouterr().err.strip().splitlines()[-1]
