"""From TIFFs that are not 8-bit RGB to their features: shards, two ranks, exported encoder, evaluation, embedding."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from simclr_dist.cli.main import main
from simclr_dist.config.load import load_config
from simclr_dist.data.pixels.channels import convert
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.encoder.file import export_encoder, load_encoder
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.method.model import ResNet
from simclr_dist.preflight.plan.memory import rank_memory
from simclr_dist.preflight.plan.trace import footprint
from simclr_dist.system.errors import DataError
from training_runs import metrics, train, write_config

tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")

SIDE, IMAGES = 20, 72


def scene(number: int, kind: Kind) -> NDArray[Any]:
    """Stripes of a class's direction, of another phase in each channel, within the lower eighth of 16 bits."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = x if number % 2 else y
    waves = [np.sin(along * (0.5 + 0.2 * channel) + random.uniform(0, 6)) for channel in range(kind.channels)]
    values = (np.stack(waves, -1) + 1.5 + 0.2 * random.random((SIDE, SIDE, kind.channels))) * 0.03 * kind.most
    pixels: NDArray[Any] = values.astype(np.uint16)
    return pixels


@pytest.fixture(scope="module", params=[Kind(1, 16), Kind(5, 16)], ids=str)
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """A folder of TIFFs, and what `shard` makes of it, training and test images apart."""
    kind, folder = request.param, tmp_path_factory.mktemp("tiffs")
    for number in range(IMAGES):
        path = folder / "images" / "ab"[number % 2] / f"{number:03}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = scene(number, kind)
        how = {"planarconfig": "contig"} if kind.channels > 1 else {}
        tifffile.imwrite(path, pixels if kind.channels > 1 else pixels[..., 0], photometric="minisblack", **how)
    options = ["--channels", str(kind.channels), "--bit-depth", "16", "--split", "0.7/0.3", "--shard-size", "20"]
    assert main(["shard", str(folder / "images"), str(folder / "shards"), *options, "--processes", "1"]) == 0
    return kind, folder


@pytest.mark.slow
def test_from_tiffs_to_features(sharded: tuple[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, folder = sharded
    shards = folder / "shards"
    assert main(["shard", "--statistics", str(shards / "train"), "--processes", "1"]) == 0
    views = yaml.safe_load(capsys.readouterr().out)["views"]
    assert len(views["mean"]) == kind.channels
    assert max(views["mean"]) < 0.1

    data = {"channels": kind.channels, "bit_depth": 16, "workers": 1}
    views |= {"preset": "imagenet", "image_size": 20, "vertical_flip": 0.5, "rotate": 0.75, "solarize": 0.1}
    probe = {"every_epochs": 1, "shards": str(shards / "test"), "images": 8}
    for world_size in (1, 2):
        run = tmp_path / str(world_size)
        write_config(
            run, shards / "train", data=data, views=views, steps=4, log={"tensorboard": True}, probe=probe, precision="fp64"
        )
        printed = train(run, world_size)
        assert "vertical flip 0.5; rotate 0.75; solarize 0.1; jitter 0.8" in printed
    losses = [[line["loss/nt_xent"] for line in metrics(tmp_path / size / "run")] for size in "12"]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    assert list((tmp_path / "2/run/tb").glob("events*"))

    (encoder,) = (tmp_path / "2/run/encoders").glob("*.safetensors")
    card = load_encoder(encoder).card
    assert isinstance(card, dict)
    assert (card["channels"], card["mean"]) == (kind.channels, views["mean"])
    where = ["--train", str(shards / "train"), "--test", str(shards / "test"), "--device", "cpu", "--workers", "1"]
    assert main(["finetune", str(encoder), *where, "--labels", "1", "--epochs", "1", "--seeds", "1"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert main(["eval", str(encoder), *where, "--protocols", "knn,sgd", "--sgd-epochs", "1"]) == 0
    assert len(re.findall(r"^(?:raw pixels|untrained|trained), kNN: \d", capsys.readouterr().err, re.MULTILINE)) == 3

    assert main(["embed", str(encoder), str(folder / "images"), str(tmp_path / "out.parquet"), "--device", "cpu"]) == 0
    features = read_features(tmp_path / "out.parquet")
    network = load_encoder(encoder)
    for place in (0, 41, IMAGES - 1):
        path = folder / "images" / features.key[place]
        pixels = torch.from_numpy(convert(path.read_bytes(), kind)).permute(2, 0, 1)
        with torch.inference_mode():
            h = network(network.preprocess(pixels)[None])[0]
        np.testing.assert_allclose(h.numpy(), features.embedding[place], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_one_line(
    sharded: tuple[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any rank starts, and with the cure."""
    kind, folder = sharded
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, folder / "shards/train")
    for verb in (["train", str(config), "--processes", "2"], ["plan", str(config)]):
        assert main(verb) == 2
        error = capsys.readouterr().err
        assert f"its images have {kind}, and data.channels and data.bit_depth ask for 3 channels of 8 bits" in error
        assert error.count("\n") == 1


def test_an_encoder_of_rgb_refuses_other_channels(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    card = {
        "encoder": "resnet10", "width": 1, "stem": "small", "feature_size": 128, "image_size": 16, "mean": [0.5] * 3,
        "std": [0.2] * 3, "step": 0, "init": "random", "data_digest": None,
    }  # fmt: skip
    export_encoder(encoder := tmp_path / "rgb.safetensors", ResNet("resnet10", stem="small"), card)
    with pytest.raises(DataError, match=r"takes 3; shard the images again with --channels 3$"):
        embed(encoder, sharded[1] / "shards/train", tmp_path / "x.parquet", device="cpu")


def test_a_plan_counts_channels_and_bits(sharded: tuple[Kind, Path], tmp_path: Path) -> None:
    """Views are floats, whatever their bits; crops that wait are not."""
    kind, folder = sharded
    data, views = {"channels": kind.channels, "bit_depth": 16, "workers": 1}, {"image_size": 64, "preset": "blog"}
    scaled = {"mean": [0.1] * kind.channels, "std": [0.1] * kind.channels}
    gray = load_config(write_config(tmp_path, folder / "shards/train", data=data, views=views | scaled))
    rgb = load_config(write_config(tmp_path, folder / "shards/train", views=views, data={"workers": 1}))
    ours, theirs = (rank_memory(config, footprint(config, 64), 1, on_cuda=False) for config in (gray, rgb))
    assert ours.views * 3 == theirs.views * kind.channels
    assert ours.host == pytest.approx(theirs.host * kind.pixel_bytes / 3, rel=0.02)
    first = 9 * 16 * (kind.channels - 3) * 4  # weights of resnet10's first layer, 3 x 3 to 16
    assert ours.weights - theirs.weights == first
