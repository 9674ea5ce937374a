"""Labels of any number: only the classes that occur cost anything, and users see the labels that they gave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluated import CLASSES, draw_images
from simclr_dist.evaluate.embed import embed
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.finetune import finetune
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.report import table
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import EmbedSettings, FinetuneSettings

Make = Callable[..., Path]
LARGEST = 2**63 - 1
HOW: dict[str, Any] = {"k": 10, "workers": 0, "device": "cpu"}
ALL = {"protocols": ("knn", "linear", "sgd", "mlp"), "sgd_epochs": 1, "mlp_epochs": 1}


def numbered(numbers: tuple[int, ...], labels: np.ndarray) -> list[int]:
    return [numbers[label] for label in labels]


@pytest.mark.parametrize("numbers", [(7, 2119789, 102119789), (0, 1_000_000, LARGEST)])
def test_ids_with_gaps_are_evaluated_as_numbers_from_0_are(
    make_encoder: Make, make_shards: Make, numbers: tuple[int, ...]
) -> None:
    (train, y), (test, z) = draw_images(61, seed=0), draw_images(31, seed=1)
    plain = make_shards("train", train, y, ()), make_shards("test", test, z, ())
    gaps = make_shards("a", train, numbered(numbers, y), ()), make_shards("b", test, numbered(numbers, z), ())
    encoder = make_encoder(config={"global_batch_size": 8})
    expected = evaluate(encoder, *plain, keep_features=False, **HOW, **ALL)
    found = evaluate(encoder, *gaps, **HOW, **ALL)
    names = list(map(str, numbers))
    assert (expected["classes"], expected["class_names"]) == (3, [])
    assert (found["classes"], found["class_names"]) == (3, names)
    assert found["largest_class_percent"] == expected["largest_class_percent"]
    assert found["signals"]["false_negatives"] == expected["signals"]["false_negatives"]
    for protocol in ALL["protocols"]:
        for kind, row in found["protocols"][protocol]["results"].items():
            other = expected["protocols"][protocol]["results"][kind]
            assert {**row, "seconds": 0} == {**other, "seconds": 0}
    run = encoder.parent.parent
    page = (run / "eval" / "step-00001200.html").read_text()
    assert f"<th>{names[2]}</th>" in page
    assert {line.split("\t")[0] for line in (run / "tb/eval/projector/metadata.tsv").read_text().splitlines()[1:]} == set(names)
    assert sum(line.split()[:1] == [names[1]] for line in table(found).splitlines()) == 1, "the MLP's table"


def test_feature_files_keep_the_labels_that_were_given(make_encoder: Make, make_shards: Make, tmp_path: Path) -> None:
    numbers, (images, labels) = (7, 2119789, LARGEST), draw_images(30, seed=0)
    given = [-1, *numbered(numbers, labels[1:])]
    sets = make_shards("a", images, given, ()), make_shards("b", images[::-1], given[::-1], ())
    encoder, folder = make_encoder(), tmp_path / "features"
    embed(encoder, sets[0], folder / "mine.parquet", EmbedSettings(workers=0), device="cpu")
    assert read_features(folder / "mine.parquet").label.tolist() == given
    first = evaluate(encoder, *sets, features=str(folder), baselines=False, **HOW)
    assert first["features_reused"] == {"train: trained": str(folder / "mine.parquet")}
    written = [read_features(path) for path in folder.iterdir()]
    assert sorted(table.label.tolist() for table in written) == sorted([given, *[given[::-1]] * 3])
    again = evaluate(encoder, *sets, features=str(folder), baselines=False, **HOW)
    assert len(again["features_reused"]) == 4
    assert (
        again["protocols"]["knn"]["results"]["trained"]["confusion"]
        == first["protocols"]["knn"]["results"]["trained"]["confusion"]
    )


def test_a_class_of_one_set_alone_is_a_class(make_encoder: Make, make_shards: Make) -> None:
    """5 in training alone, 900 in the test alone; 6 and 7 are numbers without images, and no classes."""
    images, labels = draw_images(40, seed=0)
    train = make_shards("train", images, [5, *(np.array([0, 1, 2])[labels[1:]]).tolist()], ())
    test = make_shards("test", images, [900, *(np.array([0, 1, 2])[labels[1:]]).tolist()], ())
    result = evaluate(make_encoder(), train, test, baselines=False, k=3, workers=0, device="cpu")
    assert result["class_names"] == ["0", "1", "2", "5", "900"]
    knn = result["protocols"]["knn"]["results"]["trained"]
    assert [one["support"] for one in knn["per_class"]] == [*np.bincount(labels[1:]).tolist(), 0, 1]
    assert sum(knn["confusion"][4][:4]) == 1, "what was never learned is taken for something else"
    assert knn["per_class"][4]["recall"] == 0


def test_names_without_images_are_no_classes(make_encoder: Make, make_shards: Make) -> None:
    images, labels = draw_images(60, seed=0)
    names = [f"class {number}" for number in range(21_000)]
    used = 7_000 * labels + 5
    sets = make_shards("train", images, used, names), make_shards("test", images[::-1], used[::-1], names)
    result = evaluate(make_encoder(), *sets, baselines=False, **HOW)
    assert (result["classes"], result["class_names"]) == (3, ["class 5", "class 7005", "class 14005"])
    assert [len(row) for row in result["protocols"]["knn"]["results"]["trained"]["confusion"]] == [3, 3, 3]


def test_ids_with_gaps_are_finetuned(make_encoder: Make, make_shards: Make) -> None:
    (train, y), (test, z) = draw_images(30, seed=0), draw_images(15, seed=1)
    encoder, settings, results = make_encoder(), FinetuneSettings(0.5, epochs=2, seeds=1, workers=0, base_lr=0.01), []
    for name, numbers in (("plain", (0, 1, 2)), ("gaps", (0, 1_000_000, LARGEST))):
        sets = [
            make_shards(f"{name} {i}", part, numbered(numbers, of), ()) for i, (part, of) in enumerate([(train, y), (test, z)])
        ]
        results.append(finetune(encoder, *sets, settings, device="cpu"))
    plain, gaps = results
    assert gaps["class_names"] == ["0", "1000000", str(LARGEST)]
    assert {**gaps["runs"][0], "seconds": 0} == {**plain["runs"][0], "seconds": 0}
    assert gaps["subsets"] == plain["subsets"]


def test_labels_from_0_and_names_stay_as_they_are(make_shards: Make) -> None:
    images, labels = draw_images(12, seed=0)
    for name, classes in (("named", CLASSES), ("numbered", ())):
        shards = make_shards(name, images, [-1, *labels[1:].tolist()], classes)
        sets = Sets(shards, shards)
        assert sets.train.label.tolist() == [-1, *labels[1:].tolist()]
        assert json.dumps(sets.describe()["class_names"]) == json.dumps(list(classes))
        assert sets.labels.tolist() == [0, 1, 2, -1]
