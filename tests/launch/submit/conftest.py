"""A folder to submit from, and the programs that a submission meets."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_dist.cli.main import main
from simclr_dist.convert.shards import write_shards
from stand_ins import Answer, Command, StandIns

CONFIG = """
run_folder: run
global_batch_size: 8
steps: 3
device: cpu
data: {shards: shards, workers: 0}
views: {preset: small, image_size: 16}
model: {encoder: resnet10, stem: small_stride2, projector_hidden: 8, projector_dim: 4}
optim: {warmup_steps: 1}
"""

PROFILE = """
partition: main
nodes: 2
gpus_per_node: 0
tasks_per_node: 2
cpus_per_task: 3
time: 01:00:00
environment: {NCCL_DEBUG: it's $HOME, OMP_NUM_THREADS: 1}
"""


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """PATH holds one empty folder, and no variable of a SLURM is set."""
    stand_ins = StandIns(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(stand_ins.bin))
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "main")
    return stand_ins


@pytest.fixture
def slurm(no_slurm: StandIns) -> StandIns:
    """sbatch takes every job, which then runs until it is cancelled."""
    no_slurm.take_jobs()
    return no_slurm


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    random = np.random.default_rng(0)
    for k in range(24):
        path = folder / "images" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    write_shards(folder / "images", folder / "shards", shard_size=10, processes=1, progress=False)
    return folder / "shards"


@pytest.fixture
def here(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with config.yaml, profile.yaml and shards/."""
    folder = tmp_path / "it's here"
    shutil.copytree(shards, folder / "shards")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "profile.yaml").write_text(PROFILE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """`simclr-dist submit ARGUMENTS` in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        try:
            code = main(["submit", *map(str, arguments)])
        except SystemExit as ended:
            code = 2 if ended.code is None else int(ended.code)
        return code, *capfd.readouterr()

    return run
