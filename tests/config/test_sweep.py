"""A sweep: names that are stable and apart, and all combinations checked before anything starts."""

import re
from pathlib import Path

import pytest

from simclr_dist.config.load import load_config
from simclr_dist.config.sweep import MOST, read_sweep
from simclr_dist.system.errors import ConfigError

CONFIG = "{run_folder: runs/mine, global_batch_size: 8, steps: 3, data: {shards: s}}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def names(config: Path, *sweeps: str) -> list[str]:
    return [member.name for member in read_sweep(config, [], sweeps)]


def test_each_combination_is_a_run_in_the_sweeps_folder(config: Path) -> None:
    members = read_sweep(config, ["--log.every", "5"], ["optim.base-lr=0.1,0.3", "seed=0, 1"])
    assert [member.name for member in members] == [f"base_lr={rate}+seed={seed}" for rate in ("0.1", "0.3") for seed in (0, 1)]
    for member in members:
        assert member.config.run_folder == f"runs/mine/{member.name}"
        assert load_config(config, member.overrides) == member.config, "what a rank reads"
    last = members[-1].config
    assert (last.optim.base_lr, last.seed, last.log.every) == (0.3, 1, 5)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("optim.base_lr=.1,1e-6,3", ["base_lr=0.1", "base_lr=1e-06", "base_lr=3.0"]),
        ("optim.warmup_steps=null,3", ["warmup_steps=null", "warmup_steps=3"]),
        ("loss.decoupled=true,false", ["decoupled=true", "decoupled=false"]),
        ("views.crop_scale=[0.2, 1.0],[0.08,1]", ["crop_scale=0.2_1.0", "crop_scale=0.08_1.0"]),
        ("views.preset=small,blog", ["preset=small", "preset=blog"]),
        ("seed=7", ["seed=7"]),
    ],
)
def test_names_have_the_values_as_they_are_read(config: Path, sweep: str, expected: list[str]) -> None:
    assert names(config, sweep) == expected


def test_what_cannot_stand_in_a_name_is_replaced_and_stays_apart(config: Path) -> None:
    long = "x" * 300
    made = names(config, f"data.shards=a/b,a-b,a:b,../a b,{long}1,{long}2,ä%$")
    assert made[1] == "shards=a-b"
    assert len(set(made)) == 7
    for name in made:
        assert re.fullmatch(r"[A-Za-z0-9._+=~-]{1,80}", name)
    assert made == names(config, f"data.shards=a/b,a-b,a:b,../a b,{long}1,{long}2,ä%$"), "and they are stable"
    assert names(config, "data.shards=a/b")[0] == made[0], "whatever else is swept"
    many = ["model.projector_hidden=1111", "model.projector_depth=3", "views.brightness=0.123456", "views.saturation=0.1234567"]
    [name] = names(
        config, *many, "views.contrast=0.1234567", "optim.weight_decay=0.1234567", "optim.trust_coefficient=0.1234567"
    )
    assert len(name) < 160


def test_keys_with_one_last_part_are_named_in_full(config: Path) -> None:
    sweeps = ["log.every=5,6", "checkpoint.every=7"]
    assert names(config, *sweeps) == ["log.every=5+checkpoint.every=7", "log.every=6+checkpoint.every=7"]


@pytest.mark.parametrize(
    ("sweeps", "line"),
    [
        (["optim.base_lr"], "--sweep: 'optim.base_lr' names no values; write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"),
        (["=3"], "--sweep: '=3' names no values; write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"),
        (["seed="], "--sweep: 'seed=' has an empty value; write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"),
        (["seed=1,,2"], "--sweep: 'seed=1,,2' has an empty value; write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"),
        (["seed=1,"], "--sweep: 'seed=1,' has an empty value; write KEY=VALUE,VALUE, like optim.base_lr=0.1,0.3"),
        (["seed=1,2,1"], "--sweep: 'seed=1,2,1' has a value twice; leave one out"),
        (["optim.base_lr=0.1,.10"], "--sweep: optim.base_lr: 0.1 and .10 are the same value; leave one out"),
        (["seed=1", "seed=2"], "--sweep: seed: is set twice; name its values once, in --sweep alone"),
        (["steps=3,4"], "--sweep: steps: is set twice; name its values once, in --sweep alone"),
        (
            ["run_folder=a,b"],
            "--sweep: run_folder: each run gets a folder of its own in the sweep's; sweep another setting",
        ),
        (["run-folder=a"], "--sweep: run_folder: each run gets a folder of its own in the sweep's; sweep another setting"),
        (
            ["optim.lr=0.1,0.2"],
            "--sweep: optim.lr=0.1: command line: optim.lr: unknown key; did you mean 'optim.base_lr'?",
        ),
        (["seed=1,x"], "--sweep: seed=x: command line: seed: 'x' is not a whole number"),
        (
            ["seed=1,2", "micro_batches=1,3"],
            "--sweep: seed=1, micro_batches=3: {config} with the command line: micro_batches: 3",
        ),
        (["seed=[1,2"], "--sweep: seed=[1: command line: --seed: not valid YAML"),
        (
            [f"seed={','.join(map(str, range(MOST + 1)))}"],
            f"--sweep: {MOST + 1} runs, and {MOST} are the most; leave out values",
        ),
    ],
)
def test_what_is_refused(config: Path, sweeps: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_sweep(config, ["--steps", "3"], sweeps)
    assert str(refused.value).startswith(line.format(config=config))
