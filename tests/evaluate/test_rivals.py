"""Encoders side by side: what each has to beat, the words with their uncertainty, the page, and nothing measured twice."""

import json
import re
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

import ranks
from evaluated import draw_images
from simclr_dist.cli.main import main
from simclr_dist.encoder.names import Foreign
from simclr_dist.encoder.published import rival
from simclr_dist.evaluate import job, rivals
from simclr_dist.evaluate.classify import classify
from simclr_dist.evaluate.protocols.scores import paired_difference
from simclr_dist.evaluate.result.report import table as result_table
from simclr_dist.evaluate.rivals import compare_encoders, comparison_table
from simclr_dist.evaluate.sets import Sets
from simclr_dist.system.errors import ConfigError, DataError

Make = Callable[..., Path]
HOW: dict[str, Any] = {"device": "cpu", "workers": 0}


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(40, seed=0)), make_shards("test", *draw_images(24, seed=1))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache with a ResNet-18 in it, and no network behind it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    file = tmp_path / "torch" / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), file)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    return file


def texts(runs: np.ndarray) -> list[str]:
    return ["".join(map(str, run)) for run in runs.astype(int).tolist()]


# The words and their uncertainty


def test_the_interval_is_that_of_resampled_images() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 400)) < 0.7, rng.random((1, 400)) < 0.6
    paired = paired_difference(texts(ours), texts(theirs))
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    assert paired["points"] == pytest.approx(100 * difference.mean())
    drawn = 100 * difference[rng.integers(0, 400, (20_000, 400))].mean(axis=1)
    assert paired["interval"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.3)
    assert (paired["better"], paired["worse"]) == ((difference > 0).sum(), (difference < 0).sum())
    assert paired_difference(texts(ours), texts(theirs)) == paired


def test_answers_that_go_together_tell_more_than_two_accuracies() -> None:
    """Ten of 400 images better and none worse: the two intervals of the accuracies overlap, the paired one is above 0."""
    theirs = np.arange(400) < 280
    ours = np.arange(400) < 290
    low, high = paired_difference(texts(ours[None]), texts(theirs[None]))["interval"]
    assert 0 < low < 2.5 < high < 5


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ("1" * 90 + "0" * 10, "1" * 60 + "0" * 40, r"linear: 30\.0 points above it, interval 2\d\.\d to 3\d\.\d"),
        ("1" * 60 + "0" * 40, "1" * 90 + "0" * 10, r"linear: 30\.0 points below it, interval -3\d\.\d to -2\d\.\d"),
        ("10" * 50, "01" * 50, r"linear: not above it: \+0\.0 points, interval -\d+\.\d to \d+\.\d"),
        (
            "1" * 10,
            "1" * 5 + "0" * 5,
            r"linear: not above it: \+50\.0 points, interval .*; only 5 images have different answers",
        ),
        (
            "1" * 10,
            "1" * 10,
            r"linear: not above it: \+0\.0 points, interval 0\.0 to 0\.0; only 0 images have different answers",
        ),
    ],
)
def test_the_verdict_says_how_sure_it_is(ours: str, theirs: str, words: str) -> None:
    verdict = rivals._verdict("linear", "it", {"right": [ours]}, {"right": [theirs]})
    assert re.fullmatch(words, verdict["verdict"])


# From encoders to the page


def test_several_encoders_are_one_table_and_one_page(make_encoder: Make, sets: tuple[Path, Path], published: Path) -> None:
    ours, other = make_encoder(), make_encoder(seed=6, run="other", step=7)
    network = rival("torchvision/resnet18")
    comparison = compare_encoders([ours, other, network], *sets, k=10, **HOW)
    folder = ours.parent.parent / "eval"
    assert json.loads((folder / "step-00001200.rivals.json").read_text()) == comparison
    names = [
        f"{ours.parent.parent}/step-00001200",
        "its network, untrained",
        "raw pixels",
        f"{other.parent.parent}/step-00000007",
        f"torchvision/resnet18 ({published.name})",
    ]
    for protocol in ("knn", "linear"):
        assert list(comparison["top1"][protocol]) == names
    verdicts = [(one["protocol"], one["rival"]) for one in comparison["verdicts"]]
    assert verdicts == [(protocol, name) for protocol in ("knn", "linear") for name in names[1:]]
    alone = json.loads((folder / "step-00001200.json").read_text())
    for kind, name in (("trained", names[0]), ("untrained", names[1]), ("raw_pixels", names[2])):
        row = alone["protocols"]["knn"]["results"][kind]
        assert comparison["top1"]["knn"][name] == [row["top1"], *row["interval"]]
        assert 100 * row["right"][0].count("1") / 24 == pytest.approx(row["top1"])
    second = json.loads((other.parent.parent / "eval" / "step-00000007.json").read_text())
    assert second["baselines_measured_for"] == "step-00001200.safetensors", "measured once, for the first"
    theirs = json.loads((folder / "rivals" / "torchvision-resnet18-resnet18-f37072fd.pth.json").read_text())
    assert theirs["encoder"]["image_size"] == 224, "each at its own size"
    assert set(theirs["protocols"]["knn"]["results"]) == {"trained"}
    assert not list(published.parent.glob("*.json"))
    page = (folder / "step-00001200.rivals.html").read_text()
    for text in (*map(escape, names), *(one["verdict"] for one in comparison["verdicts"])):
        assert text in page
    assert len(re.findall(r"<td>\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)</td>", page)) == 10
    assert page.count('<a href="/') == 3
    assert comparison["command"][-4:] == ["--rival", str(other), "--rival", "torchvision/resnet18"], (
        "with its own mean and size"
    )
    table = comparison_table(comparison)
    assert all(one["verdict"] in table for one in comparison["verdicts"])


def test_what_was_measured_is_not_measured_again(
    make_encoder: Make, sets: tuple[Path, Path], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [make_encoder(), Foreign("resnet18", str(published), 32)]
    first = compare_encoders(encoders, *sets, k=10, **HOW)
    monkeypatch.setattr(rivals, "measure_one", None)
    assert compare_encoders(encoders, *sets, k=10, **HOW) == first
    measured: list[Any] = []

    def measure(world: Any, encoder: Any, *rest: Any, **how: Any) -> Any:
        measured.append(encoder)
        return job.measure_one(world, encoder, *rest, **how)

    monkeypatch.setattr(rivals, "measure_one", measure)
    compare_encoders(encoders, *sets, k=11, **HOW)
    assert measured == encoders, "of other settings both are"
    smaller = Foreign("resnet18", str(published), 48)
    compare_encoders([encoders[0], smaller], *sets, k=11, **HOW)
    assert measured[2:] == [smaller], "the same file at another image size"
    compare_encoders([encoders[0]], *sets, val=sets[1], **HOW)
    assert measured[3:] == [encoders[0]], "chosen on validation images"


def test_each_file_of_weights_has_a_result_of_its_own(
    make_encoder: Make, sets: tuple[Path, Path], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that differ in the suffix alone had one, and each comparison measured both anew. Its name is no hindrance now."""
    suffixed, bare = published.with_name("w.pth"), published.with_name("w")
    shutil.copy(published, suffixed)
    torch.save({name: 2 * value for name, value in torch.load(published, weights_only=True).items()}, bare)
    how: dict[str, Any] = {"protocols": ("knn",), **HOW}
    encoders = [make_encoder(), *(Foreign("resnet18", str(file), 32) for file in (suffixed, bare))]
    folder = encoders[0].parent.parent / "eval" / "rivals"
    compare_encoders(encoders[:2], *sets, **how)
    (folder / "resnet18-w.pth.json").rename(folder / "resnet18-w.json")  # as an earlier version named it
    first = compare_encoders(encoders, *sets, **how)
    results = {path.name: json.loads(path.read_text())["encoder"]["file"] for path in folder.glob("*.json")}
    kept = next(name for name in results if ".kept-" in name)
    assert results == {"resnet18-w.pth.json": str(suffixed), "resnet18-w.json": str(bare), kept: str(suffixed)}
    links = re.findall(r'<a href="([^"]+)"', (folder.parent / "step-00001200.rivals.html").read_text())
    assert links[1:] == [str(folder / "resnet18-w.pth.html"), str(folder / "resnet18-w.html")]
    monkeypatch.setattr(rivals, "measure_one", None)
    assert compare_encoders(encoders, *sets, **how) == first


def test_the_command_line(make_encoder: Make, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shards = ["--train", str(sets[0]), "--test", str(sets[1]), "--device", "cpu", "--workers", "0", "--protocols", "knn"]
    encoder = make_encoder()
    assert main(["eval", str(encoder), str(make_encoder(seed=6, run="b")), *shards]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^raw pixels +\d+\.\d\d$", out, re.MULTILINE)
    assert re.search(r"^kNN: .* its network, untrained", out, re.MULTILINE)
    assert out.endswith("step-00001200.rivals.json and step-00001200.rivals.html\n")
    command = json.loads((encoder.parent.parent / "eval" / "step-00001200.rivals.json").read_text())["command"]
    assert main([*command[1:], "--device", "cpu"]) == 0, "the page's command repeats it"


def test_two_processes_compare_as_one(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoders = [make_encoder(), make_encoder(seed=6, run="b")]
    alone = compare_encoders(encoders, *sets, protocols=("knn",), **HOW)
    for encoder in encoders:
        shutil.rmtree(encoder.parent.parent / "eval")
    words = [
        "eval",
        *encoders,
        "--train",
        sets[0],
        "--test",
        sets[1],
        "--device",
        "cpu",
        "--workers",
        "0",
        "--protocols",
        "knn",
    ]
    codes, said, errors = ranks.commands(main, words, 2)
    assert codes == [0, 0], errors
    together = json.loads((encoders[0].parent.parent / "eval" / "step-00001200.rivals.json").read_text())
    assert (together["top1"], together["verdicts"]) == (alone["top1"], alone["verdicts"])
    assert said.count("raw pixels") == said.count("\nraw pixels") + len(["in its verdict"]), "rank 0 alone says it"


def test_weights_that_cannot_be_had_are_one_line(published: Path, sets: tuple[Path, Path], make_encoder: Make) -> None:
    found = rival("torchvision/resnet18")
    assert isinstance(found, Foreign)
    assert (found.arch, found.weights, found.image_size) == ("torchvision/resnet18", str(published), 224)
    published.unlink()
    with pytest.raises(ConfigError) as refused:
        rival("torchvision/resnet18")
    assert str(refused.value) == (
        "rival: torchvision/resnet18: its weights are in no cache here and cannot be downloaded (OSError); fetch "
        "https://download.pytorch.org/models/resnet18-f37072fd.pth, and name it by --rival torchvision/resnet18=FILE"
    )
    with pytest.raises(
        ConfigError, match="rival: resnet10: publishes no weights; name a file of them by --rival resnet10=FILE"
    ):
        rival("resnet10")
    with pytest.raises(ConfigError, match=r"rival: 'resnet51' is not one of .*; or name an encoder's file, or ARCH=FILE"):
        rival("resnet51")


def test_timms_weights_come_with_their_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda place, name: f"{tmp_path}/{place}/{name}")
    assert rival("timm/vit_small_patch16_224") == Foreign(
        "timm/vit_small_patch16_224", f"{tmp_path}/timm/vit_small_patch16_224.augreg_in21k_ft_in1k/model.safetensors",
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip


def test_without_labels_there_is_nothing_to_compare(make_encoder: Make, make_shards: Make) -> None:
    images, labels = draw_images(20, seed=0)
    bare = make_shards("bare", images, labels * 0 - 1, classes=())
    with pytest.raises(DataError, match="no image has a label; encoders are compared by labels"):
        compare_encoders([make_encoder(), make_encoder(run="b")], bare, bare, **HOW)


def test_a_stored_result_may_have_more_than_is_asked(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoders = [make_encoder(), make_encoder(seed=6, run="b")]
    job.evaluate(encoders[0], *sets, protocols=("knn", "linear"), **HOW)
    how: dict[str, Any] = {"protocols": ("knn",), "baselines": False, **HOW}
    comparison = compare_encoders(encoders, *sets, **how)
    assert list(comparison["top1"]) == ["knn"]
    second = json.loads((encoders[1].parent.parent / "eval" / "step-00001200.json").read_text())
    assert list(second["protocols"]["knn"]["results"]) == ["trained"], "no baselines were asked for"


def test_each_comparison_is_kept(make_encoder: Make, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of other encoders, other settings and another layer; the line names the file that is there."""
    ours, runs = make_encoder(), [make_encoder(seed=seed, run=f"lr=0.{seed}") for seed in (6, 7)]
    folder = ours.parent.parent / "eval"
    typed = ["--train", str(sets[0]), "--test", str(sets[1]), "--device", "cpu", "--workers", "0", "--protocols", "knn"]
    for more in (["--rival", str(runs[0])], ["--rival", str(runs[1].parent.parent)], ["--rival", str(runs[1]), "--k", "5"]):
        assert main(["eval", str(ours), *more, *typed]) == 0
    assert len(list(folder.glob("step-00001200.rivals.kept-*.json"))) == 2
    assert main(["eval", str(ours), "--rival", str(runs[1]), "--k", "5", *typed]) == 0
    assert len(list(folder.glob("step-00001200.rivals.kept-*.json"))) == 2, "the same again"
    written = re.findall(r"written: (.*) and", capsys.readouterr().out)
    assert set(written) == {str(folder / "step-00001200.rivals.json")}


def test_another_layer_has_a_comparison_of_its_own(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Path]()
    monkeypatch.setattr(rivals, "claim_both", lambda path, named: (made.append(path), job.claim(path, named=named)))
    monkeypatch.setattr(rivals, "_measured", lambda *_: ({}, ""))
    monkeypatch.setattr(rivals, "_side_by_side", lambda *_: {"verdicts": [], "top1": {"knn": {"a": [1, 0, 2]}}})
    encoder = make_encoder()
    compare_encoders([encoder], *sets, layer="z", **HOW)
    assert made == [encoder.parent.parent / "eval" / "step-00001200.z.rivals.json"]
    assert made[0].exists()


def test_encoders_are_checked_before_the_first_is_measured(
    make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "measure_one", None)
    encoder = make_encoder()
    with pytest.raises(DataError, match=r"gone.safetensors: no such file"):
        compare_encoders([encoder, "gone.safetensors"], *sets, **HOW)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights.pth").touch()
    two = [Foreign("resnet18", str(tmp_path / folder / "weights.pth")) for folder in ("a", "b")]
    with pytest.raises(ConfigError, match=r"resnet18 \(weights.pth\): is named twice"):
        compare_encoders([encoder, *two], *sets, **HOW)
    for measured in (
        lambda: compare_encoders([encoder, two[0]], *sets, layer="z", **HOW),
        lambda: job.evaluate(two[0], *sets, layer="z", **HOW),
    ):
        with pytest.raises(ConfigError, match=r"^layer: 'z': a published checkpoint has h alone$"):
            measured()


# How many labels an encoder saves


def test_shares_of_the_labels_in_one_command(
    make_encoder: Make, make_shards: Make, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = make_shards("train", *draw_images(60, seed=0)), make_shards("test", *draw_images(24, seed=1))
    encoder = make_encoder()
    words = ["eval", str(encoder), "--train", str(train), "--test", str(test), "--device", "cpu", "--workers", "0"]
    words += ["--protocols", "linear,finetune", "--labels", "0.2/1", "--finetune-epochs", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^top-1 % +linear, 20 % of the labels  linear  finetuned, 20 % of the labels +finetuned$", out, re.MULTILINE
    )
    assert re.search(r"^its network, untrained +[\d.]+ ±[\d.]+ +[\d.]+ +[\d.]+ ±[\d.]+ +[\d.]+ ±[\d.]+$", out, re.MULTILINE)
    assert "±: the standard deviation of a row's runs" in out
    assert re.search(r"^finetuned, 20 % of the labels: .* its network, untrained", out, re.MULTILINE)
    folder = encoder.parent.parent / "eval"
    parts = json.loads((folder / "step-00001200.json").read_text())["protocols"]
    assert list(parts) == ["linear@0.2", "linear", "finetune@0.2", "finetune"]
    assert set(parts["linear@0.2"]["results"]) == {"raw_pixels", "untrained", "trained"}
    assert set(parts["finetune"]["results"]) == {"untrained", "trained"}
    row = parts["linear@0.2"]["results"]["trained"]
    assert (row["spread"]["runs"], len(row["subsets"]), len(row["right"])) == (3, 3, 3)
    assert row["top1"] == pytest.approx(np.mean([100 * run.count("1") / 24 for run in row["right"]]))
    assert parts["linear"]["results"]["trained"]["right"][1:] == [], "all labels are one set"
    assert parts["finetune@0.2"]["results"]["trained"]["spread"]["runs"] == 3
    sd = row["spread"]["top1"]["sd"]
    assert f"{row['top1']:.2f} ±{sd:.2f}" in (folder / "step-00001200.html").read_text()
    page = (folder / "step-00001200.rivals.html").read_text()
    for text in (
        f"{row['top1']:.2f} ±{sd:.2f} (",
        ">20 %<",
        ">100 %<",
        "finetuned: top-1 by the share of the labels",
        "linear: top-1 by the share of the labels",
    ):
        assert text in page
    assert page.count("<svg") == 2


def test_a_share_learns_from_its_subset_alone(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels outside of the subset have no say: wrong ones change nothing."""
    how = {"protocols": ("knn",), "labels": (0.2,), "keep_features": False, "baselines": False, **HOW}
    encoder = make_encoder()
    whole = job.evaluate(encoder, *sets, **how)["protocols"]["knn@0.2"]["results"]["trained"]
    kept = np.unique(np.concatenate(job._subsets(Sets(*sets), job.Settings(protocols=("knn",), labels=(0.2,)))[0.2]))
    seen: list[Any] = []

    def wrong(features: Any, *rest: Any, **how: Any) -> Any:
        label = features["train"]["trained"].label.clone()
        others = torch.from_numpy(np.setdiff1d(np.arange(40), kept))
        label[others] = (label[others] + 1) % 3
        seen.append(int((label != features["train"]["trained"].label).sum()))
        features["train"]["trained"] = features["train"]["trained"]._replace(label=label)
        return classify(features, *rest, **how)

    monkeypatch.setattr(job, "classify", wrong)
    again = job.evaluate(encoder, *sets, **how)["protocols"]["knn@0.2"]["results"]["trained"]
    assert seen[0] > 10
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}


def test_one_class_cannot_be_finetuned(make_encoder: Make, make_shards: Make) -> None:
    images, labels = draw_images(6, seed=0)
    one = make_shards("one", images, labels * 0, classes=("all",))
    with pytest.raises(DataError, match="one: has one class; finetuning needs two or more"):
        job.evaluate(make_encoder(), one, one, protocols=("finetune",), labels=(0.17,), **HOW)


@pytest.mark.parametrize(
    ("settings", "kept", "line"),
    [
        ({"protocols": ("linear", "finetune"), "labels": (0.1,)}, 3, "linear probe: 3 labelled training images are too few"),
        ({"protocols": ("knn", "finetune")}, 2, "train: class 'striped' has no image, so it cannot be learned"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(
    settings: dict[str, Any], kept: int, line: str, make_encoder: Make, make_shards: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shares, nine finetunings came before the linear probe's refusal, and no number of them was kept."""
    images, labels = draw_images(40, seed=0)
    train = make_shards("train", images[labels < kept], labels[labels < kept])
    test = make_shards("test", *draw_images(24, seed=1))
    monkeypatch.setattr(job, "Collector", None)
    with pytest.raises(DataError, match=line):
        job.evaluate(make_encoder(), train, test, **settings, **HOW)


def test_what_a_part_of_the_labels_decides_is_said_by_its_rows(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    """A fifth of 40 images is 8; of three classes alike they are 9."""
    result = job.evaluate(make_encoder(), *sets, protocols=["knn"], labels=[0.2], **HOW)
    assert "--protocols knn --labels 0.2" in " ".join(result["command"]), "of lists, too"
    part = result["protocols"]["knn@0.2"]
    assert part["settings"]["k_used"] is None
    assert part["results"]["trained"]["k"] == 9


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"labels": (0.1, 0.1)}, "labels: 0.1/0.1 must be one share or more, each once"),
        ({"labels": (0.1, 0.10000001)}, "labels: 0.1/0.10000001 must be one share or more, each once"),  # one name in results
        ({"labels": (0.1,), "protocols": ("sgd",)}, "labels: the protocol sgd learns from all of them; add 1, or leave it out"),
        ({"finetune_epochs": 5}, "finetune_epochs: 5: has no effect without the protocol finetune; leave it out"),
    ],
)
def test_shares_that_are_none(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        job.Settings(**settings)


# What is chosen on images of its own


@pytest.fixture
def three(make_shards: Make) -> dict[str, Path]:
    counts = {"train": 60, "val": 31, "test": 25}
    return {name: make_shards(name, *draw_images(count, seed=number)) for number, (name, count) in enumerate(counts.items())}


def test_validation_images_choose_all_that_is_not_set(make_encoder: Make, three: dict[str, Path], tmp_path: Path) -> None:
    how: dict[str, Any] = {"protocols": ("knn", "linear", "sgd", "mlp"), "sgd_epochs": 3, "mlp_epochs": 4, **HOW}
    result = job.evaluate(make_encoder(), three["train"], three["test"], val=three["val"], **how)
    assert result["val"]["images"] == 31
    assert (result["test_images_in_train"], result["test_images_in_val"]) == (0, 0)
    parts = {name: part["results"]["trained"] for name, part in result["protocols"].items()}
    for name, row in parts.items():
        assert row.get("choice", {}).get("chosen_on") == (None if name == "sgd" else "validation images"), name
    assert parts["knn"]["k"] in (10, 20, 50, 60)
    assert parts["linear"]["choice"]["validation_rows"] == 31
    assert parts["linear"]["choice"]["by"] == "cross-entropy"
    assert 1 <= parts["mlp"]["epochs"] <= 4
    assert "--val" in result["command"]
    assert f"<td>validation images</td><td>{three['val']} (" in (tmp_path / "run" / "eval" / "step-00001200.html").read_text()
    text = result_table(result)
    for words in (
        "chosen on validation images",
        "kNN: k ",
        "MLP: lr ",
        "±: the standard deviation of a row's runs",
        "SGD: 3 epochs of new crops",
    ):
        assert words in text
    fixed = job.evaluate(make_encoder(run="b"), three["train"], three["test"], val=three["val"], k=7, temperature=0.4, **HOW)
    row = fixed["protocols"]["knn"]["results"]["trained"]
    assert (row["k"], row["temperature"], row["choice"]) == (7, 0.4, None), "what is set is not chosen"
    assert "\nkNN: k=7, temperature 0.4\n" in result_table(fixed)
    assert "chosen_on" not in fixed["protocols"]["knn"]["settings"]


def test_no_test_image_has_a_say_in_the_choice(make_encoder: Make, make_shards: Make, three: dict[str, Path]) -> None:
    images, labels = draw_images(25, seed=9)
    other = make_shards("other", images, np.roll(labels, 1))
    how: dict[str, Any] = {
        "protocols": ("knn", "linear", "mlp"),
        "mlp_epochs": 2,
        "baselines": False,
        **HOW,
    }
    encoder = make_encoder()
    chosen = []
    for test in (three["test"], other):
        result = job.evaluate(encoder, three["train"], test, val=three["val"], **how)
        chosen.append({name: part["results"]["trained"]["choice"] for name, part in result["protocols"].items()})
    assert len(chosen[0]) == 3
    assert chosen[0] == chosen[1]


def test_validation_images_that_cannot_be(make_encoder: Make, make_shards: Make, three: dict[str, Path]) -> None:
    images, labels = draw_images(12, seed=4)
    bare = make_shards("bare", images, labels * 0 - 1)
    with pytest.raises(DataError, match="bare: no image has a label, but the other set's have; label both, or neither"):
        job.evaluate(make_encoder(), three["train"], three["test"], val=bare, **HOW)
    with pytest.raises(DataError, match="bare: no image has a label, so there is nothing to choose by it; leave --val out"):
        job.evaluate(make_encoder(), bare, bare, val=bare, **HOW)
    for settings in (
        {"protocols": ("sgd", "finetune")},
        {"protocols": ("knn", "linear"), "k": 3, "temperature": 0.1, "l2": 0.1},
    ):
        with pytest.raises(ConfigError, match=r"^val: .*/val: there is nothing to choose by it, as all is set; leave it out$"):
            job.evaluate(make_encoder(), three["train"], three["test"], val=three["val"], **settings, **HOW)
    classes = make_shards("classes", images, labels, classes=("a", "b", "c"))
    with pytest.raises(DataError, match=r"classes: its 3 classes are not the 3 of .*train"):
        job.evaluate(make_encoder(), three["train"], three["test"], val=classes, **HOW)


def test_test_images_among_the_validation_images_are_told(make_encoder: Make, three: dict[str, Path]) -> None:
    result = job.evaluate(make_encoder(), three["train"], three["val"], val=three["val"], protocols=("knn",), **HOW)
    assert result["test_images_in_val"] == 31
    assert "WARNING: 31 test images are among the validation images, byte for byte" in result_table(result)
