"""Every shipped config says where it comes from, loads, and builds its model."""

import re
from pathlib import Path

import pytest
import torch

from simclr_dist.config.load import load_config
from simclr_dist.data.views.draws import PRESETS
from simclr_dist.method.optim import build_optimizer, parameter_groups
from simclr_dist.preflight.plan.report import make_plan, text
from simclr_dist.train.learner import build_shapes

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

shipped = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_there_are_configs() -> None:
    assert "demo" in [path.stem for path in CONFIGS]


@shipped
def test_its_header_claims_a_result_or_says_that_there_is_none(path: Path) -> None:
    text = header(path)
    assert re.search(r"^#\s*command:\s+\S", text, re.MULTILINE), f"{path.name}: the header names no command"
    assert re.search(r"^#\s*result:\s+\S", text, re.MULTILINE) or "not run" in text, f"{path.name}: no result, nor 'not run'"
    named = re.findall(r"configs/(\w+)\.yaml", text)
    assert set(named) <= {path.stem}, f"{path.name}: its command is that of another config"


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
    assert f"{2 * (config.global_batch_size - 1)}" in text(make_plan(config, samples=1_281_167))
