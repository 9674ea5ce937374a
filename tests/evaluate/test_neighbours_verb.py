"""The verb `neighbours`: the same images as scikit-learn finds, kept features, a page by itself, and mistakes in one line."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from evaluated import CLASSES, draw_images
from simclr_dist.cli.main import main
from simclr_dist.data.manifest import load_manifest
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.evaluate.result import neighbours as search
from simclr_dist.method.model import ResNet

Make = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """The second is a copy of an image of the shards."""
    drawn = [*draw_images(2, seed=9)[0], draw_images(30, seed=0)[0][4]]
    paths = [tmp_path / "asked" / name for name in ("b.png", "c.jpg", "a.png")]
    paths[0].parent.mkdir()
    for picture, path in zip(drawn, paths, strict=True):
        Image.fromarray(picture).save(path)
    return sorted(map(str, paths))


def typed(encoder: Path, pictures: list[str], shards: Path, *more: str) -> int:
    return main(["neighbours", str(encoder), *pictures, "--among", str(shards), "--device", "cpu", "--workers", "0", *more])


def test_the_nearest_images(
    make_encoder: Make, make_shards: Make, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "ROWS_AT_ONCE", 7)  # so that a search is of several parts
    monkeypatch.setattr(search, "_A_SHEET", 2)
    images, labels = draw_images(30, seed=0)
    shards, encoder = make_shards("set", images, [-1, *labels[1:]]), make_encoder()
    assert typed(encoder, pictures, shards, "--k", "4") == 0
    said = capsys.readouterr()
    assert "written: neighbours/neighbours.html and neighbours.parquet" in said.out
    assert "features kept in " in said.err

    network = load_encoder(encoder)
    h = [network.embed([Image.fromarray(image) for image in of]).double().numpy() for of in (images, [])]
    asked = network.embed(pictures).double().numpy()
    distance, nearest = NearestNeighbors(n_neighbors=4, metric="cosine").fit(h[0]).kneighbors(asked)
    table = pq.read_table("neighbours/neighbours.parquet").to_pydict()
    assert table["picture"] == [path for path in pictures for _ in range(4)]
    assert table["rank"] == [1, 2, 3, 4] * 3
    keys, manifest = nearest.flatten().tolist(), load_manifest(shards)
    assert table["key"] == [str(manifest.key[row]) for row in keys]
    assert table["label"] == [None if row == 0 else labels[row] for row in keys]
    assert table["class_name"] == [None if row == 0 else CLASSES[labels[row]] for row in keys]
    np.testing.assert_allclose(table["cosine"], 1 - distance.flatten(), atol=1e-5)
    assert (table["key"][0], round(table["cosine"][0], 5)) == ("000004", 1.0)

    page = Path("neighbours/neighbours.html").read_text()
    sheets = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(sheets) == 2
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets[0]))))
    asked_for, nearest_one, next_one = (sheet[30:100, left : left + 80] for left in (14, 128, 230))
    assert np.array_equal(asked_for, nearest_one), "the first picture is a copy of its nearest"
    assert not np.array_equal(asked_for, next_one)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for word in (*pictures, "000004", str(encoder), "3 pictures and their 4 nearest of 30 images"):
        assert word in page

    (kept,) = (encoder.parents[1] / "eval" / "features").glob("*.parquet")
    before = pq.read_table("neighbours/neighbours.parquet")
    (leftover := tmp_path / "neighbours" / ".neighbours.html.0123abcd.tmp").touch()  # of a killed one
    assert typed(encoder, [pictures[0]], shards) == 0
    assert not leftover.exists()
    said = capsys.readouterr()
    assert f"features of 30 images: {kept}" in said.err
    assert len(pq.read_table("neighbours/neighbours.parquet")) == 10
    after = pq.read_table("neighbours/neighbours.parquet")
    assert after["key"].to_pylist()[:4] == before["key"].to_pylist()[:4]


def test_images_of_other_channels(
    make_encoder: Make, make_shards: Make, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures are read as the encoder's own images are; shards of others are refused."""
    encoder = tmp_path / "gray.safetensors"
    card = {
        "encoder": "resnet10",
        "width": 1,
        "stem": "small_stride2",
        "channels": 1,
        "image_size": 16,
        "step": 1,
        "feature_size": 128,
    }
    card |= {"init": "random", "data_digest": None, "mean": [0.5], "std": [0.25]}
    export_encoder(encoder, ResNet("resnet10", stem="small_stride2", channels=1), card)
    images, labels = draw_images(5, seed=0)
    assert typed(encoder, pictures[:1], make_shards("set", images, labels), "--out", str(tmp_path / "out")) == 2
    assert "its images have 3 channels of 8 bits, and" in capsys.readouterr().err
    folder, out = tmp_path / "gray", tmp_path / "out"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(folder / f"{number}.png")
    assert main(["shard", str(folder), str(tmp_path / "shards"), "--channels", "1"]) == 0
    assert typed(encoder, [str(folder / "3.png")], tmp_path / "shards", "--k", "2", "--out", str(out)) == 0
    assert pq.read_table(out / "neighbours.parquet")["cosine"].to_pylist()[0] == pytest.approx(1, abs=1e-5)


def test_more_neighbours_than_images(make_encoder: Make, make_shards: Make, pictures: list[str], tmp_path: Path) -> None:
    images, labels = draw_images(3, seed=0)
    out = tmp_path / "out"
    assert typed(make_encoder(), [str(Path(pictures[0]).parent)], make_shards("set", images, labels), "--out", str(out)) == 0
    assert pq.read_table(out / "neighbours.parquet")["rank"].to_pylist() == [1, 2, 3] * 3


def test_mistakes(
    make_encoder: Make, make_shards: Make, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    images, labels = draw_images(3, seed=0)
    shards, encoder = make_shards("set", images, labels), make_encoder()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for pictures_typed, more, line in (
        ([str(shards)], [], f"{str(shards)!r} is shards; name image files"),
        (["none.jpg"], [], "none.jpg: no such file or folder of images"),
        (["bad.jpg"], [], "bad.jpg: not an image"),
        (pictures, ["--k", "0"], "k: 0 is too small; the least is 1"),
        (pictures, ["--out", "full"], "full: is there, and holds other things, like thesis.tex; name another folder"),
        (pictures, ["--among", "nowhere"], "nowhere"),
        (pictures, ["--layer", "z"], "layer z"),
    ):
        assert typed(encoder, pictures_typed, shards, *more) == 2, line
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert line in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert typed(encoder, pictures, shards) == 2
    assert not list(Path().glob("neighbours/*"))
