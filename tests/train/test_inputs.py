"""What a run cannot begin with: every door says the same line, and there is no run folder behind it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training_runs as runs
from simclr_dist.cli import train
from simclr_dist.cli.main import main
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import DataConfig
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.launch import torchrun
from simclr_dist.method.distributed import World
from simclr_dist.preflight.check import disks
from simclr_dist.system.errors import ConfigError, DataError
from simclr_dist.train.images import open_images
from simclr_dist.train.inputs import check_inputs
from simclr_dist.train.state import data_identity

PROFILE = "{partition: main, nodes: 1, gpus_per_node: 0, tasks_per_node: 2, cpus_per_task: 1, time: '10'}"
STREAM = {"reader": "stream", "samples": 205, "window": DataConfig.window}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no probe": ({"probe": {"every_epochs": 1, "shards": "nowhere"}}, "nowhere: no such folder of shards; "),
    "a probe of training images": (
        {"probe": {"every_epochs": 1, "shards": "RGB"}}, "0 labelled images that the run does not train on (205 that it does)",
    ),
    "a probe of another kind": ({"probe": {"every_epochs": 1, "shards": "GRAY"}}, ": its images have 1 channel of 8 bits, "),
    "images of another kind": ({"data": {"shards": "GRAY"}}, ": its images have 1 channel of 8 bits, and "),
    "no tars": ({"data": {**STREAM, "shards": "gone-{0..9}.tar"}}, "gone-0.tar: no such tar; "),
    "few tars": ({"data": {**STREAM, "shards": "RGB/shard-{000000..000002}.tar", "workers": 4}}, "3 tars are too few for "),
    "no start weights": ({"model": {"init": "file", "init_file": "gone.pt"}}, "model.init_file: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    gray = tmp_path_factory.mktemp("gray")
    for k in range(24):
        (gray / "images/a").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (18, 18), dtype=np.uint8)
        Image.fromarray(pixels).save(gray / f"images/a/{k}.png")
    assert main(["shard", f"{gray}/images", f"{gray}/shards", "--channels", "1", "--processes", "1"]) == 0
    return {"RGB": str(runs.make_shards(tmp_path_factory.mktemp("rgb"))), "GRAY": f"{gray}/shards"}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its line. The folder of the test has config.yaml with that fault, and profile.yaml."""
    monkeypatch.chdir(tmp_path)
    changes, line = FAULTS[request.param]
    changes = {section: dict(values) for section, values in changes.items()}
    for values in changes.values():
        where, slash, tars = values.get("shards", "").partition("/")
        values |= {"shards": sets[where] + slash + tars} if where in sets else {}
    runs.write_config(tmp_path, Path(sets["RGB"]), **changes)
    Path("profile.yaml").write_text(PROFILE)
    return line


def test_train_and_submit_refuse_it_before_there_is_anything(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also `submit --dry-run`, and each rank of a torchrun that was typed."""
    monkeypatch.setattr(torchrun, "supervise", lambda *_, **__: pytest.fail("something was started"))
    for start in (
        lambda: main(["train", "config.yaml", "--processes", "2"]),
        lambda: main(["submit", "config.yaml", "--profile", "profile.yaml", "--dry-run"]),
        lambda: train.main(["config.yaml"]),
    ):
        capsys.readouterr()
        assert start() == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert fault in said.err
        assert not Path("run").exists()


def test_check_says_it(fault: str) -> None:
    config, one = load_config("config.yaml"), World(0, 1, 0, torch.device("cpu"))
    for findings in (disks.shards(config, one), disks.folder(config, one, 1000.0, 1000.0)[0]):
        [finding] = findings
        assert finding.level == "failure"
        assert fault in finding.seen


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_of_other_images_goes_into_no_queue(
    stream: bool, sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same ones pass, also where nobody knows which they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchrun, "supervise", lambda *_, **__: pytest.fail("something was started"))
    tars = {**STREAM, "shards": f"{sets['RGB']}/shard-{{000000..000005}}.tar"}
    config = load_config(runs.write_config(tmp_path, Path(sets["RGB"]), **({"data": tars} if stream else {})))
    Path("profile.yaml").write_text(PROFILE)
    Path("run").mkdir()
    Path("run/config.yaml").write_text(write_yaml(config.to_dict()))
    submit = ["submit", "config.yaml", "--profile", "profile.yaml", "--dry-run"]
    one = World(0, 1, 0, torch.device("cpu"))
    for known, code in (("other", 2), (data_identity(open_images(config, one)), 0), (0, 0)):
        Path("run/env.json").write_text(json.dumps({"data_digest": known}))
        assert main(submit) == code
        assert ("holds other images than the run began with; name another" in capsys.readouterr().err) == (code == 2)
    Path("run/env.json").write_text(json.dumps({"data_digest": "other"}))
    assert main(["train", "config.yaml", "--processes", "2"]) == 2
    [finding] = disks.shards(config, one)
    assert "holds other images than the run began with" in finding.seen


def test_relative_paths_start_from_the_folder_of_the_job(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that goes on needs its start weights no more."""
    monkeypatch.chdir(tmp_path)
    beside, weights = Path(sets["RGB"]).parent, Path(sets["RGB"]) / "shard-000000.tar"  # no weights, but a file
    tars = {**STREAM, "shards": "shards/shard-{000000..000005}.tar"}
    start = {"model": {"init": "file", "init_file": str(weights.relative_to(beside))}}
    probe = {"probe": {"every_epochs": 1, "shards": "shards"}}
    for changes in (start, {"data": tars}):
        config = load_config(runs.write_config(tmp_path, Path("shards"), **changes))
        assert check_inputs(config, 1, beside=beside) == 205
        with pytest.raises(DataError, match="no such"):
            check_inputs(config, 1)
    with pytest.raises(ConfigError, match="205 that it does"):
        check_inputs(load_config(runs.write_config(tmp_path, Path(sets["RGB"]), **probe)), 1, beside=beside)
    config = load_config(runs.write_config(tmp_path, Path(sets["RGB"]), model={"init": "file", "init_file": "gone.pt"}))
    with pytest.raises(ConfigError, match="no such file; name one"):
        check_inputs(config, 1)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/step-00000002.json").write_text("{}")
    assert check_inputs(config, 1) == 205
