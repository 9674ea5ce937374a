"""Every shipped config is a recipe: a claim with its command, hardware and result, and the settings that differ."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves
from simclr_dist.data.views.draws import PRESETS
from simclr_dist.method.optim import build_optimizer, parameter_groups
from simclr_dist.preflight.plan.report import make_plan, text
from simclr_dist.train.learner import build_shapes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
IMAGENET = 1_281_167
ALWAYS_THERE = ("run_folder", "global_batch_size", "data.shards")  # what a copy changes first

shipped = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_there_are_configs() -> None:
    assert "demo" in [path.stem for path in CONFIGS]


@shipped
@pytest.mark.parametrize("part", ["command", "hardware", "result"])
def test_its_header_is_a_claim(path: Path, part: str) -> None:
    assert re.search(rf"^#   {part}: +\S", header(path), re.MULTILINE), f"{path.name}: the header has no line '{part}:'"


@shipped
def test_a_result_was_measured_or_says_that_it_is_not_ours(path: Path) -> None:
    """What is on a GPU was not run: hours are the plan's or the literature's, and both are said."""
    time, result = (header(path).partition(f"{part}: ")[2].strip() for part in ("time", "result"))
    if load_config(path).device == "cpu":
        assert "not run" not in result
        assert "measured" in time or path.stem == "demo"
    else:
        assert result.startswith("not run")
        assert time.startswith("not run")
        assert "by `plan`" in time.lower().replace("\n#", " ")
        assert "assumed" in time


@shipped
def test_its_commands_are_its_own_and_can_run(path: Path) -> None:
    """The settings that its header adds are settings, alone and beside the file's."""
    said = header(path)
    named = set(re.findall(r"(?:train|plan|submit) configs/(\w+)\.yaml", said))
    assert named <= {path.stem}, f"{path.name}: its command is that of another config"
    assert named or path.stem == "demo"
    for option, value in re.findall(r"--([a-z_]+(?:\.[a-z_]+)?) ([^\s,;:)]+)", said):
        if option in dict(leaves(Config().to_dict())):
            config = load_config(path, [f"--{option}", value])
            make_plan(config, samples=IMAGENET)


@shipped
def test_it_says_what_differs_from_the_defaults_and_no_more(path: Path) -> None:
    plain = dict(leaves(Config().to_dict()))
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        value = float(value) if isinstance(value, str) and isinstance(plain[key], float) else value  # PyYAML's 3e-4
        assert key in ALWAYS_THERE or value != plain[key], f"{path.name}: {key} has its default; leave it out"


@shipped
def test_it_loads_and_its_own_run_folder_is_its(path: Path) -> None:
    config = load_config(path)
    assert Path(config.run_folder) == Path("runs") / path.stem
    assert config.optim.clip_norm > 0, "clipping is on in every shipped config"


@shipped
def test_it_builds_its_model_and_optimizer(path: Path) -> None:
    config = load_config(path)
    model = build_shapes(config)
    size = config.views.image_size or PRESETS[config.views.preset].image_size
    z = model.projector(model.encoder(torch.empty(4, 3, size, size, device="meta")))
    assert z.shape == (4, config.model.projector_dim if config.model.projector_depth else model.encoder.feature_size)
    groups = parameter_groups(model, config.optim.weight_decay)
    optimizer = build_optimizer(config.optim.name, groups, lr=config.peak_lr, momentum=config.optim.momentum)
    assert len(optimizer.param_groups) == 2


@shipped
def test_it_can_be_planned(path: Path) -> None:
    config = load_config(path)
    assert f"{2 * (config.global_batch_size - 1)}" in text(make_plan(config, samples=IMAGENET))


def test_the_guide_lists_them_all_in_one_table() -> None:
    section = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| \[`?(\w+)`?\]\(\.\./configs/(\w+)\.yaml\)", section, re.MULTILINE)
    assert [name for name, _ in listed] == [file for _, file in listed]
    assert sorted({file for _, file in listed}) == [path.stem for path in CONFIGS]
