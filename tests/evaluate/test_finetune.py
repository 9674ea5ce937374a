"""Finetuning on small shards: what it learns from, what it repeats, what it leaves alone, and each mistake as one line."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluated import CARD, draw_images
from forkserver import Command
from simclr_dist.cli import main as cli
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.views.crops import crop_view
from simclr_dist.data.views.draws import ViewSettings, draw_views
from simclr_dist.encoder.file import export_encoder, load_encoder, untrained_encoder
from simclr_dist.evaluate.finetune import Order, Recipe, classifier, finetune, finetune_path, fit, make_recipe
from simclr_dist.evaluate.result import file
from simclr_dist.evaluate.settings import FinetuneSettings
from simclr_dist.method.model import build_projector
from simclr_dist.system.errors import ConfigError, DataError

Make = Callable[..., Path]
SHORT: dict[str, Any] = {"seeds": 1, "epochs": 1, "batch_size": 32, "workers": 0}
LONG: dict[str, Any] = {"seeds": 2, "epochs": 12, "batch_size": 32, "base_lr": 0.4, "workers": 0}


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(120, seed=0)), make_shards("test", *draw_images(61, seed=1))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(encoder: Path, sets: tuple[Path, Path], labels: float = 1, **settings: Any) -> dict[str, Any]:
    out = settings.pop("out", None)
    return finetune(encoder, *sets, FinetuneSettings(labels, **{**SHORT, **settings}), out=out, device="cpu")


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(part) for key, part in value.items() if key not in ("seconds", "hardware", "workers")}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


# What it learns


@pytest.mark.parametrize("start", ["encoder", "random"])
def test_it_learns_what_can_be_learned(make_encoder: Make, sets: tuple[Path, Path], start: str) -> None:
    result = run(make_encoder(), sets, start=start, **LONG)
    assert result["summary"]["top1"]["mean"] > 90, result["runs"]
    assert all(seed["last_epoch"]["top1"] > 80 for seed in result["runs"])


def test_labels_that_say_nothing_give_chance(make_encoder: Make, make_shards: Make) -> None:
    """The leak test: had the test labels a way in, they would show."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (420, 16, 16, 3), dtype=np.uint8)
    labels = random.permutation(np.arange(420) % 3)
    sets = make_shards("train", noise[:60], labels[:60]), make_shards("test", noise[60:], labels[60:])
    found = run(make_encoder(), sets, **{**LONG, "seeds": 1})
    assert abs(found["summary"]["top1"]["mean"] - 100 / 3) < 10, "four deviations of 360 images"


def test_shuffled_classes_are_learned_as_they_are(make_encoder: Make, make_shards: Make, sets: tuple[Path, Path]) -> None:
    """And right answers that the training labels do not know do not come from anywhere else."""
    images, labels = draw_images(120, seed=0)
    turned = make_shards("turned", images, (labels + 1) % 3)
    found = run(make_encoder(), (turned, sets[1]), **{**LONG, "seeds": 1})
    assert found["summary"]["top1"]["mean"] < 10


def test_test_images_are_read_once_and_after_the_training(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], ShardDataset.__getitem__

    def watched(self: ShardDataset, row: int) -> Any:
        read.append((self.manifest.folder.name, row))
        return original(self, row)

    monkeypatch.setattr(ShardDataset, "__getitem__", watched)
    run(make_encoder(), sets, seeds=1, epochs=3)
    assert [name for name, _ in read] == ["train"] * 3 * 120 + ["test"] * 61
    assert [row for name, row in read if name == "test"] == list(range(61))
    for epoch in range(3):
        assert sorted(row for _, row in read[epoch * 120 : (epoch + 1) * 120]) == list(range(120)), "each image once an epoch"


def test_a_subset_is_all_that_is_learned_from(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = set(), ShardDataset.__getitem__

    def watched(self: ShardDataset, row: int) -> Any:
        if self.manifest.folder.name == "train":
            read.add(f"{row:06d}")
        return original(self, row)

    monkeypatch.setattr(ShardDataset, "__getitem__", watched)
    result = run(make_encoder(), sets, 0.1, epochs=2)
    assert (result["subsets"]["images"], result["subsets"]["images_per_class"]) == (12, 4)
    assert [read] == [set(keys) for keys in result["subsets"]["keys"]]


def test_training_is_the_written_out_recipe(make_shards: Make) -> None:
    """A linear model in float64 with Nesterov's steps by hand: v = 0.9 v + g; w -= rate (g + 0.9 v), rate a cosine to 0."""
    images = ShardDataset(make_shards("train", *draw_images(45, seed=0)))
    rows = np.arange(1, 45)
    recipe = Recipe(epochs=3, batch_size_used=14, steps_per_epoch=3, left_over=2, peak_lr=0.02)
    linear = nn.Linear(3 * 16 * 16, 3)
    model = nn.Sequential(nn.Flatten(), linear)
    start = linear.weight.detach().double().clone()
    weight, bias = start.clone(), linear.bias.detach().double().clone()
    last = fit(model, images, rows, CARD, recipe, seed=7)

    momentum: list[Tensor] = [torch.zeros_like(weight), torch.zeros_like(bias)]
    settings = ViewSettings(image_size=16, jitter=0, gray=0, blur=0)
    plan, losses, right = Plan(np.array([44]), 7, 14), [], 0
    for step in range(9):
        epoch, places = plan[step]
        samples = [images[int(row)] for row in rows[places]]
        drawn = draw_views(settings, seed=7, epoch=epoch, rows=rows[places], view=2, heights=20, widths=16)
        crops = [
            crop_view(s.image, box, bool(flip), 16, "bicubic")
            for s, box, flip in zip(samples, drawn.box, drawn.flip, strict=True)
        ]
        x = ((torch.stack(crops).double() / 255 - 0.5) / 0.25).flatten(1)
        y = nn.functional.one_hot(torch.tensor([s.label for s in samples]), 3)
        logits = x @ weight.T + bias
        residual = (logits.softmax(1) - y) / 14
        rate = 0.02 * 0.5 * (1 + np.cos(np.pi * step / 9))
        for i, (part, gradient) in enumerate(((weight, residual.T @ x), (bias, residual.sum(0)))):
            momentum[i] = 0.9 * momentum[i] + gradient
            part -= rate * (gradient + 0.9 * momentum[i])
        if epoch == 2:
            losses.append(-float((logits.log_softmax(1) * y).sum()) / 14)
            right += int((logits.argmax(1) == y.argmax(1)).sum())
    assert not model.training
    torch.testing.assert_close(linear.weight.detach().double(), weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.bias.detach().double(), bias, atol=1e-5, rtol=1e-5)
    assert (weight - start).abs().max() > 1e-2, "something was learned"
    assert last.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert last.top1 == pytest.approx(100 * right / 42)


@pytest.mark.parametrize(
    ("images", "batch_size", "steps", "used", "left_over"),
    [
        (500, 256, 2, 250, 0),
        (501, 256, 2, 250, 1),
        (50000, 256, 196, 255, 20),
        (12, 256, 1, 12, 0),
        (512, 256, 2, 256, 0),
        (2, 256, 1, 2, 0),
        (3, 2, 1, 2, 1),
        (7, 3, 3, 2, 1),
    ],
)
def test_an_epoch_is_cut_into_equal_batches(images: int, batch_size: int, steps: int, used: int, left_over: int) -> None:
    recipe = make_recipe(images, FinetuneSettings(1, batch_size=batch_size, epochs=7))
    assert recipe[:-1] == (7, used, steps, left_over)
    assert recipe.peak_lr == pytest.approx(0.05 * used / 256)


@pytest.mark.parametrize(
    ("images", "batch_size"), [(500, 16), (501, 256), (1000, 300), (7, 3), (3, 2), (2, 256), (129, 128), (1_281_167, 256)]
)
def test_no_image_comes_twice_in_an_epoch(images: int, batch_size: int) -> None:
    """What the recipe says is what the training reads: steps and left-over images of every epoch."""
    recipe, epochs = make_recipe(images, FinetuneSettings(1, batch_size=batch_size, epochs=3)), []
    order = Order(images, 5, recipe)
    for epoch in range(3):
        steps = [order[epoch * recipe.steps_per_epoch + step] for step in range(recipe.steps_per_epoch)]
        assert {one for one, _ in steps} == {epoch}
        assert {len(places) for _, places in steps} == {recipe.batch_size_used}
        epochs.append(np.concatenate([places for _, places in steps]))
        assert len(np.unique(epochs[-1])) == len(epochs[-1]) == images - recipe.left_over
        assert epochs[-1].min() >= 0
        assert epochs[-1].max() < images
    if images > 100:
        assert not np.array_equal(*map(np.sort, epochs[:2])) or not recipe.left_over, "others are left over"
        assert not np.array_equal(*epochs[:2])


def test_each_epoch_of_a_training_has_as_many_images_as_the_result_says(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 images in batches of at most 16 are 8 steps of 15; of at most 11, 11 steps of 10."""
    read, original = [], ShardDataset.__getitem__

    def watched(self: ShardDataset, row: int) -> Any:
        if self.manifest.folder.name == "train":
            read.append(row)
        return original(self, row)

    monkeypatch.setattr(ShardDataset, "__getitem__", watched)
    for batch_size, left_over in ((16, 0), (13, 0), (11, 10), (7, 12)):
        read.clear()
        settings = run(make_encoder(), sets, epochs=3, batch_size=batch_size)["settings"]
        of_epoch = settings["steps_per_epoch"] * settings["batch_size_used"]
        assert (settings["left_over"], len(read)) == (left_over, 3 * of_epoch)
        assert of_epoch == 120 - left_over
        for epoch in range(3):
            assert len(set(read[epoch * of_epoch : (epoch + 1) * of_epoch])) == of_epoch


def test_the_papers_epochs() -> None:
    assert [FinetuneSettings(labels).epochs_used for labels in (0.01, 0.05, 0.1, 1)] == [60, 60, 30, 30]
    assert FinetuneSettings(0.01, epochs=5).epochs_used == 5


# What depends on what


def test_seeds_reproduce_bit_for_bit_whatever_the_workers(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = make_encoder()
    first, again, with_workers = (
        run(encoder, sets, 0.5, seeds=2, epochs=2, workers=workers, out=tmp_path / "r.json") for workers in (0, 0, 2)
    )
    assert without_seconds(first) == without_seconds(again)
    assert without_seconds(first) == without_seconds(with_workers)
    a, b = first["runs"]
    assert a["last_epoch"]["loss"] != b["last_epoch"]["loss"]
    assert len(set(first["subsets"]["digests"])) == 2
    alone = run(encoder, sets, 0.5, seeds=1, epochs=2, out=tmp_path / "r.json")
    assert without_seconds(alone["runs"]) == without_seconds(first["runs"][:1]), "a seed does not depend on those after it"


def test_a_random_start_is_random(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    """It knows the encoder's shape and nothing of its weights; other starts know them."""
    one, two = make_encoder(seed=1, run="one"), make_encoder(seed=2, run="two")

    def losses(encoder: Path, start: str) -> list[float]:
        found = run(encoder, sets, start=start, seeds=2, out=tmp_path / "r.json")
        return [seed["last_epoch"]["loss"] for seed in found["runs"]]

    assert losses(one, "random") == losses(two, "random")
    assert losses(one, "encoder") != losses(two, "encoder")
    assert losses(one, "random") != losses(one, "encoder")


def test_every_seed_starts_at_the_encoder(make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where the seed before it has ended."""
    starts = []

    def watched(model: nn.Sequential, *arguments: Any, **settings: Any) -> Any:
        starts.append(copy.deepcopy(model[0].state_dict()))
        return fit(model, *arguments, **settings)

    monkeypatch.setattr("simclr_dist.evaluate.finetune.fit", watched)
    encoder = make_encoder()
    run(encoder, sets, seeds=2)
    exported = load_encoder(encoder).state_dict()
    for start in starts:
        for name, weight in exported.items():
            assert torch.equal(start[name], weight), name
    assert len(starts) == 2


def test_the_head_is_of_the_seed_and_the_encoder_as_it_was() -> None:
    encoder = untrained_encoder(CARD, 3)
    models = [classifier(copy.deepcopy(encoder), 3, CARD, seed) for seed in (0, 0, 1)]
    heads = [list(model.children())[1] for model in models]
    assert all(isinstance(head, nn.Linear) and head.in_features == CARD["feature_size"] for head in heads)
    a, b, c = (head.state_dict()["weight"] for head in heads)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert float(a.std()) == pytest.approx(0.01, rel=0.2)
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, models[2].state_dict()[f"0.{name}"]), name


def test_every_layer_learns_and_batch_norm_sees_the_batch(make_shards: Make) -> None:
    images = ShardDataset(make_shards("train", *draw_images(30, seed=0)))
    model = classifier(untrained_encoder(CARD, 3), 3, CARD, 0)
    before = copy.deepcopy(model.state_dict())
    fit(model, images, np.arange(30), CARD, Recipe(2, 15, 2, 0, 0.1), seed=0)
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, before[name]), f"{name} is as it was"


def test_what_is_dropped_is_of_the_seed(make_shards: Make) -> None:
    """Whatever was drawn before. And it leaves the generator as it was."""
    images = ShardDataset(make_shards("train", *draw_images(30, seed=0)))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 3))
        torch.rand(len(losses))
        before = torch.get_rng_state()
        losses.append(fit(model, images, np.arange(30), CARD, Recipe(1, 15, 2, 0, 0.0), seed=seed).loss)
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]


def test_the_encoder_file_stays_as_it_is(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    before = {path: path.read_bytes() for path in encoder.parent.iterdir()}
    run(encoder, sets)
    assert {path: path.read_bytes() for path in encoder.parent.iterdir()} == before


def test_a_layer_of_the_projector_is_a_start_too(sets: tuple[Path, Path], tmp_path: Path) -> None:
    path, encoder = tmp_path / "e.safetensors", untrained_encoder(CARD, 3)
    torch.manual_seed(0)
    export_encoder(path, encoder, CARD, build_projector(128, depth=3, hidden=24, dim=8))
    found = run(path, sets, start="projector.1", out=tmp_path / "p.json")
    assert found["encoder"]["card"]["layer"] == "projector.1"
    assert found["encoder"]["projector_sha256"]
    h = run(path, sets, start="encoder", out=tmp_path / "h.json")
    assert h["encoder"]["projector_sha256"] is None
    assert found["runs"][0]["last_epoch"]["loss"] != h["runs"][0]["last_epoch"]["loss"]
    with pytest.raises(DataError, match=r"e\.safetensors: layer projector\.4: its projector has 3 layers"):
        run(path, sets, start="projector.4")


# The result


def test_a_result_holds_all_that_it_depends_on(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    result = run(encoder, sets, 0.5, seeds=3)
    path = encoder.parent.parent / "eval" / "step-00001200.finetune-encoder-0.5.json"
    assert json.loads(path.read_text()) == result
    assert finetune_path(encoder, FinetuneSettings(0.5)) == path
    assert [seed["seed"] for seed in result["runs"]] == [0, 1, 2]
    for seed in result["runs"]:
        assert {"top1", "top5", "mean_per_class", "per_class", "interval", "confusion", "last_epoch", "seconds"} <= set(seed)
        assert 100 * sum(seed["confusion"][c][c] for c in range(3)) / 61 == pytest.approx(seed["top1"])
    top1 = [seed["top1"] for seed in result["runs"]]
    summary = result["summary"]["top1"]
    assert (summary["mean"], summary["sd"]) == (pytest.approx(np.mean(top1)), pytest.approx(np.std(top1, ddof=1)))
    assert (result["encoder"]["card"]["step"], result["class_names"]) == (1200, ["bright", "dark", "striped"])
    settings = result["settings"]
    assert (settings["labels"], settings["start"], settings["seeds"], settings["epochs"]) == (0.5, "encoder", 3, 1)
    assert (settings["batch_size"], settings["batch_size_used"], settings["left_over"]) == (32, 30, 0)
    assert settings["peak_lr"] == pytest.approx(0.05 * 30 / 256)
    assert (result["train"]["images"], result["test"]["images"], result["classes"]) == (120, 61, 3)
    assert len({result["train"]["digest"], result["test"]["digest"], *result["subsets"]["digests"]}) == 5
    assert {"device", "threads"} <= set(result["hardware"])
    assert {"torch", "torchvision"} <= set(result["versions"])


def test_images_without_a_label_are_left_out_and_counted(
    make_encoder: Make, make_shards: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = draw_images(60, seed=0)
    train = make_shards("train", images, [-1] * 6 + labels[6:].tolist())
    test = make_shards("test", images[40:], [*labels[40:-1].tolist(), -1])
    arguments = [str(make_encoder()), "--train", str(train), "--test", str(test), "--labels", "1", "--epochs", "1"]
    assert cli.main(["finetune", *arguments, "--seeds", "1", "--workers", "0", "--device", "cpu", "--batch-size", "16"]) == 0
    out, progress = capsys.readouterr()
    assert "54 of 54 labelled training images; 19 test images, 3 classes" in out
    assert "left out: 6 training images without a label" in out
    assert "left out: 1 test images without a label" in out
    assert "left out: 2 images an epoch, which fill no batch, others every time" in out
    assert "20 test images are among the training images, byte for byte" in out
    assert out.splitlines()[-1].endswith("run/eval/step-00001200.finetune-encoder-1.json")
    assert progress.startswith("seed 0: top-1 ")


def test_no_result_is_lost(
    make_encoder: Make,
    make_shards: Make,
    sets: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not to one of other images under its name, nor to a full disk."""
    arguments = ["finetune", str(make_encoder()), "--train", str(sets[0]), "--labels", "1", "--epochs", "1", "--seeds", "1"]
    arguments += ["--workers", "0", "--device", "cpu", "--test"]
    assert cli.main([*arguments, str(sets[1])]) == 0
    assert "kept as" not in capsys.readouterr().err
    assert cli.main([*arguments, str(make_shards("other", *draw_images(31, seed=7)))]) == 0
    out, progress = capsys.readouterr()
    assert "step-00001200.finetune-encoder-1.kept-" in progress.splitlines()[-1]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "write_atomically", full)
    assert cli.main([*arguments, str(sets[0].parent / "other")]) == 2
    table, told = capsys.readouterr()
    assert table == out.rpartition("written: ")[0]
    assert "finetune-encoder-1.json: cannot write the result: No space left on device" in told.splitlines()[-1]


# Mistakes


def test_mistakes_are_one_line(make_encoder: Make, make_shards: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = draw_images(9, seed=2)
    encoder = make_encoder()
    not_one = tmp_path / "notes.safetensors"
    not_one.write_text("no encoder")
    other = make_shards("other", images, labels, ("bright", "dark", "spotted"))
    lonely = make_shards("lonely", images, [0] * 9, ("bright",))
    no_dark = make_shards("no_dark", images, [0, 2] * 4 + [0])
    unlabelled = make_shards("unlabelled", images, [-1] * 9, ())
    cases: list[tuple[Path, tuple[Path, Path], float, dict[str, Any], str]] = [
        (not_one, sets, 1, {}, r"notes\.safetensors: not an encoder"),
        (tmp_path / "none.safetensors", sets, 1, {}, r"none\.safetensors: no such file"),
        (encoder, (sets[0], tmp_path / "nowhere"), 1, {}, "nowhere: no such folder"),
        (encoder, (sets[0], other), 1, {}, "'spotted' is in one of them only"),
        (encoder, (sets[0], unlabelled), 1, {}, "unlabelled: no image has a label"),
        (encoder, (lonely, lonely), 1, {}, "lonely: has one class"),
        (encoder, (no_dark, sets[1]), 1, {}, "no_dark: class 'dark' has no image"),
        (
            encoder,
            sets,
            0.01,
            {},
            "train: class 'bright' has 40 images and would give none to 0.01 of the labels; 0.025 or more",
        ),
        (encoder, sets, 1, {"start": "projector.1"}, r"step-00001200\.projector, is not beside it"),
        (encoder, sets, 1, {"out": tmp_path}, "is a folder; --out names the result's file"),
    ]
    for path, folders, share, settings, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            run(path, folders, share, **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(make_encoder: Make, sets: tuple[Path, Path], workers: int) -> None:
    shard = sets[0] / "part-1.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 40] ^= 1  # of its first image
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"part-1\.tar: image 000060: its bytes are not those of the manifest"):
        run(make_encoder(), sets, workers=workers)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"base_lr": 1e30, "epochs": 9}, r"the loss of seed 0 is not finite in epoch \d+ of 9"),
        ({"base_lr": 1e9, "batch_size": 120}, "the scores of seed 0 are not finite after epoch 1 of 1"),
    ],
)
def test_a_rate_that_diverges(
    make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    """Also in the last step, whose loss nobody computes."""
    with pytest.raises(ConfigError, match=rf"^base_lr: {line}, at a rate of .*--base-lr$"):
        run(make_encoder(), sets, **settings, out=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("labels", 0.0, "must be above 0 and at most 1"),
        ("labels", 10.0, "must be above 0 and at most 1"),
        ("labels", float("nan"), "is not a finite number"),
        ("seeds", 0, "is too small; the least is 1"),
        ("epochs", 0, "is too small; the least is 1"),
        ("batch_size", 1, "is too small; the least is 2"),
        ("workers", -1, "is too small; the least is 0"),
        ("base_lr", float("inf"), "is not a finite number"),
        ("start", "z", "must be encoder, random, or a layer"),
        ("start", "projector.0", "must be encoder, random, or a layer"),
        ("start", "projector.1/../..", "must be encoder, random, or a layer"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: .*{rule}"):
        FinetuneSettings(**{"labels": 1.0, setting: value})


def test_torchrun_is_refused_by_one_rank(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = make_encoder()
    arguments = ["finetune", str(encoder), "--train", str(sets[0]), "--test", str(sets[1]), "--labels", "1"]
    said = []
    for rank in range(2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(arguments) == 2
        said.append(capsys.readouterr().err)
    assert said[0].startswith("simclr-dist: finetune: runs in one process, and this one is of 2 that torchrun started")
    assert (said[0].count("\n"), said[1]) == (1, "")
    with pytest.raises(ConfigError, match="runs in one process"):
        run(encoder, sets)


def test_help_and_wrong_settings_do_without_torch() -> None:
    probe = "import sys; from simclr_dist.cli.main import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", probe, "finetune", "x", "--train", "a", "--test", "b", "--labels", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr == "simclr-dist: labels: 10.0 must be above 0 and at most 1\n"


@pytest.mark.slow
def test_a_stop_signal_ends_it(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    command = ["finetune", encoder, "--train", sets[0], "--test", sets[1], "--labels", "1", "--seeds", "1000", "--epochs", "1"]
    process = Command(cli.main, [*command, "--workers", "1", "--device", "cpu"])
    try:
        assert process.stderr.readline().startswith("seed 0: top-1 "), "it is at work"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        out, error = process.communicate(timeout=60)
        lines = [line for line in error.splitlines() if not line.startswith("seed ")]
        assert lines == ["simclr-dist: stopped by SIGTERM; the same command starts the finetuning again"]
        assert (process.returncode, out) == (75, "")
        assert not list(encoder.parent.parent.rglob("eval/*.json"))
    finally:
        with process:
            process.kill()
