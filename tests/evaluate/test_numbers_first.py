"""Numbers first: what comes after them may fail in any way, and they are on the disk, on the screen, and of the very file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import simclr_dist.encoder.file
from evaluated import CARD, draw_images
from faults.small_disk import SmallDisk, why_not
from simclr_dist.cli.main import main
from simclr_dist.encoder.file import export_encoder, load_encoder, projector_path, untrained_encoder
from simclr_dist.encoder.names import Foreign
from simclr_dist.encoder.published import load_foreign, start_weights
from simclr_dist.evaluate import embed, finetune, job
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.protocols import subsets
from simclr_dist.evaluate.result.file import read_result
from simclr_dist.evaluate.settings import FinetuneSettings, Settings
from simclr_dist.evaluate.watch import watch
from simclr_dist.method.model import ResNet, build_projector
from simclr_dist.run.status import write_status
from simclr_dist.system.errors import DataError

Make = Callable[..., Path]
QUICK = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(61, seed=0)), make_shards("test", *draw_images(31, seed=1))


def command(encoder: Path, sets: tuple[Path, Path], *more: str) -> list[str]:
    return ["eval", str(encoder), "--train", str(sets[0]), "--test", str(sets[1]), *QUICK, "--no-baselines", *more]


def damage_images(shards: Path) -> None:
    """In each image a byte."""
    for tar in shards.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[512 + 40 :: 512] = bytes(one ^ 1 for one in content[512 + 40 :: 512])
        tar.write_bytes(content)


def test_images_that_can_no_longer_be_read(
    make_encoder: Make, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The features come out of files. The picture of neighbours needs the images."""
    encoder = make_encoder()
    path = encoder.parent.parent / "eval" / "step-00001200.json"
    assert main(command(encoder, sets, "--k", "10")) == 0
    damage_images(sets[1])
    capsys.readouterr()
    assert main(command(encoder, sets, "--k", "5")) == 2
    found = capsys.readouterr()
    assert read_result(path)["protocols"]["knn"]["settings"]["k"] == 5, "the numbers are on the disk"
    assert "trained encoder, step 1200" in found.out, "and on the screen"
    (line,) = [line for line in found.err.splitlines() if line.startswith("simclr-dist: ")]
    assert f"{sets[1]}/part-" in line
    assert line.endswith(f"; the result itself is in {path}")
    assert "no file" not in found.out


def test_a_watch_goes_on_without_pictures(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder, lines = make_encoder(), list[str]()
    run, features = encoder.parent.parent, str(encoder.parent.parent / "kept")
    (run / "config.yaml").write_text("seed: 0\n")
    write_status(run, "done", 0)
    for k, code in ((10, 0), (5, 2)):
        settings = Settings(k=k, workers=0, baselines=False, features=features)
        assert watch(run, *sets, settings, device="cpu", say=lines.append) == code
        damage_images(sets[1])
    assert lines[-1].endswith("; 1 encoders evaluated, 1 pages could not be written")
    assert read_result(run / "eval" / "step-00001200.json")["protocols"]["knn"]["settings"]["k"] == 5


@pytest.mark.parametrize("values", [("1.7e308", "-1.7e308", "3"), ("0", "5e-324"), ("1e305", "2"), ("0", "1e-322")])
def test_numbers_in_the_log_that_no_chart_holds(make_encoder: Make, sets: tuple[Path, Path], values: tuple[str, ...]) -> None:
    """As a byte that was damaged makes them."""
    encoder = make_encoder()
    lines = [f'{{"step": {step}, "loss/nt_xent": {value}}}\n' for step, value in enumerate(values)]
    (encoder.parent.parent / "metrics.jsonl").write_text("".join(lines))
    assert main(command(encoder, sets)) == 0
    page = (encoder.parent.parent / "eval" / "step-00001200.html").read_text()
    assert ">loss</text>" in page
    assert "nan" not in page.split("<h2>Curves</h2>")[1].split("<h2>")[0]


def test_a_damaged_result_is_kept_for_people(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder, lines = make_encoder(), list[str]()
    path = encoder.parent.parent / "eval" / "step-00001200.json"
    how: dict[str, Any] = {"k": 10, "workers": 0, "device": "cpu", "baselines": False, "say": lines.append}
    job.evaluate(encoder, *sets, **how)
    damaged = path.read_bytes().replace(b'"protocols": {', b'"protocols": }')
    path.write_bytes(damaged)
    job.evaluate(encoder, *sets, **how)
    assert read_result(path)
    kept, page = sorted(path.parent.glob("*.damaged-*"))
    assert kept.read_bytes() == damaged
    assert page.name == f"{kept.name}.html"
    assert lines[-1] == f"{path}: there was a damaged result: kept as {kept.name}"


def test_the_keys_of_a_subset_come_after_the_result(
    make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subsets, "KEYS_IN_RESULT", 10)
    encoder = make_encoder()
    arguments = ["finetune", str(encoder), "--train", str(sets[0]), "--test", str(sets[1]), "--labels", "0.5", *QUICK]
    arguments += ["--seeds", "1", "--epochs", "1"]
    assert main(arguments) == 0
    path = encoder.parent.parent / "eval" / "step-00001200.finetune-encoder-0.5.json"
    keys = path.with_name(json.loads(path.read_text())["subsets"]["keys_file"])
    assert len(json.loads(keys.read_text())["0"]) == 30
    keys.unlink()
    keys.mkdir()
    path.unlink()
    capsys.readouterr()
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert json.loads(path.read_text())["subsets"]["keys_file"] == keys.name
    assert "top-1" in found.out
    line = found.err.splitlines()[-1]
    assert line.startswith(f"simclr-dist: {keys}: cannot write the subsets' keys: ")
    assert line.endswith(f"; the result itself is in {path}")


def test_what_a_kept_result_names_stays(make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subsets, "KEYS_IN_RESULT", 10)
    encoder, out, named = make_encoder(), sets[0].parent / "r.json", dict[float, list[str]]()
    for labels in (0.3, 0.5, 0.3):
        settings = FinetuneSettings(labels, seeds=1, epochs=1, workers=0)
        result = finetune.finetune(encoder, *sets, settings, out=out, device="cpu")
        described = result["subsets"]
        assert (described["keys"], len(described["digests"])) == (None, 1)
    for path in out.parent.glob("r*.json"):
        if "keys" not in path.name:
            result = json.loads(path.read_text())
            keys = json.loads(path.with_name(result["subsets"]["keys_file"]).read_text())["0"]
            assert subsets.keys_digest(keys) == result["subsets"]["digests"][0]
            named[result["settings"]["labels"]] = keys
    assert {labels: len(keys) for labels, keys in named.items()} == {0.3: 18, 0.5: 30}
    assert len(list(out.parent.glob("r.keys-*.json"))) == 2


def test_features_that_the_disk_cannot_take(make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    """Refused before an image is read, which may take days."""
    if reason := why_not():
        pytest.skip(reason)
    damage_images(sets[1])
    (tmp_path / "small").mkdir()
    with SmallDisk(tmp_path / "small", pages=40) as disk:
        out = disk.path / "f.parquet"
        disk.fill(leave=3)
        with pytest.raises(DataError, match=r"f\.parquet: the features take 0\.0 MiB, and its disk has 0\.0 MiB free"):
            embed.embed(make_encoder(), sets[1], out, device="cpu")
        disk.fill(leave=4)
        with pytest.raises(DataError, match="its bytes are not those of the manifest"):
            embed.embed(make_encoder(), sets[1], out, device="cpu")


# The very file


def replaced(path: Path, by: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the file for the first time finds another there when it looks again."""
    original = Path.open

    def opened(self: Path, *arguments: Any, **settings: Any) -> Any:
        if self != path or not by.exists():
            return original(self, *arguments, **settings)
        file = original(self, *arguments, **settings)
        by.replace(path)
        return file

    monkeypatch.setattr(Path, "open", opened)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two encoders, each with its projector."""
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        export_encoder(path, untrained_encoder(CARD, seed), CARD, build_projector(128, depth=2, hidden=24, dim=8))
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_and_digest_are_of_one_file(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = two
    digest, weights = sha256(path), load_encoder(path).state_dict()
    replaced(path, other, monkeypatch)
    loaded = load_encoder(path)
    assert not other.exists(), "it was replaced in the meantime"
    assert loaded.digests == {"sha256": digest, "projector_sha256": None}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_projector_is_of_one_file(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = two
    digest, expected = sha256(projector_path(path)), load_encoder(path, layer="z").state_dict()
    replaced(projector_path(path), projector_path(other), monkeypatch)
    loaded = load_encoder(path, layer="z")
    assert loaded.digests == {"sha256": sha256(path), "projector_sha256": digest}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_start_weights_are_of_one_file(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = two
    digest, expected = sha256(path), load_encoder(path).state_dict()
    replaced(path, other, monkeypatch)
    encoder = ResNet(CARD["encoder"], stem=CARD["stem"])
    started = start_weights(encoder, CARD["encoder"], "file", str(path))
    assert started.startswith(f"file {path.name}: sha256 {digest}; ")
    assert torch.equal(encoder.state_dict()["conv1.weight"], expected["conv1.weight"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_published_checkpoint_is_of_one_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for seed, path in enumerate(paths):
        (save_file if suffix == "safetensors" else torch.save)(dict(untrained_encoder(CARD, seed).state_dict()), path)
    digest = sha256(paths[0])
    replaced(*paths, monkeypatch)
    loaded = load_foreign("resnet10", paths[0], stem="small_stride2")
    assert not paths[1].exists()
    assert loaded.digests["sha256"] == digest
    assert torch.equal(loaded.state_dict()["conv1.weight"], untrained_encoder(CARD, 0).state_dict()["conv1.weight"])


@pytest.mark.parametrize("how", ["eval", "finetune", "embed"])
def test_a_result_names_what_was_measured(
    two: tuple[Path, Path], sets: tuple[Path, Path], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is exported anew, or goes, while its weights are at work."""
    path, other = two
    digest, original = sha256(path), simclr_dist.encoder.file.load_encoder

    def loaded(*arguments: Any, **settings: Any) -> Any:
        network = original(*arguments, **settings)
        path.unlink()
        if how != "embed":
            shutil.copy(other, path)
        return network

    module: Any = {"eval": job, "finetune": finetune, "embed": embed}[how]
    monkeypatch.setattr(module, "load_encoder", loaded)
    if how == "eval":
        found = job.evaluate(path, *sets, workers=0, device="cpu", baselines=False)["encoder"]["sha256"]
    elif how == "finetune":
        settings = FinetuneSettings(1, seeds=1, epochs=1, workers=0)
        found = finetune.finetune(path, *sets, settings, device="cpu")["encoder"]["sha256"]
    else:
        out = path.with_suffix(".parquet")
        embed.embed(path, sets[1], out, device="cpu")
        found = read_features(out).about.encoder_sha256
    assert found == digest


# Whose result it is


def test_two_encoders_of_one_file_keep_both_results(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, lines = tmp_path / "theirs.pt", list[str]()
    states = {f"{name}.": untrained_encoder(CARD, seed).state_dict() for seed, name in enumerate(("student", "teacher"))}
    torch.save({prefix + key: value for prefix, state in states.items() for key, value in state.items()}, weights)
    how: dict[str, Any] = {"k": 10, "workers": 0, "device": "cpu", "baselines": False, "say": lines.append}
    encoder: dict[str, Any] = {"arch": "resnet10", "weights": str(weights), "stem": "small_stride2"}
    several = [
        Foreign(**encoder, image_size=16, prefix="student"),
        Foreign(**encoder, image_size=16, prefix="teacher"),
        Foreign(**encoder, image_size=24, prefix="teacher"),
        Foreign(**encoder, image_size=24, prefix="teacher"),
    ]
    measured = [job.evaluate(one, *sets, **how) for one in several]
    results = [read_result(path) for path in tmp_path.glob("theirs.eval*.json")]
    found = sorted((result["encoder"]["weights"]["prefix"], result["encoder"]["image_size"]) for result in results)
    assert found == [("student.", 16), ("teacher.", 16), ("teacher.", 24)]
    assert sum("kept as theirs.eval.kept-" in line for line in lines) == 2
    assert {json.dumps(one["command"]) for one in results} == {json.dumps(one["command"]) for one in measured}
