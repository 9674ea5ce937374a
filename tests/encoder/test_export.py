"""The way out, into plain torchvision, timm and ONNX, and back, up to any layer."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet as blocks

import training_runs as runs
from networks import images, randomised
from simclr_dist.cli import main as cli
from simclr_dist.cli.manual import ABOUT
from simclr_dist.cli.train import main as train
from simclr_dist.encoder import file as export
from simclr_dist.encoder import onnx
from simclr_dist.encoder.file import export_encoder, file_digest, load_encoder, projector_path, untrained_encoder
from simclr_dist.encoder.published import load_foreign
from simclr_dist.method.encoders import build_encoder
from simclr_dist.method.model import ResNet, build_projector
from simclr_dist.system.errors import ConfigError, DataError, SaveError

CARD = {
    "encoder": "resnet18", "width": 1, "stem": "imagenet", "feature_size": 512, "image_size": 64, "step": 7,
    "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "init": "random", "data_digest": None,
}  # fmt: skip
SMALL = {**CARD, "encoder": "resnet10", "stem": "small_stride2", "feature_size": 128, "image_size": 16}


def exported(path: Path, card: dict[str, Any] = SMALL, **projector: Any) -> tuple[nn.Module, nn.Module]:
    """Writes an encoder with a projector of the given shape; returns both, in eval mode."""
    torch.manual_seed(0)
    encoder = randomised(ResNet(card["encoder"], width=card["width"], stem=card["stem"])).eval()
    head = randomised(build_projector(encoder.feature_size, **projector)).eval()
    export_encoder(path, encoder, card, head)
    return encoder, head


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As float32 sums in another order are: the outputs of deep random networks are large."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def refusal(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 512), ("resnet50", 2048)])
def test_loads_into_torchvision_without_code_of_ours(tmp_path: Path, name: str, size: int) -> None:
    encoder = randomised(ResNet(name).to(memory_format=torch.channels_last)).eval()
    path = tmp_path / "encoders" / "step-7.safetensors"
    export_encoder(path, encoder, {**CARD, "encoder": name, "feature_size": size}, build_projector(size))
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(path))  # strict
    x = images(2, 64)
    with torch.no_grad():
        assert close(theirs.eval()(x), encoder(x))
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["step"], card["shape"]["torchvision"]) == (7, name)
    assert card["built"] == f"torchvision's {name}, without fc; h is the mean of layer4 over its pixels"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_loads_into_timm_without_renaming(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    encoder = randomised(ResNet(name)).eval()
    path = tmp_path / "e.safetensors"
    export_encoder(path, encoder, {**CARD, "encoder": name})
    theirs = timm.create_model(name, num_classes=0)
    theirs.load_state_dict(load_file(path))  # strict
    x = images(2, 64)
    with torch.no_grad():
        assert close(theirs.eval()(x), encoder(x))
    classifier = timm.create_model(name, num_classes=3, checkpoint_path="")
    missing, unexpected = classifier.load_state_dict(load_file(path), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


def built_from(card: dict[str, Any]) -> nn.Module:
    """A network from torchvision's blocks and what the card says alone."""
    shape, stem = card["shape"], card["shape"]["stem"]
    block, size = getattr(blocks, shape["block"]), shape["channels"][0]
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, size, stem["kernel"], stem["stride"], stem["padding"], bias=False),
        "bn1": nn.BatchNorm2d(size),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, 2, 1) if stem["max_pool"] else nn.Identity(),
    }
    for stage, (count, channels) in enumerate(zip(shape["blocks"], shape["channels"], strict=True)):
        made = []
        for i in range(count):
            out, stride = channels * shape["expansion"], 2 if stage and not i else 1
            shortcut = nn.Sequential(nn.Conv2d(size, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            made.append(block(size, channels, stride, shortcut if (stride, size) != (1, out) else None))
            size = out
        parts[f"layer{stage + 1}"] = nn.Sequential(*made)
    return nn.Sequential(OrderedDict(parts)).append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())


@pytest.mark.parametrize(
    ("name", "width", "stem", "said"),
    [
        ("resnet18", 1, "small", "torchvision's resnet18, without fc; with a stem for small images: conv1 3x3 of stride 1, no"),
        (
            "resnet18",
            2,
            "imagenet",
            "resnet18, without fc; with 2 times as many channels in every layer (128 after the stem); h",
        ),
        ("resnet50", 2, "small_stride2", "in every layer (128 after the stem), a stem for small images: conv1 3x3 of stride 2"),
        (
            "resnet10",
            1,
            "small",
            "a ResNet of torchvision's BasicBlock, [1, 1, 1, 1] in its stages, 16 channels after the stem",
        ),
    ],
)
def test_a_card_says_how_other_shapes_are_built(tmp_path: Path, name: str, width: int, stem: str, said: str) -> None:
    encoder = randomised(ResNet(name, width=width, stem=stem)).eval()
    export_encoder(tmp_path / "e.safetensors", encoder, {**SMALL, "encoder": name, "width": width, "stem": stem})
    card = json.loads((tmp_path / "e.json").read_text())
    assert said in card["built"]
    assert card["shape"]["torchvision"] is None
    network = built_from(card).eval()
    network.load_state_dict(load_file(tmp_path / "e.safetensors"))  # strict
    x = images(2, 32)
    with torch.no_grad():
        assert close(network(x), encoder(x))


def test_export_and_back(tmp_path: Path) -> None:
    card = {**SMALL, "width": 2, "stem": "small", "feature_size": 256}
    encoder = randomised(ResNet("resnet10", width=2, stem="small").double())
    export_encoder(tmp_path / "e.safetensors", encoder, card)
    loaded = load_encoder(tmp_path / "e.safetensors")
    assert {key: loaded.card[key] for key in card} == card
    assert loaded.card["layer"] == "h"
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = images(3, 16)
    assert torch.equal(loaded(x), encoder.float().eval()(x))
    fresh, again, other = (untrained_encoder(loaded.card, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(fresh(x), again(x))
    assert not torch.equal(fresh(x), other(x))
    assert (fresh.card["init"], fresh.card["step"]) == ("random", 0)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_layer_of_the_projector(tmp_path: Path, depth: int, batch_norm: bool) -> None:
    path = tmp_path / "encoders" / "step-00000007.safetensors"
    encoder, head = exported(path, depth=depth, hidden=24, dim=5, batch_norm=batch_norm)
    x = images(3, 16)
    after, sizes = [encoder(x)], [128]  # written out, block by block
    modules = list(head)
    while modules:
        linear, sizes = modules.pop(0), [*sizes, modules[0].num_features if batch_norm else 0]
        sizes[-1] = linear.out_features
        value = after[-1] @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        if batch_norm:
            norm = modules.pop(0)
            value = (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        if modules:
            assert isinstance(modules.pop(0), nn.ReLU)
            value = value.clamp_min(0)
        after.append(value)
    assert len(after) == depth + 1

    layers = {"h": 0, "z": depth, **{f"projector.{n}": n for n in range(1, depth + 1)}}
    for layer, number in layers.items():
        loaded = load_encoder(path, layer=layer)
        assert close(loaded(x), after[number]), layer
        assert loaded(x).shape == (3, sizes[number])
        assert loaded.card["feature_size"] == sizes[number]
        assert loaded.card["layer"] == (f"projector.{number}" if number else "h")
        assert loaded.card["step"] == 7
        assert not any(module.training for module in loaded.modules())
        assert not any(p.requires_grad for p in loaded.parameters())
        fresh = untrained_encoder(loaded.card, seed=3)
        assert fresh(x).shape == (3, sizes[number])
        assert fresh.card["layer"] == loaded.card["layer"]
        assert torch.equal(fresh(x), untrained_encoder(loaded.card, seed=3)(x))
    assert torch.equal(load_encoder(path, layer="z")(x), head(encoder(x)))


def test_a_fresh_projector_sits_on_the_same_fresh_encoder(tmp_path: Path) -> None:
    exported(tmp_path / "e.safetensors", hidden=24, dim=5)
    h, z = (untrained_encoder(load_encoder(tmp_path / "e.safetensors", layer=layer).card) for layer in ("h", "z"))
    assert all(map(torch.equal, h.state_dict().values(), z[0].state_dict().values()))


def test_the_files_of_an_export(tmp_path: Path) -> None:
    path = tmp_path / "encoders" / "step-00000007.safetensors"
    encoder, head = exported(path, depth=3, hidden=24, dim=5)
    names = ["step-00000007.json", "step-00000007.projector", "step-00000007.safetensors"]
    assert sorted(found.name for found in path.parent.iterdir()) == names
    assert [found.name for found in path.parent.glob("*.safetensors")] == names[2:], "a search for encoders finds encoders"
    assert load_file(path).keys() == encoder.state_dict().keys(), "a pure encoder"
    with safe_open(projector_path(path), "pt") as file:
        card = json.loads(file.metadata()["card"])
        assert set(file.keys()) == set(head.state_dict())
    assert card == {
        "format": "simclr_dist projector 1",
        "depth": 3,
        "hidden": 24,
        "dim": 5,
        "batch_norm": True,
        "encoder_sha256": file_digest(path),
    }


def test_where_the_encoder_is_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fails_at(path: Path, content: bytes) -> None:
        written.append(path.name)
        if path.suffix == stops_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_atomically", fails_at)
    for stops_at, expected in ((".projector", ["e.json", "e.projector"]), ("", ["e.json", "e.projector", "e.safetensors"])):
        written.clear()
        if stops_at:
            message = refusal(SaveError, lambda: exported(tmp_path / "e.safetensors"))
            assert message == f"{tmp_path / 'e.projector'}: cannot be written: No space left on device"
        else:
            exported(tmp_path / "e.safetensors")
        assert written == expected


def test_a_run_exports_its_projector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = runs.make_shards(tmp_path)
    assert train([str(runs.write_config(Path(), shards, steps=3))]) == 0
    state = runs.checkpoint(Path("run"), 3)["model"]
    path = Path("run/encoders/step-00000003.safetensors")
    for prefix, file in (("encoder.", path), ("projector.", projector_path(path))):
        written = load_file(file)
        assert written.keys() == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        assert all(torch.equal(written[name], state[prefix + name]) for name in written)
    encoder, z = load_encoder(path), load_encoder(path, layer="z")
    model = encoder.card["config"]["model"]
    assert z.card["projector"] == {name: model[f"projector_{name}"] for name in ("depth", "hidden", "dim", "batch_norm")}, (
        "and nothing of it is in the encoder's own card"
    )
    assert "projector" not in encoder.card
    assert (z.card["layer"], z.card["feature_size"]) == (f"projector.{model['projector_depth']}", model["projector_dim"])


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    exported(path, depth=2, hidden=24, dim=5)
    message = refusal(DataError, lambda: load_encoder(path, layer="projector.3"))
    assert message == f"{path}: layer projector.3: its projector has 2 layers; ask for one of them, h or z"
    for name in ("", "H", "projector", "projector.0", "projector.01", "projector.-1", "projector.1\n", "layer4"):
        assert refusal(ConfigError, lambda name=name: load_encoder(path, layer=name)).startswith(f"layer: {name!r} is not h, z")

    other = tmp_path / "other.safetensors"
    export_encoder(other, ResNet("resnet10", stem="small_stride2"), SMALL)  # as old exports, without a projector
    assert load_encoder(other).card["layer"] == "h"
    assert "its projector, other.projector, is not beside it" in refusal(DataError, lambda: load_encoder(other, layer="z"))
    projector_path(other).write_bytes(projector_path(path).read_bytes())
    message = refusal(DataError, lambda: load_encoder(other, layer="z"))
    assert message == f"{projector_path(other)}: belongs to another encoder than {other}; take both from one export"


def test_damaged_projectors(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    exported(path, depth=2, hidden=24, dim=5)
    file = projector_path(path)
    with safe_open(file, "pt") as whole:
        card = json.loads(whole.metadata()["card"])
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped, and gets overwritten
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: file.write_bytes(file.read_bytes()[:-8]), "not a projector that this program exported"),
        (lambda: file.write_text("text"), "not a projector that this program exported"),
        (lambda: save_file(weights, file), "not a projector that this program exported"),
        (lambda: save_file(weights, file, metadata={"card": json.dumps({**card, "dim": "5"})}), "not a projector"),
        (lambda: save_file(weights, file, metadata={"card": json.dumps({**card, "dim": 6})}), "do not fit its own description"),
        (lambda: (file.unlink(), file.mkdir()), "cannot read the projector"),
    ]
    for damage, reason in cases:
        damage()
        message = refusal(DataError, lambda: load_encoder(path, layer="z"))
        assert message.startswith(f"{file}: ")
        assert reason in message
        load_encoder(path)


def test_files_that_are_not_encoders(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("not one")
    misfit = tmp_path / "misfit.safetensors"
    export_encoder(misfit, ResNet("resnet10", stem="small"), {**SMALL, "stem": "imagenet"})
    unknown = tmp_path / "unknown.safetensors"
    vit = build_encoder("timm/test_vit", image_size=32)
    export_encoder(unknown, vit, {**CARD, "encoder": "timm/test_vi", "image_size": 32})
    wide = tmp_path / "wide.safetensors"
    export_encoder(wide, ResNet("resnet10", stem="small"), {**SMALL, "stem": "small", "channels": 10**9})
    for path, reason in (
        (tmp_path / "none.safetensors", "no such file"),
        (text, "not an encoder"),
        (misfit, "shape: is not that of"),
        (unknown, "'timm/test_vi' does not train on images of 3 x 32 x 32 (Unknown model (test_vi))"),
        (wide, "channels: 1000000000 must be at least 1 and at most 64"),
    ):
        message = refusal(DataError, lambda path=path: load_encoder(path))
        assert reason in message
        assert str(path) in message


@pytest.fixture
def onnxruntime() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("layer", "card"),
    [
        ("h", SMALL),
        ("projector.1", SMALL),
        ("z", {**SMALL, "width": 2, "stem": "small", "feature_size": 256}),
        ("h", {**SMALL, "stem": "imagenet", "image_size": 32}),
    ],
)
def test_onnx_gives_what_torch_gives(
    tmp_path: Path, onnxruntime: Any, layer: str, card: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "e.safetensors", tmp_path / "e.onnx"
    exported(path, card, depth=2, hidden=24, dim=5)
    assert cli.main(["export", str(path), str(out), "--layer", layer]) == 0
    said = capfd.readouterr()
    assert re.fullmatch(
        rf"written: {out}; ONNX Runtime's output differs from torch's by \d\.\de-\d\d of the largest\n", said.out
    )
    assert said.err == ""
    encoder = load_encoder(path, layer=layer)
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["card"]) == encoder.card
    for n in (1, 2, 7):
        x = images(n, card["image_size"])
        (found,) = session.run(["h"], {"images": x.numpy()})
        assert found.shape == (n, encoder.card["feature_size"])
        assert close(torch.from_numpy(found), encoder(x))


# In another folder, with another copy of this package and other hashes.
ELSEWHERE = """
import sys
import torch
from simclr_dist.encoder import onnx
assert onnx.__file__.startswith(sys.argv[1])
torch.set_num_threads(1)
onnx.export_onnx("e.safetensors", "e.onnx")
"""


def test_onnx_has_no_path_of_the_machine_and_the_same_bytes_anywhere(tmp_path: Path, onnxruntime: Any) -> None:
    import onnx as library

    folder = tmp_path / "elsewhere"
    settings = {"run_folder": str(tmp_path / "run"), "data": {"shards": "/data/mine"}}
    exported(tmp_path / "e.safetensors", {**SMALL, "config": settings})
    onnx.export_onnx(tmp_path / "e.safetensors", tmp_path / "e.onnx")
    shutil.copytree(Path(onnx.__file__).parents[1], folder / "simclr_dist")
    shutil.copy(tmp_path / "e.safetensors", folder)
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, folder], cwd=folder, env=environment, check=True)
    content = (tmp_path / "e.onnx").read_bytes()
    assert content == (folder / "e.onnx").read_bytes()
    for path in (tmp_path, "/data/mine", sys.prefix, Path(onnx.__file__).parent, "model.py"):
        assert str(path).encode() not in content, path

    model = library.load(tmp_path / "e.onnx")
    card = json.loads(model.metadata_props.pop().value)
    encoder = load_encoder(tmp_path / "e.safetensors")
    assert card == {key: value for key, value in encoder.card.items() if key != "config"}
    assert card["preprocess"]["input_size"] == [3, 16, 16]
    text = str(model)
    assert "metadata_props" not in text
    assert "doc_string" not in text


def test_onnx_that_differs_is_not_written_nor_into_a_folder_that_is_not_there(
    tmp_path: Path, onnxruntime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "e.safetensors", tmp_path / "none" / "e.onnx"
    exported(path)
    write, programs = torch.onnx.export, []

    def kept(*arguments: Any, **settings: Any) -> Any:
        programs.append(write(*arguments, **settings))
        return programs[0]

    monkeypatch.setattr(torch.onnx, "export", kept)
    assert refusal(DataError, lambda: onnx.export_onnx(path, out)) == f"{out}: cannot be written: No such file or directory"

    other, out = load_encoder(path), tmp_path / "e.onnx"
    other.bn1.bias.add_(1e-2)
    export_encoder(path, other, SMALL)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: programs[0])
    assert "nothing was written" in refusal(DataError, lambda: onnx.export_onnx(path, out))
    assert not out.exists()


def test_a_copy_is_of_an_encoder_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, notes = tmp_path / "mine" / "e.safetensors", tmp_path / "notes.json"
    exported(path)
    (other := tmp_path / "other.safetensors").write_bytes(b"another")
    notes.write_text("{}")
    there = "is there already, with other content; name a new file"
    for words, line in (
        ([path, other], f"export: {str(other)!r} {there}"),
        ([path, notes.with_suffix(".safetensors")], f"export: {str(notes)!r} {there}"),  # where its card would go
        ([path], f"export: {str(path)!r} is in no run folder; name OUT"),
        ([other, tmp_path / "new.safetensors"], f"{other}: not an encoder that this program exported, or damaged"),
    ):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert cli.main(["export", *map(str, words)]) == 2
        assert capsys.readouterr().err.startswith(f"simclr-dist: {line}")
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    exported(tmp_path / "run" / "encoders" / "step-00000007.safetensors")
    monkeypatch.chdir(tmp_path / "run" / "encoders")
    assert cli.main(["export", "step-00000007.safetensors"]) == 0
    assert capsys.readouterr().out.startswith(f"there already: {tmp_path}/run/encoders/step-00000007.safetensors\n")


def test_onnx_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.safetensors"
    exported(path)
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert cli.main(["export", str(path), str(tmp_path / "e.onnx")]) == 2
    assert capsys.readouterr().err == f"simclr-dist: export: ONNX needs onnxscript; {onnx.CURE}\n"
    for text in (ABOUT["export"], (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        assert f"`{onnx.CURE}`" in text
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: name)
    assert cli.main(["export", str(tmp_path / "none.safetensors"), str(tmp_path / "e.onnx")]) == 2
    assert "none.safetensors: no such file; name an encoder of a run" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), str(tmp_path / "e.onnx")]) == 2
    assert capsys.readouterr().err.startswith(f"simclr-dist: {tmp_path}: a folder, not an encoder; name an encoder of a run")
    monkeypatch.setattr(onnx, "_MOST", 1000)
    message = refusal(DataError, lambda: onnx.export_onnx(path, tmp_path / "e.onnx"))
    assert message.endswith("GiB of weights; an ONNX file holds at most 2 GiB")


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_efficientnet", "torchvision/mobilenet_v3_small"])
def test_an_encoder_of_others_comes_back_and_loads_where_it_is_from(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    encoder = randomised(build_encoder(name, image_size=32, channels=3)).eval()
    export_encoder(path, encoder, {**CARD, "encoder": name, "feature_size": encoder.feature_size, "image_size": 32})
    loaded, x = load_encoder(path), torch.randn(2, 3, 32, 32)
    expected = encoder(x)
    assert torch.equal(loaded(x), expected)
    shape = loaded.card["shape"]  # type: ignore[index]
    if name.startswith("timm/"):
        theirs = timm.create_model(shape["timm"], checkpoint_path=str(path), **shape["arguments"])
    else:
        theirs = torchvision.models.get_model(shape["torchvision"], **shape["arguments"])
        theirs.classifier[2] = theirs.classifier[3] = nn.Identity()
        theirs.load_state_dict(load_file(path))
    assert torch.equal(theirs.eval()(x), expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/mnasnet0_5", 64),  # its load_state_dict asks for a version
        ("torchvision/swin_t", 32),  # tables of places are in its state
        ("torchvision/maxvit_t", 224),  # an argument of two numbers
        ("timm/coat_tiny", 32),  # one module in two blocks
    ],
)
def test_every_form_of_state_comes_back(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "a.safetensors"
    encoder = build_encoder(name, image_size=size).eval().requires_grad_(False)
    export_encoder(path, encoder, {**CARD, "encoder": name, "feature_size": encoder.feature_size, "image_size": size})
    x = torch.randn(1, 3, size, size)
    expected = encoder(x)
    assert torch.equal(load_encoder(path)(x), expected)
    assert torch.equal(load_foreign(name, path, image_size=size)(x), expected)


def test_a_network_that_uses_a_weight_twice_is_written(tmp_path: Path) -> None:
    """CoaT shares position encodings between its blocks."""
    encoder = nn.Linear(3, 3)
    encoder.twin = encoder.weight  # type: ignore[assignment]
    assert {name: tensor.data_ptr() for name, tensor in export._weights(encoder).items()}.keys() == {"weight", "bias", "twin"}
    assert len({tensor.data_ptr() for tensor in export._weights(encoder).values()}) == 3
