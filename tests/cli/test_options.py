"""A setting has one range: the command line and Python refuse the same values, with the same words after the key."""

import argparse
import re
from typing import Any

import pytest

from simclr_dist.cli.main import main
from simclr_dist.cli.options import add_settings, settings_from
from simclr_dist.config.ranges import setting_types
from simclr_dist.convert.settings import ShardSettings
from simclr_dist.encoder.names import Foreign
from simclr_dist.evaluate.settings import DuplicateSettings, EmbedSettings, FinetuneSettings, NeighbourSettings, Settings
from simclr_dist.preflight.plan.settings import PlanSettings
from simclr_dist.system.errors import ConfigError

SETS = ["--train", "a", "--test", "b"]
VERBS: dict[type, list[str]] = {
    ShardSettings: ["shard", "images", "new"],
    Settings: ["eval", "e", *SETS],
    Foreign: ["eval", *SETS],
    FinetuneSettings: ["finetune", "e", *SETS],
    EmbedSettings: ["embed", "e", "a.jpg", "f.parquet"],
    NeighbourSettings: ["neighbours", "e", "a.jpg", "--among", "s"],
    DuplicateSettings: ["duplicates", "e", "s"],
    PlanSettings: ["plan", "none.yaml"],
}
REQUIRED: dict[type, dict[str, Any]] = {FinetuneSettings: {"labels": 0.5}, Foreign: {"arch": "resnet18", "weights": "w.pth"}}
ANY_TEXT = {"image_column", "label_column", "layer", "weights", "prefix", "gpu", "bandwidth", "latency"}  # refused later
WITHOUT_VALUE = {"baselines", "keep_features", "skip_bad", "measure"}
SEARCH: dict[str, list[Any]] = {
    "batch_size": [0], "workers": [-1], "precision": ["fp64"], "features": ["", __file__],
}  # fmt: skip
REFUSED: dict[type, dict[str, list[Any]]] = {
    ShardSettings: {
        "shard_size": [0, -1], "seed": [-1, 2**64], "short_side": [5, 7, 0], "quality": [0, 101],
        "channels": [0, 65], "bit_depth": [1, 12],
        "split": [(0.8, 0.3), (0.8, 0.20001), (1.0, 0.0), (0.5, float("nan")), (0.5, 0.3, 0.1), (0.4, 0.2, 0.2, 0.2), (0.5,)],
    },
    Settings: {
        "k": [0], "temperature": [0.0, -1.0, float("inf")], "l2": [-1.0, float("nan")], "max_iter": [0], "batch_size": [0],
        "workers": [-1], "seed": [-1, 2**63], "protocols": [("svm",), ("knn", "knn"), ("",)], "sgd_epochs": [0],
        "mlp_epochs": [0], "precision": ["fp16"], "features": ["", __file__],
        "labels": [(0.0,), (1.5,), (0.1, 0.1)], "finetune_epochs": [0],
    },
    Foreign: {
        "arch": ["vgg16"], "image_size": [7, 5000], "width": [3], "stem": ["large"], "channels": [0, 1025],
        "mean": [(float("nan"),)], "std": [(0.0,)],
    },
    FinetuneSettings: {
        "labels": [0.0, 10.0, float("nan")], "start": ["z", "projector.0"], "seeds": [0], "epochs": [0], "batch_size": [1],
        "base_lr": [0.0, float("inf")], "workers": [-1],
    },
    EmbedSettings: {"batch_size": [0], "workers": [-1], "precision": ["fp64"], "map": ["", "x.jpg"]},
    NeighbourSettings: {"k": [0], **SEARCH},
    DuplicateSettings: {"above": [0.0, 1.0], **SEARCH},
    PlanSettings: {"processes": [0], "samples": [0], "utilisation": [0.0, 1.5], "images_per_second": [0.0, float("nan")]},
}  # fmt: skip
CASES = [(cls, name, value) for cls, names in REFUSED.items() for name, values in names.items() for value in values]


def words(settings: dict[str, Any]) -> list[str]:
    """What is typed for these values."""
    separator = {name: "," if name == "protocols" else "/" for name in settings}
    return [
        f"--{name.replace('_', '-')}={separator[name].join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in settings.items()
    ]


@pytest.mark.parametrize(("cls", "name", "value"), CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_both_ways_refuse_alike(cls: type, name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**REQUIRED.get(cls, {}), name: value}
    with pytest.raises(ConfigError) as refused:
        cls(**settings)
    assert str(refused.value).startswith(f"{name}: ")
    assert main([*VERBS[cls], *words(settings)]) == 2
    assert capsys.readouterr().err == f"simclr-dist: {refused.value}\n"


@pytest.mark.parametrize("cls", VERBS, ids=lambda cls: cls.__name__)
def test_every_setting_is_an_option_and_has_a_case(cls: type) -> None:
    assert set(setting_types(cls)) - ANY_TEXT - WITHOUT_VALUE == set(REFUSED[cls])
    parser = argparse.ArgumentParser()
    add_settings(parser, cls)
    required = REQUIRED.get(cls, {})
    assert settings_from(cls, parser.parse_args(words(required))) == cls(**required), "the defaults are those of the dataclass"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"protocols": ("linear",), "k": 5}, "k: 5: has no effect without the protocol knn; leave it out"),
        ({"protocols": ("mlp",), "temperature": 0.2}, "temperature: 0.2: has no effect without the protocol knn; leave it out"),
        ({"protocols": ("knn",), "l2": 0.0}, "l2: 0.0: has no effect without the protocol linear; leave it out"),
        ({"protocols": ("sgd",), "max_iter": 5}, "max_iter: 5: has no effect without the protocol linear; leave it out"),
        ({"sgd_epochs": 5}, "sgd_epochs: 5: has no effect without the protocol sgd; leave it out"),
        ({"mlp_epochs": 5}, "mlp_epochs: 5: has no effect without the protocol mlp; leave it out"),
        ({"baselines": False, "seed": 5}, "seed: 5: has no effect without baselines and the protocol sgd; leave it out"),
    ],
)
def test_what_no_protocol_uses_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        Settings(**settings)
    Settings(**settings | {"protocols": ("knn", "linear", "sgd", "mlp")})


def test_both_ways_take_alike() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, ShardSettings)
    typed = parser.parse_args(["--split", "0.8/0.2000005", "--short-side", "8", "--label-column", "none"])
    assert settings_from(ShardSettings, typed) == ShardSettings(split=(0.8, 0.2000005), short_side=8, label_column="none")
    parser = argparse.ArgumentParser()
    add_settings(parser, Settings)
    typed = parser.parse_args(
        ["--protocols", "linear,knn", "--no-features", "--no-baselines", "--l2", "1e-3", "--precision", "bf16"]
    )
    assert settings_from(Settings, typed) == Settings(
        protocols=("linear", "knn"), keep_features=False, baselines=False, l2=1e-3, precision="bf16"
    )
    parser = argparse.ArgumentParser()
    add_settings(parser, Foreign)
    typed = parser.parse_args(["--arch", "resnet50", "--weights", "w.pth", "--width", "2"])
    assert settings_from(Foreign, typed) == Foreign("resnet50", "w.pth", width=2)
