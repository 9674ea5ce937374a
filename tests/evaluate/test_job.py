"""The evaluation end to end on small shards: the numbers, the file, the processes, and each mistake as one line."""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision

import ranks
from evaluated import draw_images
from simclr_dist.cli.main import main
from simclr_dist.data.reader import ShardDataset
from simclr_dist.evaluate import embed, job
from simclr_dist.evaluate.features.extraction import EncoderError
from simclr_dist.evaluate.features.store import FeatureStore
from simclr_dist.evaluate.features.views import RandomCrops, crop_and_flip
from simclr_dist.evaluate.finetune import finetune
from simclr_dist.evaluate.finetune import table as finetuned_table
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.protocols import sgd
from simclr_dist.evaluate.result.report import summary, table
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import EmbedSettings, FinetuneSettings, Settings
from simclr_dist.method.distributed import World, set_timeout
from simclr_dist.system.errors import ConfigError, DataError

Make = Callable[..., Path]


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(91, seed=0)), make_shards("test", *draw_images(47, seed=1))


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(part) for key, part in value.items() if key not in ("seconds", "hardware")}
    return value


def test_a_result_holds_all_that_it_depends_on(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    result = evaluate(encoder, *sets, k=10, workers=0, device="cpu")
    written = json.loads((encoder.parent.parent / "eval" / "step-00001200.json").read_text())
    assert written == result
    assert result["encoder"]["sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert (result["encoder"]["name"], result["encoder"]["step"], result["encoder"]["init"]) == ("resnet10", 1200, "random")
    assert (result["train"]["images"], result["test"]["images"], result["classes"]) == (91, 47, 3)
    assert len({result["train"]["digest"], result["test"]["digest"]}) == 2
    assert result["protocols"]["knn"]["settings"]["k_used"] == 10
    assert result["protocols"]["knn"]["settings"]["temperature"] == 0.1
    assert all(row["converged"] for row in result["protocols"]["linear"]["results"].values())
    assert result["largest_class_percent"] == pytest.approx(100 * 16 / 47)
    assert {"device", "threads", "world_size"} <= set(result["hardware"])
    assert {"torch", "torchvision", "python"} <= set(result["versions"])
    assert result["seconds"]["total"] > 0


def test_the_numbers_measure_the_features(make_encoder: Make, make_shards: Make, sets: tuple[Path, Path]) -> None:
    found = summary(evaluate(make_encoder(), *sets, k=10, workers=0, device="cpu"))
    assert set(found) == {"knn", "linear"}
    assert found["knn"]["trained"] > 80
    assert found["linear"]["trained"] > 80
    images, labels = draw_images(91, seed=0)
    shuffled = make_shards("shuffled", images, np.random.default_rng(1).permutation(labels))
    control = summary(evaluate(make_encoder(run="control"), shuffled, sets[1], k=10, workers=0, device="cpu"))
    assert all(value < 60 for protocol in control.values() for value in protocol.values())


def test_where_all_are_right_the_interval_has_a_width(make_encoder: Make, make_shards: Make) -> None:
    """In the result, the table and the page alike; Wilson's, 72.25 to 100 % of 10 images."""
    same = make_shards("same", *draw_images(10, seed=0))
    encoder = make_encoder()
    result = evaluate(encoder, same, same, k=1, workers=0, device="cpu", protocols=("knn", "mlp"), mlp_epochs=300)
    for part in result["protocols"].values():
        for kind, row in part["results"].items():
            low, high = row["interval"]
            assert high - low > 20, kind
    assert result["protocols"]["knn"]["results"]["trained"]["top1"] == 100
    assert "95 % intervals of the trained encoder: kNN 72.25-100.00, MLP " in table(result)
    page = (encoder.parent.parent / "eval" / "step-00001200.html").read_text()
    assert "<td>100.00</td><td>72.25 to 100.00</td>" in page
    assert "100.00 to 100.00" not in page
    settings = FinetuneSettings(1, seeds=2, epochs=1, workers=0)
    shown = finetuned_table(finetuned := finetune(encoder, same, same, settings, device="cpu"))
    intervals = [run["interval"] for run in finetuned["runs"]]
    assert all(high - low > 20 for low, high in intervals)
    assert f"other test images: {', '.join(f'{low:.2f}-{high:.2f}' for low, high in intervals)}" in shown


def test_the_seed_is_of_the_untrained_encoder_alone(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"k": 10, "workers": 0, "device": "cpu"}
    first = evaluate(make_encoder(), *sets, seed=1, out=tmp_path / "1.json", **settings)
    again = evaluate(make_encoder(), *sets, seed=1, out=tmp_path / "2.json", **settings)
    other = evaluate(make_encoder(), *sets, seed=2, out=tmp_path / "3.json", **settings)
    assert without_seconds(first) == without_seconds(again)
    a, b = (without_seconds(result["protocols"]["linear"]["results"]) for result in (first, other))
    assert a["trained"] == b["trained"]
    assert a["raw_pixels"] == b["raw_pixels"]
    assert a["untrained"] != b["untrained"]


def test_without_baselines(make_encoder: Make, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train, test = map(str, sets)
    arguments = ["eval", str(make_encoder()), "--train", train, "--test", test, "--workers", "0", "--no-baselines"]
    assert main([*arguments, "--device", "cpu", "--k", "200"]) == 0
    out, progress = capsys.readouterr()
    assert "features of 138 images" in progress
    assert "trained encoder, step 1200" in out
    assert "raw pixels" not in out
    assert "k=91 (all training images; 200 asked)" in out
    assert "run/eval/step-00001200.json and step-00001200.html\n" in out


def test_unlabelled_and_shared_images_are_counted(make_encoder: Make, make_shards: Make) -> None:
    images, labels = draw_images(60, seed=0)
    train = make_shards("train", images, [-1] * 5 + labels[5:].tolist())
    test = make_shards("test", images[40:], [*labels[40:-1].tolist(), -1])
    result = evaluate(make_encoder(), train, test, workers=0, device="cpu", baselines=False)
    assert (result["train"]["images"], result["train"]["labelled"]) == (60, 55)
    assert (result["test"]["images"], result["test"]["labelled"]) == (20, 19)
    assert result["protocols"]["knn"]["settings"]["k_used"] == 10, "a twentieth would be 2"
    assert result["test_images_in_train"] == 20


def test_every_protocol_and_the_page(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    settings = {"k": 10, "workers": 0, "sgd_epochs": 3, "mlp_epochs": 30, "protocols": ("knn", "linear", "sgd", "mlp")}
    result = evaluate(encoder, *sets, device="cpu", **settings)
    parts = result["protocols"]
    assert list(parts) == ["knn", "linear", "sgd", "mlp"]
    assert set(parts["mlp"]["results"]) == set(parts["knn"]["results"]) == {"raw_pixels", "untrained", "trained"}
    assert set(parts["sgd"]["results"]) == {"trained"}, "it goes through all images in every epoch"
    for part in parts.values():
        row = part["results"]["trained"]
        assert row["interval"][0] <= row["top1"] <= row["interval"][1]
        assert sum(map(sum, row["confusion"])) == 47
    assert parts["sgd"]["settings"]["seed"] == 0, "its crops depend on it"
    sgd = parts["sgd"]["results"]["trained"]
    assert (sgd["views"], sgd["as_in_paper"], sgd["epochs"]) == ("new in every epoch", False, 3)
    assert parts["linear"]["results"]["trained"]["choice"]["validation_rows"] == 91
    assert parts["linear"]["settings"]["folds"] == 5
    assert len(parts["mlp"]["results"]["trained"]["spread"]["top1"]["values"]) == 3
    text = table(result)
    assert re.search(r"^top-1 %                        kNN  linear     SGD +MLP$", text, re.MULTILINE)
    assert re.search(r"^raw pixels +[\d.]+ +[\d.]+ +[\d.]+ ±[\d.]+$", text, re.MULTILINE)
    assert "SGD: 3 epochs of new crops; the paper's 90" in text
    assert "weighted avg" in text
    page = (encoder.parent.parent / "eval" / "step-00001200.html").read_text()
    assert "kNN: untrained encoder" in page
    assert (
        f"simclr-dist eval {encoder} --train {sets[0]} --test {sets[1]} --workers 0 --k 10 --protocols knn,linear,sgd,mlp"
        in page
    )
    assert "data:image/png;base64," in page
    assert result["signals"]["effective_rank"] > 1


def test_new_crops_are_new_in_every_epoch_and_the_same_for_every_order(sets: tuple[Path, Path]) -> None:
    images = ShardDataset(sets[0])
    first, again, other = (RandomCrops(images, crop_and_flip(16), seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert len(first) == 91
    later = again[7]  # row 3 is read after it here, and before it there
    assert torch.equal(first[3].image, again[3].image)
    assert torch.equal(first[7].image, later.image)
    assert first[3].image.shape == (3, 16, 16)
    assert not torch.equal(first[3].image, other[3].image)
    assert (first[3].label, first[3].row) == (images[3].label, 3)


def test_without_any_labels(make_encoder: Make, make_shards: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (make_shards(name, draw_images(n, seed=n)[0], [-1] * n, ()) for name, n in (("train", 30), ("test", 20)))
    arguments = ["eval", str(make_encoder()), "--train", str(train), "--test", str(test), "--workers", "0", "--device", "cpu"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "30 training and 20 test images, none with a label" in out
    assert "effective_rank: " in out
    assert " (1 is collapse (all on one line); more is no better encoder; at most 20)\n" in out
    assert re.search(r"^effective_rank: [\d.]+, untrained [\d.]+ \(", out, re.MULTILINE)
    page = (make_encoder().parent.parent / "eval" / "step-00001200.html").read_text()
    assert "30 training and 20 test images, none with a label" in page
    assert "<th>protocol</th>" not in page, "a table without rows"
    assert "<th>trained encoder</th><th>untrained encoder</th><th>how to read it</th>" in page
    result = json.loads((make_encoder().parent.parent / "eval" / "step-00001200.json").read_text())
    trained, untrained = result["signals"], result["untrained_signals"]
    assert {*trained} == {*untrained}
    for one in (trained, untrained):
        assert f"<td>{one['views']['alignment']:.2f}</td>" in page
    assert trained["effective_rank"] != untrained["effective_rank"]
    assert "<td>views: alignment</td>" in page
    read = "0 where views are alike, 2 for random directions; near 0 beside a uniformity near 0 is collapse"
    assert f"<td>{read}</td>" in page


def test_a_published_checkpoint(sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.pt"
    torch.save({"state_dict": torchvision.models.resnet18().state_dict()}, file)
    options = ["--train", str(sets[0]), "--test", str(sets[1]), "--workers", "0", "--device", "cpu", "--image-size", "32"]
    assert main(["eval", "--arch", "resnet18", "--weights", str(file), "--no-baselines", *options]) == 0
    assert "resnet18, width 1" in capsys.readouterr().out
    result = json.loads((tmp_path / "theirs.eval.json").read_text())
    assert result["encoder"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert main(["eval", "--arch", "resnet50", "--weights", str(file), "--no-baselines", *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    transformer = timm.create_model("test_vit", img_size=32)
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in transformer.state_dict().items()}}, file)
    assert main(["eval", "--arch", "timm/test_vit", "--weights", str(file), "--protocols", "knn", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"timm/test_vit, {file}\n"), "it has no width"
    assert "published encoder, started from published weights theirs.pt (how they were trained is not known)" in out
    result = json.loads((tmp_path / "theirs.eval.json").read_text())
    assert result["encoder"]["weights"]["left_out"] == {"head": 2}
    for wrong in (["--arch", "resnet18"], ["x", "--arch", "resnet18", "--weights", str(file)], ["x"]):
        assert main(["eval", *wrong, *options]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_write_one_result_like_one_process(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder, out = make_encoder(), tmp_path / "two.json"
    alone = evaluate(encoder, *sets, k=10, workers=0, device="cpu", protocols=("knn", "linear", "sgd"), sgd_epochs=2)
    job = [
        "eval",
        encoder,
        "--train",
        sets[0],
        "--test",
        sets[1],
        "--k",
        "10",
        "--protocols",
        "knn,linear,sgd",
        "--sgd-epochs",
        "2",
    ]
    job += ["--workers", "1", "--device", "cpu", "--out", out]
    for reused in (0, 10):  # features of the second start come out of files, which rank 0 alone reads
        codes, said, errors = ranks.commands(main, job, 2)
        assert codes == [0, 0], errors
        assert said.count("trained encoder, step 1200") == 1
        both = json.loads(out.read_text())
        assert both["hardware"]["world_size"] == 2
        assert len(both["features_reused"]) == reused
        assert summary(both) == summary(alone)
    job[-1] = tmp_path / "two.txt"  # refused on rank 0: the other has to hear of it
    codes, _, errors = ranks.commands(main, job, 2)
    assert codes == [2, 2]
    assert errors.count("a result is a .json file") == 1
    assert "[rank1]" not in errors


def _once_slow(original: Callable[..., Any]) -> Callable[..., Any]:
    slept = []

    def slow(*arguments: Any, **settings: Any) -> Any:
        if not slept:
            slept.append(True)
            time.sleep(4)
        return original(*arguments, **settings)

    return slow


def _evaluate_with_a_slow_rank_0(here: World, encoder: Path, sets: tuple[Path, Path], features: Path) -> float:
    """It reads features, fits between two epochs, and writes, each for longer than a collective waits."""
    settings = Settings(k=10, workers=0, protocols=("knn", "sgd"), sgd_epochs=2, baselines=False)
    both = Sets(*sets)
    set_timeout(3 / 60)
    if here.is_main:
        FeatureStore.find = _once_slow(FeatureStore.find)  # type: ignore[method-assign]
        sgd.cross_entropy = _once_slow(sgd.cross_entropy)  # type: ignore[assignment]
        embed.write_features = _once_slow(embed.write_features)
    result = job.measure(here, encoder, both, settings, features=features if here.is_main else None)
    embed.embed_within(here, encoder, str(sets[1]), features / "mine.parquet", EmbedSettings(workers=0))
    return float(result["protocols"]["sgd"]["results"]["trained"]["top1"]) if here.is_main else -1.0


def test_ranks_wait_for_rank_0_as_long_as_it_takes(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = make_encoder()
    alone = evaluate(encoder, *sets, k=10, workers=0, device="cpu", baselines=False, protocols=("knn", "sgd"), sgd_epochs=2)
    (tmp_path / "features").mkdir()
    found = ranks.run(_evaluate_with_a_slow_rank_0, 2, encoder, sets, tmp_path / "features")
    assert found == [alone["protocols"]["sgd"]["results"]["trained"]["top1"], -1.0]
    assert (tmp_path / "features" / "mine.parquet").is_file()


def _evaluate_what_is_replaced(here: World, encoder: Path, other: Path, sets: tuple[Path, Path], out: Path) -> str:
    """Between the reading of the two ranks."""
    load = job.load_encoder
    job.load_encoder = embed.load_encoder = lambda path, *rest: load(path if here.is_main else other, *rest)
    for work in (
        lambda: job.measure(here, encoder, Sets(*sets), Settings(workers=0, baselines=False)),
        lambda: embed.embed_within(here, encoder, str(sets[1]), out, EmbedSettings(workers=0)),
    ):
        with pytest.raises(EncoderError) as caught:
            work()
    return str(caught.value)


def test_all_ranks_have_one_encoder(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoder, other, out = make_encoder(), make_encoder(seed=6, run="other"), tmp_path / "out.parquet"
    told = ranks.run(_evaluate_what_is_replaced, 2, encoder, other, sets, out)
    assert told == [f"{encoder}: was not the same file on every rank; evaluate it again"] * 2
    assert not out.exists()
    assert not (encoder.parent.parent / "eval").exists()


def test_mistakes_are_one_line(make_encoder: Make, make_shards: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = draw_images(9, seed=2)
    encoder = make_encoder()
    not_one = tmp_path / "notes.safetensors"
    not_one.write_text("no encoder")
    other = make_shards("other", images, labels, ("bright", "dark", "spotted"))
    swapped = make_shards("swapped", images, labels, ("dark", "bright", "striped"))
    unlabelled = make_shards("unlabelled", images, [-1] * 9, ())
    lost = "no image has a label, but the other set's have; label both, or neither"
    cases = [
        ((not_one, *sets), r"notes\.safetensors"),
        ((tmp_path / "none.safetensors", *sets), r"none\.safetensors"),
        ((encoder, sets[0], tmp_path / "nowhere"), "nowhere"),
        ((encoder, sets[0], other), "other: its 3 classes are not the 3 of .*train: 'spotted' is in one of them only"),
        ((encoder, sets[0], swapped), "their order differs"),
        ((encoder, unlabelled, sets[1]), f"unlabelled: {lost}"),
        ((encoder, sets[0], unlabelled), f"unlabelled: {lost}"),
    ]
    for arguments, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            evaluate(*arguments, workers=0, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is a folder"):
        evaluate(encoder, *sets, workers=0, device="cpu", out=tmp_path)
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(DataError, match=r"mine\.html: the page goes there, and it is no page of an evaluation"):
        evaluate(encoder, *sets, workers=0, device="cpu", out=tmp_path / "mine.json")
    assert (tmp_path / "mine.html").read_text() == "my own page"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("k", 0), ("temperature", 0.0), ("l2", -1.0), ("l2", float("nan")), ("batch_size", 0), ("sgd_epochs", 0), ("seed", -1)],
)
def test_settings_out_of_range_are_refused_first(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: {value} (must be|is too small|is not)"):
        evaluate("no-encoder", "no-train", "no-test", **{setting: value})


def test_help_and_wrong_settings_do_without_torch() -> None:
    imports = "import sys; from simclr_dist.cli.main import main; "
    probe = imports + "code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", probe, "eval", "x", "--train", "a", "--test", "b", "--k", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr == "simclr-dist: k: 0 is too small; the least is 1\n"
