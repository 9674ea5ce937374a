"""The map of features: scikit-learn's components, the same bytes again, and what is where by the pixels."""

import io
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from evaluated import CLASSES, draw_images
from simclr_dist.cli.main import main
from simclr_dist.evaluate import map as module
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.map import feature_map, principal

Make = Callable[..., Path]


def features(n: int = 60) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 3


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_components_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    h = features()
    points, shares = principal(h, range(60))
    oracle = PCA(2).fit(h.double().numpy())
    expected = oracle.transform(h.double().numpy())
    np.testing.assert_allclose(points.abs(), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_, rtol=1e-9)
    assert torch.equal(principal(h, [3, 50])[0], points[[3, 50]])
    assert principal(torch.ones(4, 3), range(4))[1] == [0.0, 0.0]


def test_the_same_input_gives_the_same_bytes() -> None:
    label = [-1, *(row % 3 for row in range(59))]
    drawn = feature_map(features(), label, CLASSES)
    assert drawn == feature_map(features(), label, CLASSES)
    assert drawn != feature_map(features(), label[::-1], CLASSES)
    assert len({*map(tuple, pixels(drawn).reshape(-1, 3))}) > 100


def test_places_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two far apart on the first axis: the left one a dot or a thumbnail in its class's colour. Of many, some are drawn."""
    h = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]])
    sheet = pixels(feature_map(h, [1, -1], ["a", "b"]))
    left, right = sheet[836, 64], sheet[836, 836]
    assert left.max() - left.min() > 100, "a colour"
    assert right.max() == right.min() < 200, "gray: no class"
    monkeypatch.setattr(module, "_POINTS", 1)
    assert (pixels(feature_map(h, [1, -1], ["a", "b"]))[836, 836] == 255).all()
    thumbnails = [Image.new("RGB", (90, 60), colour) for colour in ("#010203", "#040506")]
    monkeypatch.undo()
    sheet = pixels(feature_map(h, [1, -1], ["a", "b"], pictures=thumbnails))
    assert [tuple(sheet[836, x]) for x in (64, 836)] == [(1, 2, 3), (4, 5, 6)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images(count: int) -> None:
    assert pixels(feature_map(features(count), [0] * count, [])).shape[1] == 900


def test_embed_draws_it(
    make_encoder: Make, make_shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = draw_images(12, seed=0)
    encoder, shards = make_encoder(), make_shards("set", images, labels)
    typed = ["embed", str(encoder), str(shards), "f.parquet", "--device", "cpu", "--workers", "0"]
    assert main([*typed, "--map", "few.png"]) == 0
    monkeypatch.setattr(module, "_PICTURES", 5)
    typed[3] = "f.npz"
    assert main([*typed, "--map", "dots.png"]) == 0
    after = capsys.readouterr().out.splitlines()[-1]
    assert subprocess.run(shlex.split(after), capture_output=True, text=True, check=True).stdout.startswith("[[")
    assert np.array_equal(np.load("f.npz")["embedding"], read_features("f.parquet").embedding)
    assert main(typed) == 0, "it replaces its own"
    np.savez("other.npz", h=images)
    assert main([*typed[:3], "other.npz"]) == 2
    assert "other.npz: is there, and is no file of features; it is not overwritten" in capsys.readouterr().err
    colours = [len({*map(tuple, pixels(Path(name).read_bytes()).reshape(-1, 3))}) for name in ("few.png", "dots.png")]
    assert colours[0] > 2 * colours[1], "thumbnails"
    capsys.readouterr()
    for more, line in (
        (["--map", "map.jpg"], "map: 'map.jpg': the map is a .png file"),
        (["--map", "no/map.png"], "in a folder that is there"),
        (["--map", "set/map.png"], "set/map.png: is one of the images, or would be taken for one"),
    ):
        assert main([*typed, *more]) == 2
        assert line in capsys.readouterr().err
