"""The page: everything in it, nothing beside it, and no name from outside as markup."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.evaluate.result.charts import line_chart, ticks
from simclr_dist.evaluate.result.file import FORMAT
from simclr_dist.evaluate.result.page import page, write_page
from simclr_dist.system.errors import DataError


def _measured(top1: float) -> dict[str, Any]:
    return {"top1": top1, "top5": 90.0, "mean_per_class": top1 - 1, "interval": [top1 - 2, top1 + 2], "seconds": 1.0}


def _result(step: int = 40) -> dict[str, Any]:
    results = {"raw_pixels": _measured(20.0), "trained": {**_measured(71.25), "confusion": [[8, 2], [3, 7]]}}
    return {
        "format": FORMAT,
        "encoder": {
            "name": "resnet10",
            "step": step,
            "file": "runs/<b>x</b>.safetensors",
            "sha256": "e" * 64,
            "init": "random",
            "layer": "h",
            **dict.fromkeys(("width", "stem", "feature_size", "image_size", "mean", "std")),
        },
        "test_images_in_train": 0,
        "train": {"labelled": 100, "folder": "data/train", "digest": "a"},
        "test": {"labelled": 20, "folder": "data/test", "digest": "b"},
        "settings": {"layer": "h", "precision": "fp32", "seed": 0},
        "classes": 2,
        "class_names": ["cat & dog", "<script>alert(1)</script>"],
        "protocols": {"knn": {"settings": {"k": 200, "k_used": 20, "temperature": 0.1}, "results": results}},
        "hardware": {"device": "a CPU"},
        "versions": {"torch": "2"},
        "seconds": {"total": 3.5},
        "command": ["simclr-dist", "eval", "my encoder.safetensors", "--train", "data/train"],
    }


def _run(folder: Path) -> Path:
    (folder / "eval").mkdir()
    for step in (10, 20):
        (folder / "eval" / f"step-{step:08d}.json").write_text(json.dumps(_result(step)))
    lines = [{"step": s, "loss/nt_xent": 6 - s / 10, "loss/chance": 6.0, "optim/learning_rate": 0.1 * s} for s in range(1, 41)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 41, "loss/n')  # a killed run's last line
    return folder


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:"), "nothing beside the page"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_everything_is_there(tmp_path: Path) -> None:
    text = page(_result(), run=_run(tmp_path), pictures={"Nearest neighbours": b"\x89PNG", "Map": b"\x89PNG"})
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 3, "loss, learning rate, accuracy; there is no rank in this log"
    assert "script" not in tags.seen
    assert "71.25" in text
    assert "69.25 to 73.25" in text
    assert "simclr-dist eval &#x27;my encoder.safetensors&#x27; --train data/train" in text
    assert text.count("<th>&lt;script&gt;alert(1)&lt;/script&gt;</th>") == 2, "a class's name is whole"
    assert text.count(">step</text>") == 3
    assert "kNN: k=20 (of 100 training images), temperature 0.1" in text
    assert "<h2>Map</h2>" in text
    assert 'src="data:image/png;base64,' in text
    assert "url(" not in text


def test_test_images_that_were_learnt_from_are_told() -> None:
    assert "WARNING" not in page(_result())
    assert "WARNING: 3 test images are among the training images" in page(_result() | {"test_images_in_train": 3})


def test_accuracy_is_drawn_over_checkpoints(tmp_path: Path) -> None:
    text = page(_result(), run=_run(tmp_path))
    chart = text[text.index("test accuracy over checkpoints") :]
    assert chart[: chart.index("</svg>")].count("<circle") == 3
    other = _result()
    other["test"]["digest"] = "another set"
    chart = page(other, run=tmp_path)
    assert chart[chart.index("test accuracy over checkpoints") :].count("<circle") == 1, "other test images are another curve"


def test_many_classes_have_their_most_frequent_confusions_alone() -> None:
    result = _result()
    result["classes"], result["class_names"] = 1000, [f"class <{number}>" for number in range(1000)]
    matrix: list[dict[str, int]] = [{str(number): 40} for number in range(1000)]
    matrix[7]["9"] = 6
    result["protocols"]["knn"]["results"]["trained"]["confusion"] = matrix
    text = page(result)
    assert "<td>class &lt;7&gt;</td><td>class &lt;9&gt;</td><td>6</td>" in text
    assert len(text) < 20_000


def test_only_the_trained_encoder_stands_out() -> None:
    result = _result()
    result["protocols"]["knn"]["results"]["untrained"] = _measured(30.0)
    assert page(result).count('<tr class="best">') == 1


def test_it_does_without_a_run_and_without_much() -> None:
    result = _result()
    del result["class_names"], result["command"]
    for measured in result["protocols"]["knn"]["results"].values():
        del measured["interval"], measured["top5"]
    text = page(result)
    assert "<svg" not in text
    assert "71.25" in text


def test_it_is_written_whole_or_refused(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", page(_result()))
    assert (tmp_path / "report.html").read_text().endswith("</body></html>\n")
    with pytest.raises(DataError, match="cannot write the page"):
        write_page(tmp_path / "nowhere" / "report.html", page(_result()))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 8.9), (5, 5), (0, 0), (-3, 31200), (1e-9, 2e-9), (0.1, 0.1)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    sizes = {float(f"{b - a:.6g}") for a, b in itertools.pairwise(found)}
    assert len(sizes) == 1
    assert f"{sizes.pop():e}"[0] in "125"


def test_a_line_stays_in_its_chart() -> None:
    assert line_chart("empty", {"a": [], "b": [(1, float("nan"))]}) == ""
    chart = line_chart("one & all", {"a": [(0, 5.0)], "b": [(0, 1.0), (7, float("inf")), (10, 3.0)]}, unit=" %")
    assert 'aria-label="one &amp; all"' in chart
    points = re.findall(r'points="([^"]+)"', chart)
    places = [tuple(map(float, point.split(","))) for line in points for point in line.split()]
    assert len(places) == 3
    assert all(56 <= x <= 436 and 46 <= y <= 216 for x, y in places)
