"""Files for a group: whatever a verb writes has the mode that the umask leaves, and nothing less."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import training_runs as runs
from forkserver import completed
from simclr_dist.cli import train
from simclr_dist.cli.main import main
from simclr_dist.preflight.demo.images import write_demo_images

PROFILE = "nodes: 1\ngpus_per_node: 0\ntasks_per_node: 1\ntime: 01:00:00\n"
SBATCH = "#!/bin/sh\necho Submitted batch job 7\n"
ENCODER, SHARDS = (
    "run/encoders/step-00000002.safetensors",
    ("--train", "shards/train", "--test", "shards/test", "--workers", "0"),
)


def verbs(arguments: Sequence[str]) -> int:
    """Every verb that writes, one after the other, under this umask."""
    os.umask(int(arguments[0], 8))
    write_demo_images(Path("images"), train=24, test=0)
    os.environ["PATH"] = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    Path("bin").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": "", "squeue": ""}.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o777)
    Path("profile.yaml").write_text(PROFILE)
    commands = [
        ["shard", "images/train", "shards", "--split", "0.5/0.5", "--processes", "1"],
        ["shard", "images/train", "parts", "--part", "1/1", "--processes", "1"],
        ["submit", "config.yaml", "--profile", "profile.yaml", "--run_folder", "sent"],
        ["eval", ENCODER, *SHARDS, "--protocols", "knn", "--no-baselines", "--features", "features"],
        ["embed", ENCODER, "shards/test", "embedded.parquet", "--workers", "0"],
    ]
    for command in commands:
        if command[0] == "eval":
            assert train.main(["config.yaml"]) == 0
        assert main(command) == 0, command
    Path("shards/test/manifest.parquet").unlink()
    assert main(["shard", "--index", "shards/test"]) == 0
    return 0


@pytest.mark.parametrize("umask", ["002", "022", "077"])
def test_the_umask_alone_decides(tmp_path: Path, umask: str) -> None:
    runs.write_config(
        tmp_path, Path("shards/train"), steps=2, global_batch_size=4, log={"tensorboard": True}, checkpoint={"every": 1}
    )
    (tmp_path / "config.yaml").chmod(0o666 & ~int(umask, 8))
    done = completed(verbs, [umask], tmp_path, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    paths = [path for path in tmp_path.rglob("*") if path.parent.name != "bin" and not path.is_symlink()]
    modes = {path: (0o777 if path.is_dir() else 0o666) & ~int(umask, 8) for path in paths}
    found = {path: path.stat().st_mode & 0o777 for path in paths}
    assert {str(path): oct(mode) for path, mode in found.items() if mode != modes[path]} == {}
    assert {"heartbeat", "00000001.json", "config.yaml", "conversion.json", "submission.json"} <= {path.name for path in paths}
