"""Features once: a second evaluation reads files in place of images, and only files that are exactly right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluated import draw_images
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.features.file import read_about, read_features
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.report import summary
from simclr_dist.evaluate.settings import EmbedSettings, Settings
from simclr_dist.system.errors import ConfigError

Make = Callable[..., Path]


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(61, seed=0)), make_shards("test", *draw_images(31, seed=1))


def measure(encoder: Path, sets: tuple[Path, Path], **settings: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    result = evaluate(encoder, *sets, workers=0, device="cpu", say=lines.append, **{"k": 10} | settings)
    return result, lines


def spoil(*sets: Path) -> None:
    """Whoever reads an image of these shards gets an error."""
    for folder in sets:
        for tar in folder.glob("*.tar"):
            tar.write_bytes(bytes(tar.stat().st_size))


def test_other_protocols_read_no_image_again(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder()
    first, lines = measure(encoder, sets)
    folder = encoder.parent.parent / "eval" / "features"
    assert first["features_reused"] == {}
    assert lines[1].startswith(f"features kept in {folder}: 10 files, ")
    abouts = [read_about(path) for path in folder.iterdir()]
    assert sorted(about.layer for about in abouts) == ["h"] * 8 + ["raw_pixels"] * 2
    assert all(path.stem == read_about(path).digest()[:16] for path in folder.iterdir())

    for shows_images in ("neighbour_sheet", "show_projector"):
        monkeypatch.setattr(f"simclr_dist.evaluate.job.{shows_images}", lambda *_, **__: b"")
    spoil(*sets)
    again, lines = measure(encoder, sets)
    assert lines[0].startswith(f"features of 92 images (10 files of them in {folder}): ")
    assert len(again["features_reused"]) == 10
    for part in ("protocols", "signals"):
        expected, found = (json.loads(json.dumps(result[part])) for result in (first, again))
        for value in (expected, found):
            for protocol in value.values() if part == "protocols" else ():
                for row in protocol["results"].values():
                    del row["seconds"]
        assert found == expected
    other, _ = measure(encoder, sets, k=3, protocols=("knn", "mlp"), mlp_epochs=3)
    assert set(other["protocols"]["mlp"]["results"]) == {"raw_pixels", "untrained", "trained"}


def test_another_encoder_takes_over_the_baselines_alone(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    measure(make_encoder(seed=1, step=100), sets)
    result, _ = measure(make_encoder(seed=2, step=200), sets)
    assert set(result["features_reused"]) == {
        f"{part}: {name}" for part in ("train", "test") for name in ("raw_pixels", "untrained")
    } | {"view a: untrained", "view b: untrained"}
    changed, _ = measure(make_encoder(seed=2, step=200), sets, seed=1)
    assert "train: untrained" not in changed["features_reused"], "another seed is another untrained encoder"
    assert {"train: raw_pixels", "train: trained", "view a: trained"} <= set(changed["features_reused"])


def test_what_embed_wrote_is_taken(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder, folder = make_encoder(), tmp_path / "mine"
    for name, shards in zip(("a", "b"), sets, strict=True):
        embed(encoder, shards, folder / f"{name}.parquet", EmbedSettings(workers=0), device="cpu")
    result, _ = measure(encoder, sets, features=str(folder), baselines=False)
    assert result["features_reused"]["train: trained"] == str(folder / "a.parquet")
    assert result["features_reused"]["test: trained"] == str(folder / "b.parquet")
    assert f"--features {folder}" in " ".join(result["command"])
    other, _ = measure(encoder, sets, features=str(folder), baselines=False, precision="bf16")
    assert other["features_reused"] == {}
    assert other["settings"]["precision"] == "bf16"
    assert summary(other)["knn"]["trained"] == pytest.approx(summary(result)["knn"]["trained"], abs=7)


def test_what_does_not_fit_is_named_and_not_used(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    first, _ = measure(encoder, sets, baselines=False)
    folder = encoder.parent.parent / "eval" / "features"
    (path,) = (p for p in folder.iterdir() if read_about(p).data_digest == first["train"]["digest"])
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (folder / "notes.parquet").write_bytes(b"the user's own")
    again, lines = measure(encoder, sets, baselines=False)
    assert lines[0].startswith(f"{folder / 'notes.parquet'}: not a readable file of features")
    assert lines[1].startswith(f"{path}: not a readable file of features (")
    assert lines[1].endswith("; the images are read")
    assert "train: trained" not in again["features_reused"]
    assert summary(again) == summary(first)
    assert path.read_bytes() == whole, "written anew"
    assert (folder / "notes.parquet").read_bytes() == b"the user's own"


def test_images_that_embed_left_out_are_missed(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    from simclr_dist.evaluate.features.file import write_features

    encoder, folder = make_encoder(), tmp_path / "mine"
    embed(encoder, sets[0], folder / "a.parquet", EmbedSettings(workers=0), device="cpu")
    key, label, h, about = read_features(folder / "a.parquet")
    write_features(folder / "a.parquet", key[1:], label[1:], h[1:], about)
    result, lines = measure(encoder, sets, features=str(folder), baselines=False)
    assert lines[0] == f"{folder / 'a.parquet'}: has 60 images, not exactly the 61 asked for; the images are read"
    assert result["features_reused"] == {}
    assert np.array_equal(read_features(folder / f"{about.digest()[:16]}.parquet").embedding[1:], h[1:])


def test_no_folder_and_one_that_cannot_be(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = make_encoder()
    result, _ = measure(encoder, sets, baselines=False, keep_features=False)
    assert not (encoder.parent.parent / "eval" / "features").exists()
    assert "--no-features" in result["command"]
    (tmp_path / "file").write_text("")
    result, lines = measure(encoder, sets, baselines=False, features=str(tmp_path / "file" / "below"))
    assert lines[1].startswith(f"{tmp_path / 'file' / 'below'}: cannot be made: ")
    assert result["protocols"]["knn"]
    with pytest.raises(ConfigError, match=r"features: 'x': has no effect with --no-features"):
        Settings(features="x", keep_features=False)
    measure(encoder, sets, baselines=False, out=tmp_path / "mine.json")
    assert len(list((tmp_path / "mine.features").iterdir())) == 4
