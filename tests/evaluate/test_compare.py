"""Runs side by side: what the folders say, and nothing that they do not."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from run_folders import BASE, begun, evaluated
from simclr_dist.cli.main import main
from simclr_dist.config.load import config_from_dict
from simclr_dist.evaluate.compare import as_csv, compare, curves_of, table
from simclr_dist.evaluate.result.file import FORMAT
from simclr_dist.evaluate.result.picture import charts_png
from simclr_dist.run.folder import open_run
from simclr_dist.run.status import record_event, record_start
from simclr_dist.run.summary import summarise
from simclr_dist.system.errors import DataError


def cells(text: str) -> list[list[str]]:
    """The table's words by line, as two blanks part them."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_only_what_differs_and_what_came_of_it(tmp_path: Path) -> None:
    one = begun(tmp_path / "one", optim={"base_lr": 0.1})
    begun(tmp_path / "two", state="preempted", steps=20, optim={"base_lr": 0.3}, seed=7)
    evaluated(one, 20, knn=61.0, linear=65.0)
    evaluated(one, 40, knn=62.5, linear=64.0)
    lines = cells(table(compare([tmp_path])))
    assert lines == [
        ["run", "state", "steps", "kNN %", "linear %", "loss", "images/s", "rank-h", "seed", "base_lr"],
        ["one", "done", "40/40", "62.50 @40", "64.00 @40, best 65.00 @20", "1.0000", "125", "1", "0", "0.1"],
        ["two", "paused", "20/40", "3.0000", "115", "1", "7", "0.3"],
        ["two: paused: because"],
        ["kNN: 64 images of t/images, 10 classes, learnt from 64 images of train; k 20, k_used 20"],
        ["linear: 64 images of t/images, 10 classes, learnt from 64 images of train; l2 chosen"],
    ]


def test_accuracies_on_other_images_are_not_put_beside_each_other(tmp_path: Path) -> None:
    """Of one run those of its newest images make the curve; between runs a letter tells which they are."""
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two", seed=1)
    evaluated(one, 20, test="old", knn=99.0)
    evaluated(one, 40, knn=50.0)
    evaluated(two, 40, test="other", knn=70.0)
    comparison = compare([one, two])
    assert comparison.rows[0].accuracy == {"knn": {40: 50.0}}
    text = table(comparison)
    assert "50.00 @40 a" in text
    assert "70.00 @40 b" in text
    assert "kNN b: 64 images of other/images" in text
    assert "WARNING: kNN: numbers with different letters cannot be compared" in text


def test_one_set_of_images_under_two_names_is_one(tmp_path: Path) -> None:
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two", seed=1)
    evaluated(one, 40, knn=50.0)
    evaluated(two, 40, knn=60.0)
    path = two / "eval" / "step-00000040.json"
    path.write_text(path.read_text().replace("t/images", "copy/images"))
    text = table(compare([tmp_path]))
    assert "WARNING" not in text
    assert "kNN: 64 images of t/images" in text


def test_runs_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for seed in (10, 9, 2):
        begun(tmp_path / f"base_lr=0.1+seed={seed}", seed=seed)
    assert [row.name.rpartition("=")[2] for row in compare([tmp_path]).rows] == ["2", "9", "10"]


def test_a_csv_has_the_numbers_in_full(tmp_path: Path) -> None:
    one = begun(tmp_path / "one")
    begun(tmp_path / "two", views={"crop_scale": [0.2, 1.0]}, state="failed")
    evaluated(one, 20, linear=65.125)
    evaluated(one, 40, linear=64.0)
    rows = list(csv.DictReader(io.StringIO(as_csv(compare([tmp_path])))))
    assert [row["views.crop_scale"] for row in rows] == ["null", "[0.2, 1.0]"]
    assert (rows[0]["linear_best"], rows[0]["linear_best_step"]) == ("65.125", "20")
    assert (rows[0]["linear_newest"], rows[0]["linear_newest_step"], rows[1]["linear_newest"]) == ("64.0", "40", "")
    assert (rows[1]["state"], rows[1]["reason"], rows[1]["rank_hours"]) == ("failed", "because", "1.0")


def test_the_cost_of_killed_and_running_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed start counts to its last sign of life, not to when somebody noticed."""
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    run = tmp_path / "run"
    claim = open_run(config_from_dict({**BASE, "run_folder": str(run)}, "test"), {})
    record_start(claim, 0, 4)
    now += 3600
    claim.beat(10)
    now += 7200  # dead, and nobody there
    claim.release()
    assert summarise(run).outlook.state == "killed"
    claim = open_run(config_from_dict({**BASE, "run_folder": str(run)}, "test"), {})
    record_start(claim, 0, 2)
    now += 1800
    claim.beat(10)
    assert summarise(run).outlook.state == "running"
    assert summarise(run).rank_hours == pytest.approx(4 * 1 + 2 * 0.5)
    claim.release()


def test_a_submitted_run_and_one_without_a_length_in_steps(tmp_path: Path) -> None:
    (tmp_path / "sent" / "slurm").mkdir(parents=True)
    (tmp_path / "sent" / "submission.json").write_text("{}")
    record_event(tmp_path / "sent", "submitted", kind="train", job="7")
    begun(tmp_path / "run", steps=20, state="preempted", length={"steps": None, "epochs": 3.0})
    comparison = compare([tmp_path])
    states = {row.name: (row.summary.outlook.state, row.summary.step, row.summary.total) for row in comparison.rows}
    assert states == {"sent": ("submitted", 0, None), "run": ("preempted", 20, 40)}


def test_damaged_and_foreign_folders_are_named_and_passed_over(tmp_path: Path) -> None:
    begun(tmp_path / "good")
    begun(tmp_path / "bad")
    (tmp_path / "bad" / "config.yaml").write_text("seed: [")
    evaluated(tmp_path / "good", 20, knn=50.0)
    (tmp_path / "good" / "eval" / "step-00000040.json").write_text(f'{{"format": "{FORMAT}", ')
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "slurm").mkdir()
    comparison = compare([tmp_path, tmp_path / "none"])
    assert [row.name for row in comparison.rows] == ["good"]
    assert comparison.rows[0].accuracy == {"knn": {20: 50.0}}
    photos, none, bad, result = comparison.passed_over
    assert photos == f"{tmp_path / 'photos'}: passed over: no run folder, and none in it"
    assert none == f"{tmp_path / 'none'}: no such folder; name a run folder, or a folder of them"
    assert bad.startswith(f"{tmp_path / 'bad'}: passed over: {tmp_path / 'bad' / 'config.yaml'}: ")
    assert "step-00000040.json: is damaged" in result


def test_a_closed_folder_of_another_user_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path / "good")
    (tmp_path / "closed").mkdir()
    exists = Path.exists

    def forbidden(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return exists(path)

    monkeypatch.setattr(Path, "exists", forbidden)
    comparison = compare([tmp_path])
    assert [row.name for row in comparison.rows] == ["good"]
    assert comparison.passed_over == [f"{tmp_path / 'closed'}: passed over: Permission denied"]


@pytest.mark.parametrize("text", ["", "\0" * 40, "[]", '{"step": 1}\n{"step": "x"}\n', '{"time": 1, "event": "start"}\n'])
@pytest.mark.parametrize("file", ["metrics.jsonl", "ledger.jsonl", "status.json", "heartbeat", "eval/step-00000040.json"])
def test_any_damaged_file_costs_at_most_its_run(tmp_path: Path, file: str, text: str) -> None:
    begun(tmp_path / "good")
    evaluated(begun(tmp_path / "bad"), 40, knn=50.0)
    (tmp_path / "bad" / file).write_text(text)
    comparison = compare([tmp_path])
    table(comparison)
    as_csv(comparison)
    for axis in ("steps", "images", "hours"):
        charts_png(curves_of(comparison, axis), axis)
    assert "good" in [row.name for row in comparison.rows]


@pytest.mark.parametrize(("axis", "last"), [("steps", 40.0), ("images", 320.0), ("hours", 40 * 0.5 / 3600)])
def test_curves_over_steps_images_and_hours(tmp_path: Path, axis: str, last: float) -> None:
    evaluated(begun(tmp_path / "one"), 20, linear=65.0)
    evaluated(tmp_path / "one", 40, linear=66.0)
    begun(tmp_path / "two", seed=1)
    curves = curves_of(compare([tmp_path]), axis)
    assert list(curves) == ["loss", "linear top-1, %"]
    assert curves["loss"]["one"][-1] == (pytest.approx(last), 1.0)
    assert curves["linear top-1, %"] == {"one": [(pytest.approx(last / 2), 65.0), (pytest.approx(last), 66.0)], "two": []}


def test_a_picture_of_many_runs(tmp_path: Path) -> None:
    """Each line has a colour of its own, in the charts as in the legend."""
    series = {f"run {number}": [(0.0, 1.0 * number), (10.0, 2.0 * number)] for number in range(6)}
    png = charts_png({"loss": series, "top-1": {}}, "steps")
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    colourful = sheet[(sheet.max(1) - sheet.min(1)) > 100]
    assert len(colourful) > 1000
    many = Image.open(io.BytesIO(charts_png({"loss": {f"r{k}": [(0.0, k), (1.0, k)] for k in range(200)}}, "steps")))
    assert many.height < 1200
    assert Image.open(io.BytesIO(charts_png({"loss": {}}, "steps"))).width == 620


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        return main(["runs", *map(str, arguments)]), *capfd.readouterr()

    return run


def test_the_verb(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    begun(tmp_path / "runs" / "one")
    picture, file = tmp_path / "p.png", tmp_path / "f.csv"
    code, out, err = command(tmp_path / "runs", "--csv", file, "--picture", picture, "--over", "hours")
    assert (code, err) == (0, "")
    assert out.endswith(f"written: {file}\nwritten: {picture}\n")
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert file.read_text().startswith("run,state,reason,step,total_steps,epochs,")
    refusals = {
        (tmp_path / "nothing",): f"{tmp_path / 'nothing'}: no such folder; name a run folder, or a folder of them",
        ("runs", "--over", "steps"): "--over: has no effect without --picture; leave it out",
        ("runs", "--picture", "x.jpg"): "--picture: 'x.jpg': the picture is a .png file",
        ("runs", "--csv", "no/f.csv"): "no/f.csv: is a folder, or in a folder that is not there; name another file",
    }
    for arguments, line in refusals.items():
        assert command(*arguments) == (2, "", f"simclr-dist: {line}\n")


def test_no_run_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no run folder, and none in it$"):
        compare([tmp_path / "empty"])
