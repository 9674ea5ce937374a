"""A run folder without room, or on a disk that cannot be written: refused in one line before anything begins."""

from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from faults.small_disk import SmallDisk
from simclr_dist.cli.main import main
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import CheckpointConfig, Config
from simclr_dist.launch import torchrun as launcher
from simclr_dist.run.folder import check_room
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.state import saved_bytes

MIB = 2**20


def run_on(disk: SmallDisk, **keep: Any) -> Config:
    return Config(run_folder=str(disk.path / "runs" / "x"), checkpoint=CheckpointConfig(every=5, **keep))


@pytest.mark.parametrize("small_disk", [5 * 256], indirect=True)
def test_room_is_that_of_all_files_that_lie_there_at_a_time(small_disk: SmallDisk) -> None:
    """On 5 MiB: the newest checkpoints, one that is being written, and the encoders."""
    check_room(run_on(small_disk, keep_last=3), 100, 1.0 * MIB, 1.0 * MIB)
    check_room(run_on(small_disk, keep_last=9), 15, 1.0 * MIB, 2.0 * MIB)
    with pytest.raises(ConfigError) as caught:
        check_room(run_on(small_disk, keep_last=4), 100, 1.0 * MIB, 1.0 * MIB)
    assert str(caught.value) == (
        f"run_folder: '{small_disk.path}/runs/x': its files need 6.0 MiB (checkpoints 5 x 1.0 MiB, encoders 1 x 1.0 MiB), and"
        " the disk has 5.0 MiB for them; make room, or lower checkpoint.keep_last"
    )
    with pytest.raises(ConfigError, match=r"need 7\.0 MiB"):
        check_room(run_on(small_disk, export_every=34), 100, 1.0 * MIB, 1.0 * MIB)


@pytest.mark.parametrize("small_disk", [5 * 256], indirect=True)
def test_what_the_run_has_saved_is_room_for_what_replaces_it(small_disk: SmallDisk) -> None:
    config = run_on(small_disk, keep_last=3)
    checkpoints = Path(config.run_folder, "checkpoints")
    checkpoints.mkdir(parents=True)
    for step in (5, 10, 15):
        (checkpoints / f"step-{step:08d}.pt").write_bytes(bytes(MIB))
        (checkpoints / f"step-{step:08d}.json").touch()
    check_room(config, 100, 1.0 * MIB, 1.0 * MIB)
    small_disk.fill(leave=256)
    with pytest.raises(ConfigError, match=r"the disk has 4\.0 MiB for them"):
        check_room(config, 100, 1.0 * MIB, 1.0 * MIB)
    check_room(config, 15, 1.0 * MIB, 1.0 * MIB)  # nothing is left to write


@pytest.mark.parametrize("small_disk", [5 * 256], indirect=True)
def test_folders_on_two_disks_have_room_of_their_own(small_disk: SmallDisk, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk.path)
    config = Config(run_folder=str(run), checkpoint=CheckpointConfig(every=5, keep_last=4))
    check_room(config, 100, 1.0 * MIB, 9.0 * MIB)
    with pytest.raises(ConfigError, match=r"need 6\.2 MiB"):
        check_room(config, 100, 1.25 * MIB, 9.0 * MIB)


@pytest.mark.parametrize("small_disk", [4 * 256], indirect=True)
def test_training_refuses_before_it_has_written_anything(
    small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real sizes of its files, on the rank; nobody starts it again."""
    monkeypatch.chdir(tmp_path)
    run = small_disk.path / "run"
    path = runs.write_config(tmp_path, runs.make_shards(tmp_path), run_folder=str(run))
    assert main(["train", str(path), "--processes", "1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"simclr-dist: run_folder: '{run}': its files need 6.0 MiB (checkpoints 2 x 2.4 MiB, encoders 1 x 1.2"
    )
    assert not run.exists()
    assert main(["train", str(path), "--processes", "1", "--steps", "4"]) == 0, capfd.readouterr().err
    size = (run / "checkpoints/step-00000004.pt").stat().st_size
    checkpoint, encoder = saved_bytes(load_config(path))
    assert 0.96 * size < checkpoint < size, "what it counts with is a little less than the files, never more"
    exported = sum(path.stat().st_size for path in (run / "encoders").iterdir())
    assert 0.96 * exported < encoder < exported


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_folder_that_cannot_be_written_starts_no_rank(
    small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], begun: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("a rank was started"))
    run = small_disk.path / "runs" / "x"
    path = runs.write_config(tmp_path, runs.make_shards(tmp_path, images=30), run_folder=str(run))
    (run if begun else small_disk.path).mkdir(parents=True, exist_ok=True)
    small_disk.set_read_only(True)
    assert main(["train", str(path), "--processes", "2"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    if begun:
        assert line == f"simclr-dist: {run}: is no folder that you can read and write; mend that, or move it elsewhere"
    else:
        assert line == (
            f"simclr-dist: run_folder: '{run}' cannot be made: '{small_disk.path}' is no folder that you can write to, or its"
            " disk is read-only; name another"
        )
