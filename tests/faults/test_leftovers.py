"""kill -9 in the middle of a write of each kind: what it leaves is gone after the next write or start, and nothing else."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

import training_runs as runs
from forkserver import Command, completed
from simclr_dist.cli import train
from simclr_dist.cli.main import main
from simclr_dist.system import files
from simclr_dist.system.files import remove_leftovers, replacing, write_atomically

EVAL = ["eval", "run/encoders/step-00000004.safetensors", "--train", "shards", "--test", "shards", "--workers", "0"]
EVAL += ["--protocols", "knn", "--no-baselines", "--features", "features"]


def killed_in(arguments: Sequence[str]) -> int:
    """`VERB ...` that is killed when a file whose name has the first argument in it is about to be on disk."""
    part, verb, *rest = arguments
    fsync = os.fsync

    def dies(descriptor: int) -> None:
        if part in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dies
    return verbs([verb, *rest])


def verbs(arguments: Sequence[str]) -> int:
    """A rank of the training, or any other verb."""
    return train.main(arguments[1:]) if arguments[0] == "train" else main(arguments)


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix == ".tmp" or ".partial" in path.name]


def kill(folder: Path, part: str, *command: str) -> None:
    done = completed(killed_in, [part, *command], folder, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert leftovers(folder), "it was killed in the middle"


def good(folder: Path, *command: str) -> None:
    done = completed(verbs, command, folder, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert leftovers(folder) == []


def test_a_run_and_its_evaluation_leave_nothing(tmp_path: Path) -> None:
    runs.make_shards(tmp_path, images=48)
    runs.write_config(tmp_path, Path("shards"), steps=4, checkpoint={"every": 2, "export_every": 2})
    # The encoder of step 2 is not written again: the run goes on from the checkpoint of that step.
    for part in (".config.yaml", ".env.json", ".step-00000002.pt", ".step-00000002.safetensors"):
        kill(tmp_path, part, "train", "config.yaml")
    good(tmp_path, "train", "config.yaml")
    for part in ("features/", "eval/.step-00000004.json", "eval/.step-00000004.html"):
        kill(tmp_path, part, *EVAL)
    good(tmp_path, *EVAL)


def test_a_conversion_leaves_nothing(tmp_path: Path) -> None:
    runs.make_shards(tmp_path, images=8)
    command = ["shard", "images", "other", "--processes", "1"]
    kill(tmp_path, "temporary", *command)
    kill(tmp_path, ".manifest.parquet", *command)
    kill(tmp_path, ".manifest.index", *command)
    good(tmp_path, *command)
    (tmp_path / "other/manifest.parquet").unlink()
    kill(tmp_path, ".manifest.parquet", "shard", "--index", "other")
    good(tmp_path, "shard", "--index", "other")
    (tmp_path / "other/manifest.index").unlink()
    runs.write_config(tmp_path, Path("other"), steps=4)
    kill(tmp_path, ".manifest.index", "plan", "config.yaml", "--global_batch_size", "8")
    good(tmp_path, "plan", "config.yaml", "--global_batch_size", "8")


def writing(arguments: Sequence[str]) -> int:
    """In the middle of a file until it is killed."""
    with replacing(Path(arguments[0])) as file:
        file.write(b"half")
        file.flush()
        print("there", flush=True)
        signal.pause()
    return 0


def test_only_what_killed_writers_left_goes(tmp_path: Path) -> None:
    others = ("x.0a1b2c3d.tmp", ".x.tmp", ".x.0A1B2C3D.tmp", ".x.0a1b2c3d4.tmp", ".x.0a1b2c3d.tmp.1", ".y.0a1b2c3d.tmp")
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.0000000d.tmp").mkdir()
    with Command(writing, [tmp_path / "x"]) as writer:
        assert writer.stdout.readline() == "there\n"
        before = set(tmp_path.iterdir())
        write_atomically(tmp_path / "x", b"whole")
        assert set(tmp_path.iterdir()) == before | {tmp_path / "x"}, "another writer is at work"
        writer.kill()
    write_atomically(tmp_path / "x", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".x.0000000d.tmp", "x"}
    remove_leftovers(tmp_path)
    assert not (tmp_path / ".y.0a1b2c3d.tmp").exists()


def test_a_temporary_file_that_is_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its creation and its lock."""
    taken: list[Path] = []

    def late(descriptor: int, **_: object) -> bool:
        if not taken:
            taken.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            taken[0].unlink()
        return True

    monkeypatch.setattr(files, "lock", late)
    write_atomically(tmp_path / "x", b"whole")
    assert taken
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
