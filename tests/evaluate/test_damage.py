"""Files that an evaluation reads, each with each kind of damage: one line names the file, or it is made anew."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evaluated import CARD, draw_images
from simclr_dist.cli.main import main
from simclr_dist.encoder.file import export_encoder, load_encoder, projector_path
from simclr_dist.evaluate.features.file import read_features
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.curves import comparable
from simclr_dist.evaluate.result.file import read_result
from simclr_dist.evaluate.settings import Settings
from simclr_dist.evaluate.watch import watch
from simclr_dist.method.model import ResNet, build_projector
from simclr_dist.run.status import write_status
from simclr_dist.system.errors import DataError

Make = Callable[..., Path]
HOW: dict[str, Any] = {"k": 10, "workers": 0, "device": "cpu", "baselines": False}


def unreadable(path: Path) -> None:
    """A file that even root cannot read: nothing is mapped at its beginning."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


ANY_FILE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zero bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
    "folder": folder,
    "unreadable": unreadable,
}
OTHER_TYPES: tuple[Any, ...] = ([1], 3, None, "text", True)


def refusal(call: Callable[[], object], path: Path) -> str:
    """The one line that names the file and says what to do."""
    with pytest.raises(DataError) as caught:
        call()
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert len(line) < 600
    assert line.isprintable()
    return line


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder with its projector."""
    torch.manual_seed(0)
    path = tmp_path / "run" / "encoders" / "step-00001200.safetensors"
    shape = {"width": CARD["width"], "stem": CARD["stem"]}
    export_encoder(path, ResNet(CARD["encoder"], **shape), CARD, build_projector(128, depth=2, hidden=24, dim=5))
    return path


def rewritten(path: Path, card: Any = ..., **tensors: torch.Tensor | None) -> None:
    """Writes the file again with another card, and with other tensors (dots written __) or without them."""
    with safe_open(path, "pt") as file:
        before = json.loads(file.metadata()["card"])
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."), None)
        weights |= {} if tensor is None else {name.replace("__", "."): tensor}
    card = before if card is ... else card
    save_file(weights, path, metadata={"card": card if isinstance(card, str) else json.dumps(card)})


def card_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["card"])
    return card


@pytest.mark.parametrize("damage", ANY_FILE)
@pytest.mark.parametrize("part", ["encoder", "projector"])
def test_a_damaged_encoder_is_refused(encoder: Path, part: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = encoder if part == "encoder" else projector_path(encoder)
    ANY_FILE[damage](path)
    layer = "h" if part == "encoder" else "z"
    refusal(lambda: load_encoder(encoder, layer=layer), path)
    arguments = ["eval", str(encoder), "--train", "a", "--test", "b", "--layer", layer]
    (path.parent / "a").mkdir()
    assert main(["export", str(encoder), str(path.parent / "e.onnx"), "--layer", layer]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"simclr-dist: {path}: ")
    assert main(arguments) == 2


def test_metadata_that_is_null(encoder: Path) -> None:
    content = encoder.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": None}).encode()
    encoder.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    refusal(lambda: load_encoder(encoder), encoder)


VALUES: dict[str, tuple[Any, ...]] = {
    "encoder": ("resnet11", "resnet18 ", ""),
    "width": (0, 3, 10**9, 1.0),
    "stem": ("smal", "imagenet", "small"),  # the latter two are other networks than the weights are of
    "feature_size": (0, -1, 512, 10**400),
    "image_size": (0, 7, -16, 10**9, 16.0),
    "mean": ([0.5] * 2, [0.5] * 4, [math.nan] * 3, ["0.5"] * 3, 10**400, [10**400] * 3),
    "std": ([0.0] * 3, [-1.0] * 3, [math.inf] * 3),
    "step": (-1, 10**30, 1.5),
    "init": (["random"],),
    "data_digest": (7,),
    "config": ([], {"global_batch_size": "8"}, {"views": []}),
    "weights": ({"file": "x"}, {"prefix": 1}),
}


@pytest.mark.parametrize("key", VALUES)
def test_each_key_of_an_encoders_card(encoder: Path, key: str) -> None:
    """Missing, of another type, or of a value that cannot be."""
    card = card_of(encoder)
    optional = key in ("config", "weights")
    if not optional:
        rewritten(encoder, {name: value for name, value in card.items() if name != key})
        assert f"{key}: is missing" in refusal(lambda: load_encoder(encoder), encoder)
    takes = {"init": (str,), "data_digest": (str, type(None)), "config": (type(None),), "weights": (type(None),)}
    wrong = [value for value in OTHER_TYPES if not isinstance(value, takes.get(key, ()))]
    for value in (*(wrong if key != "step" else [w for w in wrong if w != 3]), *VALUES[key]):
        rewritten(encoder, {**card, key: value})
        line = refusal(lambda: load_encoder(encoder), encoder)
        inner = {"config": "global_batch_size, views", "weights": "prefix"}.get(key, "int too large")
        assert key in line or any(name in line for name in inner.split(", ")), line
    rewritten(encoder, {**card, "extra": {"of another version": 1}})
    assert load_encoder(encoder).card["extra"] == {"of another version": 1}


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"text"', "{", "", "[" * 100_000])
def test_cards_that_are_none(encoder: Path, text: str) -> None:
    for path, layer in ((projector_path(encoder), "z"), (encoder, "h")):
        rewritten(path, text)
        refusal(lambda layer=layer: load_encoder(encoder, layer=layer), path)


@pytest.mark.parametrize("key", ["depth", "hidden", "dim", "batch_norm", "encoder_sha256"])
def test_each_key_of_a_projectors_card(encoder: Path, key: str) -> None:
    path = projector_path(encoder)
    card = card_of(path)
    rewritten(path, {name: value for name, value in card.items() if name != key})
    assert f"{key}: is missing" in refusal(lambda: load_encoder(encoder, layer="z"), path)
    numbers = (0, 1, 3, -1, 10**9, 10**30, 2.5)
    for value in (*OTHER_TYPES, *(numbers if key in ("depth", "hidden", "dim") else ())):
        if value is not card[key]:
            rewritten(path, {**card, key: value})
            refusal(lambda: load_encoder(encoder, layer="z"), path)
    rewritten(path, {**card, "extra": 1})
    assert load_encoder(encoder, layer="z").card["projector"]["dim"] == 5


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (None, "is missing"),
        (torch.zeros(16, 3, 7, 7), "torch.float32 [16, 3, 7, 7] where there should be torch.float32 [16, 3, 3, 3]"),
        (torch.zeros(16, 3, 3, 3).half(), "torch.float16 [16, 3, 3, 3] where there should be torch.float32 [16, 3, 3, 3]"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.int8), "torch.int8 [16, 3, 3, 3] where"),
        (torch.full((16, 3, 3, 3), math.nan), "has numbers that are not finite"),
        (torch.full((16, 3, 3, 3), math.inf), "has numbers that are not finite"),
    ],
)
def test_weights_that_do_not_fit(encoder: Path, tensor: torch.Tensor | None, why: str) -> None:
    rewritten(encoder, conv1__weight=tensor)
    line = refusal(lambda: load_encoder(encoder), encoder)
    assert f": its weights do not fit its card (resnet10, width 1): conv1.weight: {why}" in line


def test_one_tensor_too_many(encoder: Path) -> None:
    path = projector_path(encoder)
    rewritten(path, fc__weight=torch.zeros(3, 5))
    assert refusal(lambda: load_encoder(encoder, layer="z"), path).endswith(": fc.weight: is not part of such a network")
    rewritten(encoder, fc__weight=torch.zeros(3, 128))
    assert refusal(lambda: load_encoder(encoder), encoder).endswith(": fc.weight: is not part of such a network")


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(61, seed=0)), make_shards("test", *draw_images(31, seed=1))


@pytest.mark.parametrize("views", [{"preset": "other"}, {"preset": 1}, {"crop": 1}, {"flip": 2.0}, {"hue": "0.1"}])
def test_views_of_a_card_that_are_none(
    encoder: Path, sets: tuple[Path, Path], views: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(encoder, {**CARD, "config": {"views": views}})
    command = ["eval", str(encoder), "--train", str(sets[0]), "--test", str(sets[1]), "--workers", "0", "--device", "cpu"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"simclr-dist: {encoder}: its card: ")
    assert next(iter(views)) in line


def about_changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"simclr_dist"])
    about = change(about)
    pq.write_table(table.replace_schema_metadata({"simclr_dist": json.dumps(about)}), path)


def not_finite(path: Path) -> None:
    table, about = pq.read_table(path), pq.read_schema(path).metadata
    rows = np.stack(table.column("embedding").to_numpy())
    rows[3, 1] = np.nan
    kind = table.schema.field("embedding").type
    values = type(table.column("embedding").chunk(0)).from_arrays(rows.ravel(), type=kind)
    pq.write_table(table.set_column(2, table.schema.field("embedding"), values).replace_schema_metadata(about), path)


ABOUT = ("format", "encoder_sha256", "shape", "layer", "image_size", "precision", "data_digest", "classes")
FEATURES: dict[str, Callable[[Path], Any]] = {
    **ANY_FILE,
    **{f"about is {value!r}": lambda path, value=value: about_changed(path, lambda _: value) for value in OTHER_TYPES},  # type: ignore[misc]
    **{f"without {key}": lambda path, key=key: about_changed(path, lambda about: about.pop(key) and about) for key in ABOUT},  # type: ignore[misc]
    **{f"{key} is 2.5": lambda path, key=key: about_changed(path, lambda about: {**about, key: 2.5}) for key in ABOUT},  # type: ignore[misc]
    "extra key": lambda path: about_changed(path, lambda about: {**about, "extra": 1}),
    "other columns": lambda path: pq.write_table(pq.read_table(path).drop_columns("label"), path),
    "not finite": not_finite,
}


def test_damaged_features_are_named_and_made_anew(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    encoder = make_encoder()
    first = evaluate(encoder, *sets, **HOW)
    stored = sorted((encoder.parent.parent / "eval" / "features").iterdir())
    path, whole = stored[0], stored[0].read_bytes()
    for name, damage in FEATURES.items():
        damage(path)
        with pytest.raises(DataError) as caught:
            read_features(path)
        assert str(caught.value).startswith(f"{path}: "), name
        if name not in ("truncated", "folder", "unreadable", "not finite"):  # an evaluation takes a second
            path.write_bytes(whole)
            continue
        lines: list[str] = []
        again = evaluate(encoder, *sets, say=lines.append, **HOW)
        assert sum(line.startswith(f"{path}: ") for line in lines) >= 1, name
        assert len(again["features_reused"]) == 3, name
        knn = [one["protocols"]["knn"]["results"]["trained"] for one in (first, again)]
        assert {**knn[0], "seconds": 0} == {**knn[1], "seconds": 0}, name
        if name == "folder":  # of the user's, perhaps: it is said, and stays
            path.rmdir()
            path.write_bytes(whole)
        assert path.read_bytes() == whole, name
        assert not path.is_symlink()


def changed(path: Path, *keys: str, value: Any = ...) -> None:
    """Writes the result without the value at these keys, or with another one."""
    result = json.loads(path.read_text())
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(result))


PLACES = (
    *((key,) for key in ("classes", "encoder", "train", "test", "settings", "protocols", "seconds")),
    *(("encoder", key) for key in ("file", "sha256", "step")),
    ("train", "digest"), ("test", "digest"), ("settings", "layer"), ("settings", "precision"),
    ("protocols", "knn", "settings"), ("protocols", "knn", "results"), ("protocols", "knn", "results", "trained"),
    ("protocols", "knn", "results", "trained", "top1"),
)  # fmt: skip
RESULTS: dict[str, Callable[[Path], Any]] = {
    **ANY_FILE,
    **{text: lambda path, text=text: path.write_text(text) for text in ("[1]", "3", "null", '"text"', "[" * 100_000)},  # type: ignore[misc]
    **{f"without {'.'.join(keys)}": lambda path, keys=keys: changed(path, *keys) for keys in PLACES},  # type: ignore[misc]
    **{f"{'.'.join(keys)} is [1]": lambda path, keys=keys: changed(path, *keys, value=[1]) for keys in PLACES},  # type: ignore[misc]
    "protocols.knn is 3": lambda path: changed(path, "protocols", "knn", value=3),
    "top1 is NaN": lambda path: changed(path, "protocols", "knn", "results", "trained", "top1", value=math.nan),
    "step is -1": lambda path: changed(path, "encoder", "step", value=-1),
}


def test_damaged_results_are_named_and_left_out_or_made_anew(make_encoder: Make, sets: tuple[Path, Path]) -> None:
    """Beside another result they are no part of the curve; a watch, and another evaluation, make them anew."""
    encoder, now = make_encoder(step=100), make_encoder(seed=6, step=200)
    run = encoder.parent.parent
    (run / "config.yaml").write_text("seed: 0\n")
    write_status(run, "done", 0)
    newest = evaluate(now, *sets, **HOW)
    evaluate(encoder, *sets, **HOW)
    path = run / "eval" / "step-00000100.json"
    whole = path.read_bytes()
    assert set(comparable(path.parent, newest)) == {100, 200}
    for name, damage in RESULTS.items():
        damage(path)
        with pytest.raises(DataError) as caught:
            read_result(path)
        line = str(caught.value)
        assert line.startswith(f"{path}: is damaged or cannot be read ("), name
        lines: list[str] = []
        assert set(comparable(path.parent, newest, lines.append)) == {200}, name
        assert lines == [line], name
        if name in ("truncated", "[1]", "without encoder.file"):  # a second each
            lines.clear()
            assert watch(run, *sets, Settings(k=10, workers=0, baselines=False), device="cpu", say=lines.append) == 0, name
            assert line in lines
            assert read_result(path)["encoder"]["step"] == 100, name
        for other in (path, *path.parent.glob("*.kept-*")):
            if other.is_dir():
                other.rmdir()
            else:
                other.unlink(missing_ok=True)
        path.write_bytes(whole)
    changed(path, "extra", value={"of": "another version"})
    assert set(comparable(path.parent, newest)) == {100, 200}
    path.unlink()
    assert read_result(path) == {}, "nothing there is no damage"
