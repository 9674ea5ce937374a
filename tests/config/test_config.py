"""Settings: strict YAML, one clear line for every mistake, and the numbers that are derived from them."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from simclr_dist.config import together
from simclr_dist.config.load import config_from_dict, difference, load_config
from simclr_dist.config.networks import names_of
from simclr_dist.config.ranges import Probability, Range, check_ranges, descriptions, may_change, setting_types
from simclr_dist.config.settings import CheckpointConfig, Config, DataConfig, OptimConfig
from simclr_dist.config.strict_yaml import read_yaml, write_yaml
from simclr_dist.config.together import (
    BLURRING_PRESETS,
    CONTIGUOUS_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    check_fits,
    check_machine,
    doubts,
    optimizer_names,
)
from simclr_dist.data.views.draws import PRESETS
from simclr_dist.system import machine
from simclr_dist.system.errors import ConfigError

LEAST = "run_folder: runs/x\nsteps: 20\ndata: {shards: data/x}\n"

# Every knob is an interface that someone has to keep: a new one is added here on purpose.
OPTIONS = [
    "run_folder", "seed", "global_batch_size", "micro_batches", "epochs", "steps", "device", "precision",
    "activation_checkpointing", "channels_last", "compile", "deterministic", "exact_piece",
    "max_skipped_steps", "check_ranks_every", "timeout_minutes",
    "first_step_timeout_minutes", "data.shards", "data.reader", "data.channels", "data.bit_depth",
    "data.workers", "data.window",
    "data.on_bad_sample", "data.max_bad_samples", "data.in_memory", "data.cache", "data.cache_gib", "data.retry_minutes",
    "data.samples", "data.shuffle_buffer", "data.allow_pipe", "views.preset", "views.image_size", "views.crop_scale",
    "views.crop_ratio", "views.interpolation", "views.flip", "views.vertical_flip", "views.rotate", "views.jitter",
    "views.brightness", "views.contrast", "views.saturation", "views.hue", "views.gray", "views.blur", "views.blur_sigma",
    "views.solarize", "views.mean", "views.std",
    "model.encoder", "model.width", "model.stem", "model.drop_path", "model.init", "model.init_file",
    "model.init_prefix", "model.init_except",
    "model.projector_depth", "model.projector_hidden", "model.projector_dim", "model.projector_batch_norm",
    "loss.temperature", "loss.decoupled", "loss.scale", "optim.name", "optim.base_lr", "optim.lr_rule",
    "optim.weight_decay", "optim.momentum", "optim.betas",
    "optim.trust_coefficient", "optim.warmup_epochs", "optim.warmup_steps", "optim.clip_norm", "checkpoint.every",
    "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.export_every", "log.every", "log.tensorboard",
    "log.wandb", "log.mlflow", "log.trackio", "log.views_every_epochs", "probe.every_epochs", "probe.shards", "probe.images",
]  # fmt: skip


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changed(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.rpartition(".")
    if section:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    return dataclasses.replace(config, **{key: value})


def least_with(key: str, value: Any) -> str:
    """The least config with one key set."""
    values = read_yaml(LEAST, "here")
    section, _, name = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[name] = value
    return write_yaml(values)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(LEAST)
    return path


def refusal(path: Path, text: str | None = None, *overrides: str) -> str:
    """The one line that a config is refused with."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_every_option_is_known_here() -> None:
    assert list(leaves(Config().to_dict())) == OPTIONS


def test_every_option_says_what_it_is() -> None:
    assert list(descriptions(Config)) == OPTIONS
    assert descriptions(Config)["data.workers"] == "Reading processes beside each rank; 0 reads in the rank itself."


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3.e4", 3e4),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("1e3", 1000.0),
        ("12", 12),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("[0.2, 1]", [0.2, 1]),
    ],
)
def test_yaml_scalars(text: str, value: Any) -> None:
    read = read_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


@given(st.one_of(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none()))
def test_yaml_reads_what_it_wrote(value: Any) -> None:
    assert read_yaml(write_yaml({"key": value}), "here") == {"key": value}


@pytest.mark.parametrize("text", ["1e5", "3e-4", "no", "2024", "0x1f", "1:30", "null", "~", ".inf", "a: b", "x #1"])
def test_yaml_writes_text_that_looks_like_something_else_so_that_it_stays_text(text: str) -> None:
    assert read_yaml(write_yaml({"key": text}), "here") == {"key": text}
    assert yaml.safe_load(write_yaml({"key": text})) == {"key": text}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LEAST + "seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        (LEAST + "loss: {temperature: 0.1, temperature: 0.2}\n", "key 'temperature' stands twice"),
        (LEAST + "loss: [1\n", "not valid YAML"),
        (LEAST + "- a\n", "not valid YAML"),
        (LEAST + "? [a]\n: b\n", "a key is not text"),
        (LEAST + "seed: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (LEAST + "seed: !!int x\n", "not valid YAML"),
        (LEAST + "seed: !!timestamp x\n", "not valid YAML"),
        (LEAST + "seed: " + "[" * 1000 + "\n", "not valid YAML: it is nested too deeply"),
        (LEAST + "views: {mean: &a [0, 0, 0], std: *a}\n", "not valid YAML: an alias; write the value itself"),
        (LEAST + "a: &a {x: 1}\n<<: *a\n", "not valid YAML: an alias; write the value itself"),
        (LEAST + "#" * 2**18, "is larger than 256 KiB, the most that is read of settings"),
        (LEAST + "loss: {temperature: 1" + "0" * 999 + "}\n", "loss.temperature: inf is not a finite number"),
        ("- run_folder\n", "expected `key: value` lines, found list"),
        ("", "expected `key: value` lines, found NoneType"),
        ("just text", "expected `key: value` lines, found str"),
    ],
)
def test_bad_yaml_is_refused(file: Path, text: str, reason: str) -> None:
    line = refusal(file, text)
    assert line.startswith(f"{file}: ")
    assert reason in line


def test_a_file_that_never_ends_is_refused() -> None:
    assert refusal(Path("/dev/zero"), None).startswith("/dev/zero: is larger than 256 KiB")


@pytest.mark.parametrize("kind", ["a text", "a list", "a key", "a tag"])
def test_a_large_value_is_not_shown_whole(file: Path, kind: str) -> None:
    many = {
        "a text": f"{LEAST}loss: {{temperature: {'x' * 100_000}}}\n",
        "a list": f"{LEAST}views: {{mean: [{'1, ' * 10_000}]}}\n",
        "a key": f"{LEAST}loss: {{? {'x' * 100_000} : 1}}\n",
        "a tag": f"{LEAST}loss: !<{'x' * 100_000}> 1\n",
    }
    line = refusal(file, many[kind])
    assert len(line) < 2100
    assert line.startswith(f"{file}: ")
    if kind in ("a text", "a list"):
        assert len(line) < 600
        assert "..." in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "run_folder: r\nepochs: 1\n  data: x\n",
            "line 3, column 7 (`data: x`): not valid YAML: mapping values are not allowed here",
        ),
        ("run_folder: r\nloss: [1\n", "line 3, column 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: \x07\n", "line 2, column 4 (`b:`): not valid YAML: character #x0007 is not allowed"),
        ("a: 1\na: 2\n", "line 2, column 1 (`a: 2`): not valid YAML: key 'a' stands twice"),
        (
            "a: 1\n" + "b" * 99 + ": c: d\n",
            f"line 2, column 103 (`{'b' * 57}...`): not valid YAML: mapping values are not allowed here",
        ),
    ],
)
def test_bad_yaml_is_shown_with_its_place(file: Path, text: str, told: str) -> None:
    assert refusal(file, text) == f"{file}: {told}"


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    missing, folder, binary = tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in ((missing, "No such file"), (folder, "Is a directory"), (binary, "decode")):
        line = refusal(path)
        assert line.startswith(f"{path}: cannot read the config: ")
        assert reason in line


# Keys and types


def test_a_misspelt_key_is_met_with_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    line = refusal(Path("configs/x.yaml"), LEAST + "loss: {temprature: 0.1}\n")
    assert line == "configs/x.yaml: loss.temprature: unknown key; did you mean 'loss.temperature'?"


@pytest.mark.parametrize(
    ("text", "key", "right"),
    [
        ("temperature: 0.1\n", "temperature", "loss.temperature"),
        ("momentum: 0.9\n", "momentum", "optim.momentum"),
        ("model: {global_batch_size: 3}\n", "model.global_batch_size", "global_batch_size"),
        ("global_batchsize: 3\n", "global_batchsize", "global_batch_size"),
        ("optm: {name: lars}\n", "optm.name", "optim.name"),  # a misspelt section is met as far as a setting
        ("optm: {wieght_decay: 0.1}\n", "optm.wieght_decay", "optim.weight_decay"),
        ("probe: {evry: 2}\n", "probe.evry", "probe.every_epochs"),  # and not log.every
        ("temp: 0.1\n", "temp", "loss.temperature"),
        ("batch: 8\n", "batch", "global_batch_size"),
        ("seed2: 8\n", "seed2", "seed"),
    ],
)
def test_a_key_in_the_wrong_place_is_met_with_the_right_one(file: Path, text: str, key: str, right: str) -> None:
    assert refusal(file, LEAST + text) == f"{file}: {key}: unknown key; did you mean '{right}'?"


def test_a_key_like_no_other_has_no_suggestion(file: Path) -> None:
    """Nor does one that shares no more than its section with others."""
    assert refusal(file, LEAST + "qqqqqq: 1\n") == f"{file}: qqqqqq: unknown key"
    assert refusal(file, LEAST, "--data.foo", "1") == "command line: data.foo: unknown key"
    assert refusal(file, LEAST, "--checkpoint.foo", "1") == "command line: checkpoint.foo: unknown key"
    assert refusal(file, LEAST, "--optm.name", "lars") == "command line: optm.name: unknown key; did you mean 'optim.name'?"
    assert refusal(file, LEAST + "optm: {}\n") == f"{file}: optm: unknown key"
    assert refusal(file, LEAST + "1: 2\n") == f"{file}: 1: unknown key"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("seed", True, "True is not a whole number"),
        ("seed", 1.0, "1.0 is not a whole number"),
        ("seed", "x", "'x' is not a whole number"),
        ("seed", {"a": 1}, "{'a': 1} is not a whole number"),
        ("seed", None, "None is not a whole number"),
        ("loss.temperature", "warm", "'warm' is not a number"),
        ("loss.temperature", False, "False is not a number"),
        ("compile", 1, "1 is not true or false"),
        ("compile", "no", "'no' is not true or false"),
        ("run_folder", 3, "3 is not text"),
        ("data", None, "expected settings below it, found None"),
        ("data", [1], "expected settings below it, found [1]"),
        ("views.interpolation", "bicubik", "did you mean 'bicubic'?"),
        ("views.interpolation", 3, "3 is not one of bicubic, bilinear"),
        ("views.crop_scale", 0.2, "0.2 is not a list of 2 numbers"),
        ("views.crop_scale", [0.1, 0.2, 0.3], "is not a list of 2 numbers"),
        ("views.crop_scale", ["a", 1], "'a' is not a number"),
        ("device", "gpu", "'gpu' is not one of auto, cpu, cuda"),
        ("model.encoder", "resnet5", "did you mean 'resnet50'?"),
        ("model.encoder", ["resnet50"], "is not text"),
        ("model.width", True, "True is not one of 1, 2, 4"),
        ("model.width", 2.0, "2.0 is not one of 1, 2, 4"),
        ("model.width", 3, "3 is not one of 1, 2, 4"),
    ],
)
def test_wrong_types_are_refused(file: Path, key: str, value: Any, reason: str) -> None:
    line = refusal(file, least_with(key, value))
    assert line.startswith(f"{file}: {key}: ")
    assert reason in line


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", [key for key, value in leaves(Config().to_dict()).items() if isinstance(value, float)])
def test_a_number_is_finite(file: Path, key: str, value: str) -> None:
    assert "is not a finite number" in refusal(file, None, f"--{key}", value)


def test_whole_numbers_are_numbers_and_lists_are_tuples(file: Path) -> None:
    config = load_config(file, ["--loss.temperature", "1", "--views.crop_scale", "[0, 1]", "--views.crop_scale=[0.5, 1]"])
    assert type(config.loss.temperature) is float
    assert config.views.crop_scale == (0.5, 1.0)


def test_optional_settings_can_be_set_and_left(file: Path) -> None:
    config = load_config(file, ["--views.interpolation", "bilinear", "--views.flip", "0", "--views.crop_scale", "null"])
    assert (config.views.interpolation, config.views.flip, config.views.crop_scale) == ("bilinear", 0.0, None)
    assert load_config(file, ["--views.interpolation", "null"]).views.interpolation is None


# Ranges and contradictions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("global_batch_size", 0),
        ("micro_batches", 0),
        ("max_skipped_steps", 0),
        ("timeout_minutes", 0),
        ("first_step_timeout_minutes", -1.0),
        ("check_ranks_every", -1),
        ("timeout_minutes", 1e300),
        ("run_folder", ""),
        ("steps", 0),
        ("data.shards", ""),
        ("data.workers", -1),
        ("data.window", 0),
        ("data.max_bad_samples", -1),
        ("data.shuffle_buffer", 0),
        ("data.shards", "pipe:cat x.tar"),
        ("data.samples", 5),
        ("data.shuffle_buffer", 5),
        ("data.allow_pipe", True),
        ("data.cache", "x"),
        ("data.cache_gib", 5),
        ("data.retry_minutes", 2),
        ("views.image_size", 7),
        ("views.crop_scale", [0, 1]),
        ("views.crop_scale", [0.5, 0.2]),
        ("views.crop_scale", [0.5, 1.1]),
        *((f"views.{name}", value) for name in ("flip", "jitter", "gray", "blur") for value in (-0.1, 1.1)),
        *((f"views.{name}", -0.1) for name in ("brightness", "contrast", "saturation", "hue")),
        ("views.hue", 0.6),
        ("model.projector_depth", -1),
        ("model.projector_hidden", 0),
        ("model.projector_dim", 0),
        ("loss.temperature", 0),
        ("loss.temperature", -0.1),
        ("optim.name", "larz"),
        ("optim.name", ""),
        ("optim.name", "torch_optimizer.sgdx"),
        ("optim.base_lr", -1),
        ("optim.weight_decay", -1),
        ("optim.momentum", -0.1),
        ("optim.momentum", 1),
        ("optim.trust_coefficient", -1),
        ("optim.warmup_epochs", -1),
        ("optim.warmup_steps", -1),
        ("optim.clip_norm", -1),
        ("checkpoint.every", 0),
        ("checkpoint.keep_last", 0),
        ("checkpoint.keep_every", -1),
        ("checkpoint.export_every", -1),
        ("log.every", 0),
    ],
)
def test_values_out_of_range_are_refused(file: Path, key: str, value: Any) -> None:
    line = refusal(file, least_with(key, value))
    assert line.startswith(f"{file}: {key}: ")
    assert repr(float(value) if isinstance(value, int) and f"{value}.0" in line else value)[1:-1] in line


@pytest.mark.parametrize("value", [0, -1])
def test_epochs_out_of_range_are_refused(file: Path, value: int) -> None:
    assert "epochs: " in refusal(file, LEAST.replace("steps: 20", f"epochs: {value}"))


@dataclasses.dataclass(frozen=True)
class Inner:
    share: Probability = 0.5
    """A share,
    of something."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Settings of another command."""

    quality: Annotated[int | None, Range(least=1, most=100)] = None
    """JPEG quality."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    scale: float = 1.0
    """Any finite number."""
    names: tuple[Literal["x", "y"], ...] = ("x",)
    """Some."""
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"quality": 101}, "quality: 101 must be at least 1 and at most 100"),
        ({"kind": "c"}, "kind: 'c' is not one of a, b"),
        ({"scale": math.nan}, "scale: nan is not a finite number"),
        ({"names": ("y", "z")}, "names: ('y', 'z') is not one of x, y"),
        ({"inner": Inner(2.0)}, "inner.share: 2.0 is not a probability from 0 to 1"),
    ],
)
def test_any_dataclass_of_settings_refuses_what_its_types_do(values: dict[str, Any], line: str) -> None:
    assert Outer(quality=100, names=("x", "y")).quality == 100
    with pytest.raises(ConfigError) as caught:
        Outer(**values)
    assert str(caught.value) == line


def plain_names(hint: Any) -> list[str]:
    """The names of the types within a setting's type."""
    inner = [name for part in get_args(hint) for name in plain_names(part) if part is not type(None)]
    return [*inner, *([hint.__name__] if isinstance(hint, type) else ["str"] if get_origin(hint) is Literal else [])] + (
        ["tuple"] if get_origin(hint) is tuple else []
    )


NUMBERS = [key for key, hint in setting_types(Config).items() if not {"str", "bool"} & set(plain_names(hint))]

assert len(NUMBERS) > 40


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_beyond_what_arithmetic_can_do(file: Path, key: str) -> None:
    """All of them: sums of whole numbers stay exact, and no float becomes infinite, or 0, in float32."""
    names = plain_names(setting_types(Config)[key])
    size = max(1, names.count("float")) if "tuple" in names else 0
    for value in (float("nan"), float("inf"), 1e308, -1e308) if "float" in names else (10**400, 2**64, -(2**64)):
        with pytest.raises(ConfigError, match=f"{key}: .* (is too|must be|is not a)"):
            load_config(file, [f"--{key}", str([value] * size if size else value).replace("e+", "e").replace("inf", ".inf")])


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("epochs", "1e308", "1e+308 is too large; the most is 1e+30"),
        ("steps", "9007199254740993", "9007199254740993 is too large; the most is 9007199254740992"),
        ("views.image_size", "100000", "100000 is too large; the most is 32768"),
        ("data.workers", "100000", "100000 is too large; the most is 4096"),
        ("model.projector_hidden", "1000000000", "1000000000 is too large; the most is 1048576"),
        ("model.projector_dim", "1000000000", "1000000000 is too large; the most is 1048576"),
        ("model.projector_depth", "1000000000", "1000000000 is too large; the most is 1000"),
        ("loss.temperature", "5e-324", "5e-324 is too small; above 0 the least is 1.1e-16"),
        ("timeout_minutes", "1e-30", "1e-30 is too small; above 0 the least is 0.001"),
        ("views.blur_sigma", "[1e-30, 1]", "(1e-30, 1.0) must be two numbers with 0 < smallest <= largest, from 1.1e-16 to"
         " 9007199254740992"),
    ],
)  # fmt: skip
def test_extremes_are_refused(file: Path, key: str, value: str, line: str) -> None:
    given = ["--steps", "null"] if key == "epochs" else []
    with pytest.raises(ConfigError) as refused:
        load_config(file, [*given, f"--{key}", value])
    assert str(refused.value) == f"{file} with the command line: {key}: {line}"


def test_what_a_large_machine_may_want_is_taken(file: Path) -> None:
    large = {
        "global_batch_size": 2**20, "epochs": 1e5, "data.workers": 512, "views.image_size": 8192, "seed": 2**64 - 1,
        "model.projector_hidden": 2**17, "model.projector_dim": 2**16, "timeout_minutes": 100_000, "loss.temperature": 1e-4,
        "optim.clip_norm": 1e9, "checkpoint.every": 2**53, "views.crop_ratio": [0.01, 100],
    }  # fmt: skip
    load_config(file, ["--steps", "null", *(str(word) for key, value in large.items() for word in (f"--{key}", value))])


def test_epochs_of_which_a_run_never_ends(file: Path) -> None:
    config = load_config(file, ["--steps", "null", "--epochs", "1e13", "--global_batch_size", "256"])
    with pytest.raises(ConfigError, match=r"^epochs: 10000000000000\.0 of 5004 steps are more than 9007199254740992 steps, "):
        check_fits(config, 1_281_167, 8)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data.workers": 600, "device": "cuda"},
         "data.workers: 600 for each of 2 ranks are 1202 processes; this machine allows 1000; lower it"),
        ({"global_batch_size": 2**14, "device": "cpu"},
         "views.image_size: 224: 16384 views of 3 x 224 x 224 x 4 bytes a step are 9.2 GiB; this machine has 8.0 GiB; lower it,"
         " or global_batch_size"),
        ({"global_batch_size": 2**16, "device": "auto"},
         "views.image_size: 224: 65536 views of 3 x 224 x 224 x 1 bytes a step are 9.2 GiB; this machine has 8.0 GiB; lower it,"
         " or global_batch_size"),
        ({"model.projector_hidden": 2**15, "model.projector_depth": 4, "device": "cpu"},
         "model.projector_hidden: 32768: the layers between 32768 and 128 numbers are 8.0 GiB of weights a rank; this machine"
         " has 8.0 GiB; lower it, projector_dim or projector_depth"),
        ({"model.projector_dim": 2**15 + 8},
         "model.projector_dim: 32776: the products of 32776 numbers with each other, for the effective rank, are 8.0 GiB; this"
         " machine has 8.0 GiB; lower it"),
    ],
    ids=["processes", "views", "views before a GPU", "weights", "effective rank"],
)  # fmt: skip
def test_what_this_machine_cannot_have(file: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], line: str) -> None:
    """2 of 4 ranks are on it."""
    monkeypatch.setattr(together, "memory_bytes", lambda: 2**33)
    monkeypatch.setattr(together, "most_processes", lambda: 1000)
    check_machine(load_config(file, ["--global_batch_size", "4096"]), 224, 2, 4)
    config = load_config(file, [str(word) for key, value in change.items() for word in (f"--{key}", value)])
    with pytest.raises(ConfigError) as refused:
        check_machine(config, 224, 2, 4)
    assert str(refused.value) == line


def test_compile_needs_a_compiler_and_headers(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_machine(load_config(file), 224, 2, 4)
    config = load_config(file, ["--compile", "true", "--device", "cpu"])
    ends = "; install it, or set compile: false"
    why = "a C++ compiler: 'no-such-compiler' is not found (CXX names another)"
    with pytest.raises(ConfigError) as refused:
        check_machine(config, 224, 2, 4)
    assert str(refused.value) == f"compile: true: needs {why}{ends}"
    monkeypatch.setenv("CXX", sys.executable)
    check_machine(config, 224, 2, 4)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        check_machine(config, 224, 2, 4)
    why = f"Python's headers: {tmp_path} has no Python.h (the package is called python3-dev, or the like)"
    assert str(refused.value) == f"compile: true: needs {why}{ends}"


def test_the_meaning_of_a_setting_is_read_from_its_docstring() -> None:
    assert descriptions(Outer) == {
        "quality": "JPEG quality.", "kind": "Which.", "scale": "Any finite number.", "names": "Some.",
        "inner.share": "A share, of something.",
    }  # fmt: skip


def test_the_bounds_themselves_are_taken(file: Path) -> None:
    bounds = {
        "seed": 2**64 - 1, "micro_batches": 4096, "data.workers": 0, "views.hue": 0.5, "views.flip": 1, "views.blur": 0,
        "views.crop_scale": [1, 1], "model.projector_depth": 0, "optim.weight_decay": 0, "optim.momentum": 0,
        "optim.clip_norm": 0, "optim.warmup_steps": 0, "steps": 1,
    }  # fmt: skip
    load_config(file, [part for key, value in bounds.items() for part in (f"--{key}", json.dumps(value))])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--epochs", "3"], ["steps: 20, epochs: 3.0", "exactly one"]),
        (["--steps", "null"], ["steps: None, epochs: None", "exactly one"]),
        (["--model.init", "file"], ["model.init_file", "'file'"]),
        (["--model.init_file", "x.safetensors"], ["model.init_file", "'x.safetensors'", "'random'"]),
        (["--model.init_prefix", "a."], ["model.init_prefix: 'a.' has no effect with model.init: random"]),
        (["--model.init_except", "conv1"], ["model.init_except: 'conv1' has no effect with model.init: random"]),
        (["--global_batch_size", "10", "--micro_batches", "4"], ["micro_batches: 4", "global_batch_size 10"]),
        (["--optim.name", "torch_optimizer.lars", "--optim.weight_decay", "0"], ["optim.name", "weight_decay 0"]),
        (["--model.init", "imagenet", "--model.width", "2"], ["model.init: 'imagenet'", "width 1"]),
        (["--model.init", "imagenet_or_random", "--model.stem", "small"], ["model.init", "stem imagenet"]),
        (["--model.init", "imagenet", "--model.encoder", "resnet10"], ["model.init", "resnet10"]),
    ],
)
def test_contradictions_are_refused(file: Path, overrides: list[str], parts: list[str]) -> None:
    line = refusal(file, None, *overrides)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_refused_optimizers_come_with_the_reason(file: Path, name: str) -> None:
    line = refusal(file, None, "--optim.name", f"torch_optimizer.{name}")
    assert f"optim.name: 'torch_optimizer.{name}' is refused: {REFUSED_OPTIMIZERS[name]}" in line


@pytest.mark.parametrize("name", optimizer_names())
def test_the_other_optimizers_are_taken(file: Path, name: str) -> None:
    assert load_config(file, ["--optim.name", name, "--channels_last", "false"]).optim.name == name


@pytest.mark.parametrize("name", CONTIGUOUS_OPTIMIZERS)
def test_an_optimizer_that_fails_on_channels_last_is_refused_with_it(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="set channels_last to false"):
        load_config(file, ["--optim.name", f"torch_optimizer.{name}"])


# The command line


def test_the_command_line_beats_the_file_and_the_last_one_wins(file: Path) -> None:
    file.write_text(LEAST + "seed: 1\nloss: {temperature: 0.2}\n")
    assert load_config(file).seed == 1
    config = load_config(file, ["--seed", "2", "--seed=3", "--loss.temperature=3e-1"])
    assert (config.seed, config.loss.temperature, config.steps) == (3, 0.3, 20)
    assert config.data.shards == "data/x", "a section keeps what was not set anew"


def test_hyphens_stand_for_underscores(file: Path) -> None:
    config = load_config(file, ["--global-batch-size", "64", "--data.on-bad-sample=replace", "--run-folder", "my-run_1"])
    assert (config.global_batch_size, config.data.on_bad_sample, config.run_folder) == (64, "replace", "my-run_1")


@pytest.mark.parametrize("text", ["2024", "3e4", "no", "runs/my run #1", "runs/a: b", "[x", "'quoted'", "-x"])
def test_text_settings_take_any_text(file: Path, text: str) -> None:
    assert load_config(file, ["--run_folder", text]).run_folder == text
    assert load_config(file, [f"--run_folder={text}"]).run_folder == text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--seed"], "command line: --seed: its value is missing"),
        (["--seed", "1", "--loss.temperature"], "command line: --loss.temperature: its value is missing"),
        (["seed", "1"], "command line: 'seed': expected --key value"),
        (["--seed", "1", "2"], "command line: '2': expected --key value"),
        (["--sead", "1"], "command line: sead: unknown key; did you mean 'seed'?"),
        (["--seed", "x"], "command line: seed: 'x' is not a whole number"),
        (["--seed", "--log.every"], "command line: seed: '--log.every' is not a whole number"),
        (["--seed="], "command line: seed: None is not a whole number"),
        (["--data", "x"], "command line: data: expected settings below it, found 'x'"),
        (["--seed.x", "1"], "command line: seed: {'x': 1} is not a whole number"),
    ],
)
def test_bad_command_lines_are_refused(file: Path, overrides: list[str], line: str) -> None:
    assert refusal(file, None, *overrides) == line


def test_bad_yaml_on_the_command_line_is_refused(file: Path) -> None:
    assert refusal(file, None, "--views.crop_scale", "[1").startswith("command line: --views.crop_scale: not valid YAML: ")


def test_a_value_out_of_range_on_the_command_line_is_not_blamed_on_the_file_alone(file: Path) -> None:
    line = refusal(file, None, "--loss.temperature", "0")
    assert line == f"{file} with the command line: loss.temperature: 0.0 must be above 0"


# What is derived


@pytest.mark.parametrize(
    ("batch", "base_lr", "rule", "peak"),
    [
        (4096, 0.3, "linear", 4.8),  # the paper's, for long runs
        (4096, 0.075, "sqrt", 4.8),  # the paper's, for small batches and short runs
        (256, 0.3, "linear", 0.3),
        (512, 0.3, "linear", 0.6),
        (256, 0.075, "sqrt", 1.2),
        (4096, 2e-3, "constant", 2e-3),
    ],
)
def test_the_peak_learning_rate_comes_from_the_global_batch(batch: int, base_lr: float, rule: Any, peak: float) -> None:
    config = Config(global_batch_size=batch, micro_batches=4, optim=OptimConfig(base_lr=base_lr, lr_rule=rule))
    assert math.isclose(config.peak_lr, peak)


def test_lengths_in_steps() -> None:
    by_epochs = Config(global_batch_size=100, epochs=2.5, optim=OptimConfig(warmup_epochs=0.5))
    assert (by_epochs.steps_per_epoch(1099), by_epochs.total_steps(1099), by_epochs.warmup_steps(1099)) == (10, 25, 5)
    by_steps = Config(global_batch_size=100, steps=7, optim=OptimConfig(warmup_steps=3, warmup_epochs=99))
    assert (by_steps.total_steps(1099), by_steps.warmup_steps(1099)) == (7, 3)
    assert Config(global_batch_size=100, steps=7, optim=OptimConfig(warmup_steps=0)).warmup_steps(1099) == 0
    imagenet = Config(global_batch_size=4096, epochs=100)
    assert (imagenet.total_steps(1_281_167), imagenet.warmup_steps(1_281_167)) == (31_200, 3120)


def test_a_global_batch_must_fit_the_data_and_the_processes() -> None:
    config = Config(
        global_batch_size=24, micro_batches=2, steps=3, data=DataConfig(shards="s"), optim=OptimConfig(warmup_steps=0)
    )
    for world_size in (1, 2, 3, 4, 6, 12):
        check_fits(config, 24, world_size)
    with pytest.raises(ConfigError, match="global_batch_size: 24 is larger than the 23 images of s"):
        check_fits(config, 23, 1)
    with pytest.raises(ConfigError, match=r"24 is not divided by 5 processes x 2 micro_batches; 20 would be$"):
        check_fits(config, 100, 5)
    with pytest.raises(ConfigError, match=r"not divided by 13 processes x 2 micro_batches; 26 would be$"):
        check_fits(config, 100, 13)
    with pytest.raises(ConfigError, match="a warm-up of 4 steps is longer than the run of 3"):
        check_fits(changed(config, "optim.warmup_steps", 4), 100, 1)
    with pytest.raises(ConfigError, match=r"epochs: 0\.1 of 24 images .* is not one step"):
        check_fits(dataclasses.replace(config, steps=None, epochs=0.1), 24, 1)


@pytest.mark.parametrize(
    ("length", "line"),
    [
        ({"steps": 3}, r"^steps: 3: the run in runs/x has done 4 already; ask for more, or name another run_folder$"),
        ({"epochs": 0.75}, r"^epochs: 0\.75, or 3 steps: the run in runs/x has done 4 already; ask for more"),
    ],
)
def test_a_length_that_is_behind_the_run_is_named_as_it_was_typed(length: dict[str, Any], line: str) -> None:
    config = Config(run_folder="runs/x", global_batch_size=24, optim=OptimConfig(warmup_steps=0), **length)
    check_fits(config, 100, 1, 3)
    with pytest.raises(ConfigError, match=line):
        check_fits(config, 100, 1, 4)


def test_a_batch_of_one_has_no_negatives(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: 1 is too small; the least is 2$"):
        load_config(file, ["--global_batch_size", "1"])


@pytest.mark.parametrize(
    ("batch", "samples", "ranks", "side", "short_side", "lines"),
    [
        (256, 1000, 3, 32, 32.0, []),
        (256, 512, 1, 32, None, []),
        (4096, 10**6, 128, 224, 300.0, []),  # 32 a rank, as the paper had
        (256, 300, 1, 32, 32.0, ["global_batch_size: 256: a step takes 85 % of the 300 images, so others of an image's class"]),
        (256, 256, 1, 32, 32.0, ["global_batch_size: 256: a step takes 100 % of the 256 images"]),
        (
            256,
            10**6,
            16,
            32,
            32.0,
            ["global_batch_size: 256: is dealt to 16 ranks, 16 images each; it counts the images of all"],
        ),
        (
            256,
            1000,
            1,
            224,
            96.0,
            ["views.image_size: 224: is more than the images have: the median's short side is 96 pixels"],
        ),
        (16, 16, 8, 64, 32.0, ["global_batch_size: 16: a", "global_batch_size: 16: is dealt", "views.image_size: 64: is"]),
    ],
)
def test_what_is_seldom_meant_is_said_with_its_numbers(
    batch: int, samples: int, ranks: int, side: int, short_side: float | None, lines: list[str]
) -> None:
    said = list(doubts(Config(global_batch_size=batch), samples, ranks, side, short_side, on_cpu=True))
    assert len(said) == len(lines)
    for line, begin in zip(said, lines, strict=True):
        assert line.startswith(begin)


@pytest.mark.parametrize(
    ("key", "optim"), [("warmup_epochs", OptimConfig(warmup_epochs=1.0)), ("warmup_steps", OptimConfig(warmup_steps=10))]
)
def test_a_run_that_is_all_warm_up_names_the_key_that_decides(key: str, optim: OptimConfig) -> None:
    config = Config(global_batch_size=100, epochs=1.0, optim=optim)
    (line,) = doubts(config, 1000, 1, 32, None, on_cpu=True)
    assert line.startswith(f"optim.{key}: all 10 steps are warm-up")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_without_instructions_is_said(
    monkeypatch: pytest.MonkeyPatch, precision: Any, on_cpu: bool, able: bool
) -> None:
    monkeypatch.setattr("simclr_dist.config.together.has_bfloat16", lambda: able)
    said = list(doubts(Config(global_batch_size=256, precision=precision), 10**6, 1, 32, None, on_cpu=on_cpu))
    assert [line.split(": this")[0] for line in said] == ["precision: bf16"] * (precision == "bf16" and on_cpu and not able)


@given(*(st.integers(1, 40) for _ in range(3)), st.integers(0, 12), st.integers(0, 12))
def test_the_files_that_a_run_keeps(total: int, every: int, keep_last: int, keep_every: int, export_every: int) -> None:
    """Counted as they come and go."""
    keep = {"every": every, "keep_last": keep_last, "keep_every": keep_every, "export_every": export_every}
    there: list[int] = []
    most = 0
    for step in (step for step in range(1, total + 1) if step % every == 0 or step == total):
        there.append(step)
        most = max(most, len(there))
        there = [old for old in there if old in there[-keep_last:] or (keep_every and old % keep_every == 0)]
    exports = {step for step in range(1, total + 1) if step == total or (export_every and step % export_every == 0)}
    assert Config(checkpoint=CheckpointConfig(**keep)).files_kept(total) == (most, len(exports))


# Kept and compared


def test_to_dict_goes_through_yaml_and_json_and_back(file: Path) -> None:
    overrides = ["--views.crop_scale", "[0.2, 1]", "--optim.weight_decay", "1e-16", "--run_folder", "1e5", "--seed", str(2**63)]
    config = load_config(file, overrides)
    assert config_from_dict(config.to_dict(), "here") == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), "here") == config
    assert config_from_dict(read_yaml(write_yaml(config.to_dict()), "here"), "here") == config
    with pytest.raises(ConfigError, match=r"old run: optim\.lr_rul: unknown key; did you mean 'optim\.lr_rule'"):
        config_from_dict({"optim": {"lr_rul": "x"}}, "old run")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ("reader: stream", r"data\.samples: None must be set for data\.reader: stream"),
        ("reader: stream, samples: 0", r"data\.samples: 0 is too small"),
        ("reader: stream, samples: 9, window: 3", r"data\.window: 3 has no effect with data\.reader: stream"),
        (
            "reader: stream, samples: 9, shards: 'pipe:x'",
            r"data\.shards: 'pipe:x' runs a shell command; if you trust it, add --",
        ),
        ("shards: 's3://b/x', retry_minutes: 5", r"data\.retry_minutes: 5\.0 must be less than timeout_minutes, 5\.0"),
        ("shards: 's3://b/x', retry_minutes: 0", r"data\.retry_minutes: 0\.0 must be above 0"),
        ("shards: 's3://b/x', cache_gib: -1", r"data\.cache_gib: -1\.0 must be above 0"),
        ("shards: 'https://me:secret@b/x'", r"data\.shards: 'https://\*\*\*@b/x' holds a user, password, query or fragment"),
        ("shards: 'https://b/x?sig=secret'", r"data\.shards: 'https://b/x\?\*\*\*' holds a user, password, query or fragment"),
    ],
)
def test_data_settings_that_contradict_each_other(tmp_path: Path, values: str, line: str) -> None:
    (tmp_path / "c.yaml").write_text(LEAST.replace("shards: data/x", values if "shards" in values else f"shards: x, {values}"))
    with pytest.raises(ConfigError, match=rf"^[^\n]*{line}[^\n]*$") as caught:
        load_config(tmp_path / "c.yaml")
    assert "secret" not in str(caught.value)


def test_data_settings_that_go_together(tmp_path: Path) -> None:
    for values in (
        "shards: 's3://b/x', cache: /scratch, cache_gib: 5, retry_minutes: 2, window: 3",
        "shards: 'https://b/x-{0..9}.tar', reader: stream, samples: 9, shuffle_buffer: 5, cache: /scratch",
        "shards: 'pipe:cat x', reader: stream, samples: 9, allow_pipe: true",
        "shards: 'pipe:cat x', reader: stream, samples: 9",
    ):
        (tmp_path / "c.yaml").write_text(LEAST.replace("shards: data/x", values))
        load_config(tmp_path / "c.yaml", ["--data.allow-pipe", "true"] * ("pipe:" in values))


def test_a_file_cannot_allow_itself_shell_commands(file: Path) -> None:
    text = LEAST.replace("shards: data/x", "shards: 'pipe:cat x', reader: stream, samples: 9, allow_pipe: true")
    why = "true lets data.shards run shell commands, which no file may allow itself"
    line = f"{file}: data.allow_pipe: {why}; if you trust them, add --data.allow_pipe true"
    assert refusal(file, text) == line
    assert refusal(file, text, "--seed", "1") == line
    assert "'pipe:cat x' runs a shell command" in refusal(file, text, "--data.allow_pipe", "false")


IDLE = {
    "data: {shards: x, max_bad_samples: 5}": "data.max_bad_samples: 5 has no effect with data.on_bad_sample: error",
    "views: {jitter: 0, brightness: 0.4}": "views.brightness: 0.4 has no effect with views.jitter: 0",
    "views: {jitter: 0, contrast: 0.8}": "views.contrast: 0.8 has no effect with views.jitter: 0",
    "views: {jitter: 0, saturation: 0}": "views.saturation: 0.0 has no effect with views.jitter: 0",
    "views: {jitter: 0, hue: 0.1}": "views.hue: 0.1 has no effect with views.jitter: 0",
    "views: {blur: 0, blur_sigma: [1, 2]}": "views.blur_sigma: (1.0, 2.0) has no effect with views.blur: 0",
    "views: {preset: small, blur_sigma: [1, 2]}": "views.blur_sigma: (1.0, 2.0) has no effect with views.preset: small",
    "views: {preset: blog, blur_sigma: [1, 2]}": "views.blur_sigma: (1.0, 2.0) has no effect with views.preset: blog",
    "views: {image_size: 19, blur: 0.5}": "views.blur: 0.5 has no effect with views.image_size: 19, where a tenth",
    "views: {image_size: 19, blur_sigma: [1, 2]}": "views.blur_sigma: (1.0, 2.0) has no effect with views.image_size: 19",
    "model: {projector_depth: 1, projector_hidden: 8}": "model.projector_hidden: 8 has no effect with model.projector_depth: 1",
    "model: {projector_depth: 0, projector_hidden: 8}": "model.projector_hidden: 8 has no effect with model.projector_depth: 0",
    "model: {projector_depth: 0, projector_dim: 8}": "model.projector_dim: 8 has no effect with model.projector_depth: 0",
    "model: {projector_depth: 0, projector_batch_norm: false}": "model.projector_batch_norm: False has no effect with",
    "log: {tensorboard: false, views_every_epochs: 1}": "log.views_every_epochs: 1 has no effect with log.tensorboard: false",
}


def least_and(values: str) -> str:
    """The least config with another section, which may be its own."""
    return (LEAST.replace("data: {shards: data/x}\n", "") if values.startswith("data") else LEAST) + values


@pytest.mark.parametrize("values", IDLE)
def test_what_cannot_have_an_effect_is_refused(tmp_path: Path, file: Path, values: str) -> None:
    line = refusal(file, least_and(values))
    assert line.startswith(f"{file}: {IDLE[values]}")
    assert line.endswith("; leave it out, or change that")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    load_config(file, ["--run_folder", str(tmp_path / "run")])  # a run that was begun before this was refused goes on


@pytest.mark.parametrize(
    "values",
    [
        "views: {preset: small, blur: 0.5, blur_sigma: [1, 2]}",
        "views: {image_size: 20, blur_sigma: [1, 2]}",
        "views: {image_size: 16, blur: 0}",
        "views: {jitter: 0.1, hue: 0.1}",
        "model: {projector_depth: 1, projector_dim: 8}",
        "model: {projector_depth: 0}",
        "data: {shards: x, on_bad_sample: replace, max_bad_samples: 5}",
    ],
)
def test_what_has_an_effect_is_taken(file: Path, values: str) -> None:
    file.write_text(least_and(values))
    load_config(file)


def test_which_presets_blur() -> None:
    assert tuple(name for name, preset in PRESETS.items() if preset.blur) == BLURRING_PRESETS


# What another start of the same run may set anew: a setting is added here on purpose.
MAY_CHANGE_ON_RESUME = {
    "run_folder", "epochs", "steps", "max_skipped_steps", "check_ranks_every", "timeout_minutes", "first_step_timeout_minutes",
    "data.shards", "data.workers", "data.max_bad_samples", "data.in_memory", "data.cache", "data.cache_gib",
    "data.retry_minutes", "data.allow_pipe", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every",
    "checkpoint.export_every", "log.every", "log.tensorboard", "log.wandb", "log.mlflow", "log.trackio",
    "log.views_every_epochs", "probe.every_epochs", "probe.shards", "probe.images",
}  # fmt: skip


def test_what_may_change_on_resume_is_said_in_the_types_of_the_settings() -> None:
    assert may_change(Config) == MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("key", OPTIONS)
def test_difference_names_each_setting_that_decides_the_result(key: str) -> None:
    old = Config()
    value = leaves(old.to_dict())[key]
    new = {bool: not value, int: 99, float: 0.123, str: "other", type(None): 5, tuple: (0.1, 0.2)}[type(value)]
    expected = [] if key in MAY_CHANGE_ON_RESUME else [f"{key}: {value} -> {new}"]
    assert difference(old, changed(old, key, new)) == expected
    assert difference(old, old) == []


def test_what_decides_the_result_must_not_change() -> None:
    deciding = {
        "seed",
        "global_batch_size",
        "micro_batches",
        "precision",
        "data.window",
        "data.on_bad_sample",
        "loss.temperature",
    }
    of_sections = {key for key in OPTIONS if key.startswith(("views.", "model.", "optim."))}
    assert not (deciding | of_sections) & MAY_CHANGE_ON_RESUME


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.encoder", "timm/vit_smal_patch16_224"], ["model.encoder", "did you mean 'timm/vit_small_patch16_224'?"]),
        (["--model.encoder", "timm/test_vit", "--model.width", "2"], ["model.width: 2 has no effect on timm/test_vit"]),
        (["--model.encoder", "torchvision/swin_t", "--model.stem", "small"], ["model.stem: 'small' has no effect"]),
        (["--model.encoder", "timm/test_vit", "--model.init", "imagenet"], ["model.init", "torchvision's shape"]),
        (["--model.drop_path", "0.1"], ["model.drop_path: 0.1 has no effect on resnet50"]),
        (["--optim.betas", "[0.9, 0.95]"], ["optim.betas: (0.9, 0.95) has no effect on lars"]),
        (["--optim.name", "adamw", "--optim.betas", "[0.9, 1.0]"], ["optim.betas"]),
    ],
)
def test_settings_of_other_networks(file: Path, options: list[str], words: list[str]) -> None:
    line = refusal(file, LEAST, *options)
    assert all(word in line for word in words), line


def test_timm_is_named_where_it_is_missing(file: Path) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        names_of.cache_clear()
        line = refusal(file, LEAST, "--model.encoder", "timm/test_vit")
    names_of.cache_clear()
    assert line.endswith(": model.encoder: 'timm/test_vit' needs timm, which is not installed: pip install timm")
