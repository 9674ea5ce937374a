"""A folder from elsewhere: what lies in it runs only what the command line allows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import simclr_dist
import training_runs as runs
from simclr_dist.encoder.names import encoder_path

PROGRAM = Path(sys.executable).with_name("simclr-dist")
ALLOWED = ("--data.allow_pipe", "true")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed program, in a folder."""
    return subprocess.run([PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=240)


def pipe_config(folder: Path, shards: Path) -> Path:
    """A config that runs a command for each tar, and says itself that it may."""
    (folder / "tools").mkdir()
    (folder / "tools/show.py").write_text("import sys, beside\nbeside.copy(sys.argv[1])\n")
    (folder / "tools/beside.py").write_text("import sys\ndef copy(path): sys.stdout.buffer.write(open(path, 'rb').read())\n")
    where = f"pipe:touch ran; {sys.executable} tools/show.py {shards}/shard-{{000000..000005}}.tar"
    data = {"shards": where, "reader": "stream", "samples": 205, "window": 16, "allow_pipe": True}
    return runs.write_config(folder, shards, data=data)


@pytest.mark.slow
def test_a_config_runs_its_commands_only_when_that_is_typed(tmp_path: Path, shards: Path) -> None:
    """At the start, when the run goes on, and from the config in its folder."""
    config = pipe_config(tmp_path, shards)
    for path, steps in ((str(config), "2"), ("run/config.yaml", "3")):
        refused = command(tmp_path, "train", path)
        assert refused.returncode == 2, refused
        assert refused.stderr.startswith(f"simclr-dist: {path}: data.allow_pipe: true lets data.shards run shell commands")
        assert refused.stderr.count("\n") == 1
        assert not (tmp_path / "ran").exists()
        trained = command(tmp_path, "train", path, *ALLOWED, "--steps", steps)
        assert trained.returncode == 0, trained.stderr
        (tmp_path / "ran").unlink()
    encoder, images = str(encoder_path(tmp_path / "run", 3)), str(shards)
    assert command(tmp_path, "eval", encoder, "--train", images, "--test", images, "--protocols", "knn").returncode == 0
    assert command(tmp_path, "embed", encoder, images, "features.parquet").returncode == 0
    assert not (tmp_path / "ran").exists(), "shards of their own"


@pytest.mark.slow
def test_no_module_beside_a_config_is_taken_for_a_package(tmp_path: Path, shards: Path) -> None:
    """By the ranks, by torchrun, and by the processes that read."""
    runs.write_config(tmp_path, shards, data={"workers": 1})
    for name in ("torch", "numpy", "yaml", "multiprocessing", "random", "PIL", "simclr_dist"):
        (tmp_path / f"{name}.py").write_text("open('planted', 'w')\n")
    trained = command(tmp_path, "train", "config.yaml", "--processes", "2")
    converted = command(tmp_path, "shard", str(shards.parent / "images"), "converted", "--processes", "2")
    assert not (tmp_path / "planted").exists()
    assert (trained.returncode, converted.returncode) == (0, 0), trained.stderr + converted.stderr


def test_a_clone_that_is_not_installed_starts_its_own_package(tmp_path: Path) -> None:
    """By `python -m`, also where another one is installed."""
    shutil.copytree(Path(simclr_dist.__file__).parent, tmp_path / "simclr_dist", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import os, subprocess, sys\nsys.path[0] = os.getcwd()\nfrom simclr_dist.cli.main import main\n"
        "try:\n    main(['--nonsense'])\nexcept SystemExit:\n    pass\n"
        "subprocess.run([sys.executable, '-c', 'import simclr_dist; print(simclr_dist.__file__)'], check=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == [str(tmp_path / "simclr_dist/__init__.py")], done.stderr
