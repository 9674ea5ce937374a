"""Where a result goes, what its table says, and that it is written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dist.encoder.names import result_path
from simclr_dist.evaluate.protocols.scores import confusions, score
from simclr_dist.evaluate.result.file import FORMAT, as_json, claim, write_result
from simclr_dist.evaluate.result.report import summary, table
from simclr_dist.system.errors import DataError


def result(**encoder: Any) -> dict[str, Any]:
    fitted = {"converged": True, "choice": None, "l2": 0.001}
    interval = {"interval": [60.0, 71.6]}
    return {
        "encoder": {"name": "resnet10", "width": 1, "file": "runs/a/encoders/step-7.safetensors", "step": 7, "init": "random"}
        | {"layer": "h", "weights": None}
        | encoder,
        "train": {"images": 100, "labelled": 100},
        "test": {"images": 50, "labelled": 50},
        "classes": 10,
        "largest_class_percent": 12.0,
        "test_images_in_train": 0,
        "protocols": {
            "knn": {
                "settings": {"k": 20, "k_used": 20, "temperature": 0.1},
                "results": {"raw_pixels": {"top1": 30.0}, "untrained": {"top1": 22.5}, "trained": {"top1": 67.125, **interval}},
            },
            "linear": {
                "settings": {"l2": 0.001},
                "results": {
                    "raw_pixels": {"top1": 16.0, **fitted},
                    "untrained": {"top1": 27.0, **fitted},
                    "trained": {"top1": 100.0, **fitted, **interval},
                },
            },
        },
    }


def test_the_table() -> None:
    assert table(result()).splitlines() == [
        "resnet10, width 1, runs/a/encoders/step-7.safetensors",
        "100 training and 50 test images, 10 classes, largest class 12.0 % of the test images",
        "top-1 %                     kNN  linear",
        "raw pixels                30.00   16.00",
        "untrained encoder         22.50   27.00",
        "trained encoder, step 7   67.12  100.00",
        "95 % intervals of the trained encoder: kNN 60.00-71.60, linear 60.00-71.60",
        "kNN: k=20, temperature 0.1",
        "linear: l2 0.001 (raw pixels), 0.001 (untrained), 0.001 (trained)",
    ]


def test_the_table_says_what_a_reader_must_know() -> None:
    odd = result(init="imagenet, supervised (torchvision V2)")
    odd["protocols"]["knn"]["settings"] |= {"k": 200, "k_used": 90}
    odd["protocols"]["linear"]["results"]["untrained"]["converged"] = False
    odd["train"]["labelled"] = 90
    odd["test_images_in_train"] = 3
    text = table(odd)
    assert "trained encoder, step 7, started from imagenet, supervised (torchvision V2)   67.12  100.00" in text
    assert "k=90 (all training images; 200 asked)" in text
    assert "stopped before it had converged: untrained encoder" in text
    assert "an end of what was tried" not in text
    assert "left out: 10 training images without a label" in text
    lines = text.splitlines()
    (leak,) = (number for number, line in enumerate(lines) if line.startswith("WARNING: 3 test images are among the training"))
    assert leak < next(number for number, line in enumerate(lines) if line.startswith("trained encoder")), "above the numbers"


def test_what_nobody_asked_for_is_not_asked() -> None:
    """Of ten images or fewer all vote, whatever k would be of more."""
    few = result()
    few["protocols"]["knn"]["settings"] |= {"k": 200, "k_used": 4}
    few["train"]["labelled"] = 4
    assert "kNN: k=4 (all training images), temperature 0.1" in table(few).splitlines()
    few["protocols"]["knn"]["settings"] |= {"k": 200, "k_used": 11}
    few["train"]["labelled"] = 11
    assert "kNN: k=11 (all training images; 200 asked), temperature 0.1" in table(few).splitlines()


def test_an_l2_at_the_end_of_its_grid_is_said() -> None:
    odd = result()
    choice = {"l2": 0.001, "grid": [10.0, 1.0, 0.001], "at_edge": True, "chosen_on": "a fifth of the training images"}
    odd["protocols"]["linear"]["results"]["raw_pixels"]["choice"] = choice
    odd["protocols"]["linear"]["results"]["trained"]["choice"] = choice | {"at_edge": False}
    lines = table(odd).splitlines()
    assert "linear: this l2 is an end of what was tried (10 to 0.001), a better one may lie beyond: raw pixels" in lines
    rows = odd["protocols"]["linear"]["results"]
    rows["raw_pixels"]["choice"] = choice | {"at_edge": False}
    rows["untrained"]["choice"] = rows["trained"]["choice"] = choice | {"grid": [10.0, 1.0, 1e-6]}
    end = "linear: this l2 is an end of what was tried"
    line = f"{end} (10 to 1e-06), a better one may lie beyond: untrained encoder; trained encoder, step 7"
    assert [one for one in table(odd).splitlines() if one.startswith(end)] == [line], "what these tried, not the first row"
    rows["trained"]["choice"] = choice | {"grid": [10.0, 1e-5]}
    assert [one.partition(")")[0] for one in table(odd).splitlines() if one.startswith(end)] == [
        f"{end} (10 to 1e-06",
        f"{end} (10 to 1e-05",
    ]


def test_a_choice_is_said_of_the_rows_that_made_it() -> None:
    chosen = result()
    part = chosen["protocols"]["knn"]
    part["settings"]["k_used"] = None

    def choice(k: int, temperature: float = 0.1) -> dict[str, Any]:
        values = {"k": k, "temperature": temperature}
        tried = [values, {"k": 10, "temperature": 0.2}]
        return {"choice": {"chosen_on": "validation images", "values": values, "tried": tried}}

    for row in part["results"].values():
        row |= choice(20)
    assert "kNN: k 20, temperature 0.1, chosen on validation images" in table(chosen).splitlines()
    part["results"]["trained"] |= choice(50, 0.07)
    both = "kNN: k 20, temperature 0.1 (raw pixels, untrained); k 50, temperature 0.07 (trained), chosen on validation images"
    assert both in table(chosen).splitlines()
    part["results"]["untrained"] |= {"subsets": [choice(20)] * 3}
    part["results"]["trained"] |= {"subsets": [choice(50), choice(20), choice(50)]}
    del part["results"]["raw_pixels"]
    del chosen["protocols"]["linear"]
    shares = result() | {"protocols": {"knn@0.1": part}}
    line = "kNN, 10 % of the labels: k 20, temperature 0.1 (untrained, trained 2); k 50, temperature 0.1 (trained 1, trained 3)"
    assert f"{line}, chosen on validation images" in table(shares).splitlines(), "each part of the labels has its own"
    part["results"] = {"trained": part["results"]["trained"] | choice(10)}
    del part["results"]["trained"]["subsets"]
    line = "kNN: k 10 (fixed), temperature 0.1, chosen on validation images"
    assert line in table(result() | {"protocols": {"knn": part}}).splitlines(), "nothing else was tried"


def test_how_sure_the_choice_is_stands_below_it() -> None:
    sure = result()
    choice = {"grid": [10.0, 1.0, 0.1], "at_edge": False, "folds": 5, "validation_rows": 256, "by": "cross-entropy"}
    choice |= {"chosen_on": "training images, each held out once in 5 folds"}
    choice |= {"runner_up": 0.1, "margin": 0.0326, "margin_error": 0.0237}
    for kind in ("untrained", "trained"):
        sure["protocols"]["linear"]["results"][kind]["choice"] = choice
    how = "linear: l2 by cross-entropy, each of 256 images held out once in 5 folds; next best, with the standard error: "
    behind = "worse by 0.033 ± 0.02)"
    assert f"{how}0.1 (untrained, {behind}, 0.1 (trained, {behind}" in table(sure).splitlines()
    choice |= {"folds": 1, "validation_rows": 10000, "by": "top-1", "chosen_on": "a fifth of the training images"}
    assert "linear: l2 by top-1 of 10000 images held out; next best" in table(sure)
    choice |= {"validation_rows": 500, "by": "cross-entropy", "chosen_on": "validation images"}
    assert "linear: l2 by cross-entropy of 500 validation images; next best" in table(sure)
    assert ", chosen on validation images" in table(sure)
    del choice["by"], choice["chosen_on"]  # as in results of older versions, whose baselines are reused
    assert "linear: l2 by top-1 of 500 images held out; next best" in table(sure)
    sure["protocols"]["knn"]["settings"] |= {"k": 200, "k_used": 12}
    assert "kNN: k=12 (of 100 training images), temperature 0.1" in table(sure)


def test_the_summary_has_the_percentages_alone() -> None:
    assert summary(result()) == {
        "knn": {"raw_pixels": 30.0, "untrained": 22.5, "trained": 67.125},
        "linear": {"raw_pixels": 16.0, "untrained": 27.0, "trained": 100.0},
    }


@pytest.mark.parametrize(
    ("encoder", "out", "expected"),
    [
        ("runs/a/encoders/step-7.safetensors", None, "runs/a/eval/step-7.json"),
        ("elsewhere/mine.safetensors", None, "elsewhere/mine.eval.json"),
        ("runs/a/encoders/step-7.safetensors", "b/c.json", "b/c.json"),
    ],
)
def test_where_a_result_goes(encoder: str, out: str | None, expected: str) -> None:
    assert result_path(encoder, out) == Path(expected)


def test_inside_the_folder_of_encoders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoders").mkdir()
    monkeypatch.chdir(tmp_path / "encoders")
    assert result_path("step-7.safetensors").resolve() == tmp_path / "eval" / "step-7.json"


def test_a_result_is_json_and_a_failed_one_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "step-7.json"
    claim(path)
    write_result(path, result())
    assert json.loads(path.read_text()) == result()
    with pytest.raises(ValueError, match="JSON"):
        write_result(path, {"top1": float("nan")})
    assert json.loads(path.read_text()) == result()
    assert [p.name for p in path.parent.iterdir()] == ["step-7.json"]


def test_an_impossible_place_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="folder"):
        claim(tmp_path / "file" / "step-7.json")
    with pytest.raises(DataError, match="is a folder"):
        claim(tmp_path)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    """Above all no encoder and no card."""
    for name in ("step-7.safetensors", "step-7.html"):
        with pytest.raises(DataError, match=r"a result is a \.json file"):
            claim(tmp_path / name, named=True)
    card = tmp_path / "step-7.json"
    card.write_text('{"format": "simclr_dist encoder 1"}')
    with pytest.raises(DataError, match="is no result of an evaluation"):
        claim(card, named=True)
    card.write_text('{"format": "simclr_dist evaluation 1"}')
    claim(card, named=True)


def test_each_layer_has_a_result_of_its_own() -> None:
    assert result_path("r/encoders/step-7.safetensors", layer="z") == Path("r/eval/step-7.z.json")
    assert result_path("mine.safetensors", layer="projector.1").name == "mine.projector.1.eval.json"


def test_many_classes_take_little_room(tmp_path: Path) -> None:
    """A result of 1000 classes and 50,000 test images: all counts, and a line for each class."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(50_000) % 1000
    scores = torch.rand(50_000, 1000, generator=random)
    scores[torch.arange(50_000), labels] += 0.99
    one = score(scores, labels)
    plain = one.to_dict()
    path = tmp_path / "r.json"
    write_result(path, {"format": FORMAT, "protocols": {"knn": {"results": {"trained": plain}}}, "seconds": 1})
    assert path.stat().st_size < 1_000_000
    assert json.loads(path.read_text())["protocols"]["knn"]["results"]["trained"] == plain
    assert sum(count for *_, count in confusions(plain["confusion"])) == 50_000


def test_rows_are_lines() -> None:
    value = {"a": {"b": [1, 2.5, None], "c": []}, "rows": [[1, 2], [3, 4]], "per": [{"x": 1}, {"x": {"y": [2]}}], "e": {}}
    text = as_json(value)
    assert json.loads(text) == value
    assert '"b": [1, 2.5, null],' in text
    assert "\n    [1, 2],\n    [3, 4]\n" in text
    assert '\n    {"x": 1},\n' in text
