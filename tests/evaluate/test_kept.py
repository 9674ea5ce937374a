"""Results that follow each other under one name: no number is lost that was not measured anew, nor to a full disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluated import draw_images
from faults.small_disk import PAGE, SmallDisk, why_not
from simclr_dist.cli.main import main
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result import page
from simclr_dist.evaluate.result.curves import comparable
from simclr_dist.evaluate.result.file import FORMAT, SHAPE, UnwrittenError, read_result, write_result
from simclr_dist.evaluate.result.report import summary
from simclr_dist.evaluate.settings import Settings
from simclr_dist.evaluate.watch import watch
from simclr_dist.run.status import write_status

Make = Callable[..., Path]
ENCODER = {"file": "e.safetensors", **dict.fromkeys(SHAPE)}
ON_CPU: dict[str, Any] = {"k": 10, "workers": 0, "device": "cpu"}


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(61, seed=0)), make_shards("test", *draw_images(31, seed=1))


def result(top1: float, *, test: str = "b" * 64, seed: int = 0, **k: int) -> dict[str, Any]:
    """Of protocols by their k."""
    rows = {"untrained": {"top1": 20.0}, "trained": {"top1": top1}}
    return {
        "format": FORMAT,
        "encoder": {**ENCODER, "sha256": "e" * 64, "step": 7},
        "classes": 3,
        "train": {"digest": "a" * 64},
        "test": {"digest": test},
        "settings": {"seed": seed, "batch_size": 256, "workers": 2, "layer": "h", "precision": "fp32"},
        "protocols": {name: {"settings": {"k": value}, "results": dict(rows)} for name, value in k.items()},
        "seconds": {"total": 1.0},
    }


def top1s(folder: Path) -> list[float]:
    """Of all results in a folder."""
    parts = (part for path in folder.glob("*.json") for part in json.loads(path.read_text())["protocols"].values())
    return sorted(part["results"]["trained"]["top1"] for part in parts)


@pytest.mark.parametrize(
    ("later", "kept"),
    [
        (result(2.0, knn=10), False),
        (result(2.0, knn=10, mlp=5), False),
        ({**result(2.0, knn=10), "settings": {**result(0)["settings"], "batch_size": 7, "workers": 0}}, False),
        (result(2.0, knn=20), True),
        (result(2.0, knn=10, test="c" * 64), True),
        (result(2.0, knn=10, seed=1), True),
        (result(2.0, linear=10), True),
        ({**result(2.0, knn=10), "encoder": {"sha256": "f" * 64, "step": 7}}, True),
        ({**result(2.0, knn=10), "format": "simclr_dist evaluation 4"}, True),
        ({**result(2.0), "protocols": {"knn": {"settings": {"k": 10}, "results": {"trained": {"top1": 2.0}}}}}, True),
    ],
)
def test_what_was_not_measured_anew_is_kept(tmp_path: Path, later: dict[str, Any], kept: bool) -> None:
    path = tmp_path / "step-7.json"
    assert write_result(path, result(1.0, knn=10)) == ""
    path.with_suffix(".html").write_text("its page")
    line = write_result(path, later)
    assert json.loads(path.read_text()) == later, "the newest has the name"
    names = sorted(other.name for other in tmp_path.glob("*.json") if other != path)
    assert len(names) == kept
    assert bool(line) == kept
    if kept:
        assert line == f"{path}: there was a result of other images, weights or settings: kept as {names[0]}"
        assert json.loads((tmp_path / names[0]).read_text()) == result(1.0, knn=10)
        assert (tmp_path / names[0]).with_suffix(".html").read_text() == "its page"
        assert not path.with_suffix(".html").exists()


def test_of_each_measurement_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "step-7.json"
    for top1 in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        write_result(path, result(top1, knn=10 if top1 % 2 else 20))
    assert top1s(tmp_path) == [4.0, 5.0, 6.0]


@pytest.mark.parametrize("before", ["", "{", "[1]", '"text"'])
def test_what_holds_no_number_is_replaced(tmp_path: Path, before: str) -> None:
    path = tmp_path / "step-7.json"
    path.write_text(before)
    assert write_result(path, result(1.0, knn=10)) == ""
    assert [other.name for other in tmp_path.iterdir()] == ["step-7.json"]


@pytest.mark.parametrize("before", ['{"format": "simclr_dist evaluation 1", "knn": 12.5}', '{"protocols": 3, "settings": []}'])
def test_what_is_not_understood_is_kept(tmp_path: Path, before: str) -> None:
    path = tmp_path / "step-7.json"
    path.write_text(before)
    kept = write_result(path, result(1.0, knn=10)).rpartition(" ")[2]
    assert (tmp_path / kept).read_text() == before


def test_kept_results_stay_on_the_curve(tmp_path: Path) -> None:
    """Of the newest weights of their step alone."""
    path = tmp_path / "step-7.json"
    write_result(path, {**result(1.0, linear=5), "encoder": {**ENCODER, "sha256": "0" * 64, "step": 7}})
    write_result(path, result(2.0, knn=10))
    write_result(path, result(3.0, knn=20))
    write_result(path, result(4.0, knn=10, test="c" * 64))
    now = {**result(9.0, knn=10, linear=5), "encoder": {"sha256": "e" * 64, "step": 9}}
    found = {step: {name: part["results"]["trained"]["top1"] for name, part in parts.items()}
             for step, (parts, _) in comparable(tmp_path, now).items()}  # fmt: skip
    assert found == {7: {"knn": 2.0}, 9: {"knn": 9.0, "linear": 9.0}}


def test_an_evaluation_on_other_shards(make_encoder: Make, make_shards: Make, sets: tuple[Path, Path]) -> None:
    encoder, lines = make_encoder(), list[str]()
    first = evaluate(encoder, *sets, say=lines.append, **ON_CPU)
    evaluate(encoder, *sets, say=lines.append, **ON_CPU)
    assert not any("kept as" in line for line in lines), "the same again"
    other = make_shards("other", *draw_images(31, seed=2))
    second = evaluate(encoder, sets[0], other, say=lines.append, **ON_CPU)
    folder = encoder.parent.parent / "eval"
    (kept,) = folder.glob("*.kept-*.json")
    assert sum(line.endswith(f"kept as {kept.name}") for line in lines) == 1
    assert read_result(folder / f"{encoder.stem}.json") == second
    assert summary(read_result(kept)) == summary(first)
    assert str(sets[1]) in kept.with_suffix(".html").read_text()
    assert str(other) in (folder / f"{encoder.stem}.html").read_text()


def test_a_watch_with_other_settings(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder, lines = make_encoder(), list[str]()
    run = encoder.parent.parent
    (run / "config.yaml").write_text("seed: 0\n")
    write_status(run, "done", 0)
    for k in (10, 5):
        assert watch(run, *sets, Settings(k=k, workers=0), device="cpu", say=lines.append) == 0
    assert "evaluated before with k 10, now 5: again" in lines[2]
    assert "kept as step-00001200.kept-" in lines[3]
    assert len(top1s(run / "eval")) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "small").mkdir()
    with SmallDisk(tmp_path / "small", pages=400) as disk:
        yield disk


def test_a_disk_that_takes_the_result_but_not_the_page(
    make_encoder: Make, sets: tuple[Path, Path], small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk.path / "result.json"
    command = ["eval", str(make_encoder()), "--train", str(sets[0]), "--test", str(sets[1]), "--k", "10", "--out", str(out)]
    command += ["--workers", "0", "--device", "cpu", "--no-features"]
    assert main(command) == 0
    needed = -(-out.stat().st_size // PAGE)
    assert out.with_suffix(".html").stat().st_size > 2 * PAGE
    printed = capsys.readouterr().out

    for path in small_disk.path.iterdir():
        path.unlink()
    small_disk.fill(leave=needed + 1)
    assert main(command) == 2
    found = capsys.readouterr()
    assert read_result(out), "the numbers are on the disk"
    assert [path.name for path in small_disk.path.iterdir() if path.name != "ballast"] == ["result.json"]
    assert found.out == printed.rpartition("written: ")[0], "and on the screen"
    told = found.err.splitlines()[-1]
    assert told.startswith(f"simclr-dist: {out.with_suffix('.html')}: cannot write the page: No space left")
    assert told.endswith(f"; the result itself is in {out}")

    out.unlink()
    small_disk.fill()
    assert main(command) == 2
    found = capsys.readouterr()
    assert found.out == printed.rpartition("written: ")[0]
    assert found.err.splitlines()[-1].startswith(f"simclr-dist: {out}: cannot write the result: No space left")
    assert [path.name for path in small_disk.path.iterdir()] == ["ballast"]


def test_a_watch_goes_on_without_a_page(make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, lines = [make_encoder(seed=step, step=step) for step in (100, 200)], list[str]()
    run = encoders[0].parent.parent
    (run / "config.yaml").write_text("seed: 0\n")
    write_status(run, "done", 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_atomically", full)
    assert watch(run, *sets, Settings(k=10, workers=0), device="cpu", say=lines.append) == 2
    assert sum("cannot write the page" in line for line in lines) == 2
    assert lines[-1].endswith("; 2 encoders evaluated, 2 pages could not be written")
    assert len(top1s(run / "eval")) == 4


def test_a_page_that_cannot_be_moved_leaves_the_older_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, move = tmp_path / "step-7.json", Path.replace
    write_result(path, result(1.0, knn=10))
    path.with_suffix(".html").touch()

    def refused(self: Path, target: Path) -> Path:
        if self.suffix == ".html":
            raise PermissionError(1, "Operation not permitted")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(UnwrittenError, match="Operation not permitted"):
        write_result(path, result(2.0, knn=20))
    assert top1s(tmp_path) == [1.0]
    assert path.exists()


def test_an_error_has_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(UnwrittenError, match="cannot write the result") as caught:
        write_result(tmp_path / "nowhere" / "step-7.json", result(1.0, knn=10))
    assert caught.value.result == result(1.0, knn=10)
    assert not caught.value.stored
