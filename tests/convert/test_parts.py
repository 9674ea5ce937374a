"""Conversions that stop and go on, and conversions in parts: the bytes of one straight run, or one line that says why not."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pictures import contents, encoded
from simclr_dist.cli.main import main
from simclr_dist.convert import decoding, writing
from simclr_dist.convert.partial import Partial, hold
from simclr_dist.convert.shards import ShardSettings, _Conversion, finish_shards, write_part, write_shards
from simclr_dist.convert.sources import archives
from simclr_dist.system.errors import ConfigError, DataError

SCRIPT = Path(__file__).parents[2] / "launch" / "shard_array.sbatch"
SETTINGS = ShardSettings(shard_size=50, seed=3, split=(0.8, 0.2))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """500 images in two classes: 4 chunks; a bad one, some converted, some twice."""
    for i in range(500):
        path = tmp_path / "src" / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad" if i == 77 else encoded(i % 480, mode="P" if i % 10 == 3 else "RGB"))
    return tmp_path / "src"


def convert(source: Path, out: Path, **changes: Any) -> dict[str, bytes]:
    write_shards(source, out, **{**SETTINGS.__dict__, "processes": 1, **changes})
    return contents(out)


class KillError(BaseException):
    """Ends a run as a kill does: nothing is cleaned up, which BaseException is not caught for."""


@pytest.mark.parametrize("moment", ["first unit", "last unit", "records", "first tar", "rows", "last tar", "manifest"])
def test_a_stopped_conversion_goes_on(tmp_path: Path, source: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = convert(source, tmp_path / "straight")
    puts = {"first unit": 1, "last unit": 7, "records": 8, "first tar": 9, "rows": 10, "last tar": 27}
    done = 0
    real = decoding.put

    def put(temporary: Path, path: Path) -> None:
        nonlocal done
        done += 1
        if done == puts.get(moment):
            raise KillError
        real(temporary, path)

    def write_manifests(*_: object) -> int:
        raise KillError

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "put", put)
        patch.setattr(writing, "put", put)
        if moment == "manifest":
            patch.setattr("simclr_dist.convert.shards.write_manifests", write_manifests)
        with pytest.raises(KillError):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in contents(tmp_path / "out.partial")}
    kept: dict[str, int] = {}

    def look(*arguments: Any) -> int:
        folder = tmp_path / "out.partial"
        kept.update({name: (folder / name).stat().st_mtime_ns for name in before if (folder / name).exists()})
        return int(writing.write_manifests(*arguments))

    monkeypatch.setattr("simclr_dist.convert.shards.write_manifests", look)
    assert convert(source, tmp_path / "out") == straight
    assert not (tmp_path / "out.partial").exists()
    again = [name for name, when in kept.items() if before[name] != when]
    half = {"rows": "out/train/shard-000000.tar", "last unit": "units/000003.bytes"}.get(moment)  # the first of two files
    assert set(again) <= {"records.arrow", half}, "what was done is not done again"


def stop(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that ends after its first pass."""

    def killed(*_: object) -> None:
        raise KillError

    with monkeypatch.context() as patch:
        patch.setattr("simclr_dist.convert.shards.gather", killed)
        with pytest.raises(KillError):
            convert(source, out)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed 3, not 4"),
        ({"quality": 90}, "quality 95, not 90"),
        ({"split": None}, "split [0.8, 0.2], not None"),
        ({"shard_size": 60}, "shard_size 50, not 60"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, source: Path, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(source, tmp_path / "out", monkeypatch)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(DataError, match="holds an unfinished conversion") as caught:
        convert(source, tmp_path / "out", **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out.partial") == before


def test_another_source_is_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(source, tmp_path / "out", monkeypatch)
    (source / "cat" / "new.png").write_bytes(encoded())
    with pytest.raises(DataError, match=r"other images \(or in another order\)"):
        convert(source, tmp_path / "out")
    (source / "cat" / "new.png").unlink()
    changed = source / "dog" / "481.png"
    changed.write_bytes(encoded(999))
    with pytest.raises(DataError, match=r"after it: has changed since the conversion in .*out.partial was begun"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    shutil.rmtree(tmp_path / "out.partial")
    convert(source, tmp_path / "out")


def test_a_unit_that_was_damaged_is_made_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(source, tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / "units" / "000001.arrow").write_bytes(b"half")
    assert convert(source, tmp_path / "out") == convert(source, tmp_path / "straight")


@pytest.mark.parametrize("gone", [False, True])
def test_an_image_that_changes_between_the_passes(
    tmp_path: Path, source: Path, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoding.gather

    def gather(*arguments: Any) -> decoding.Records:
        path = source / "dog" / "001.png"
        path.unlink() if gone else path.write_bytes(encoded(999))
        return real(*arguments)

    monkeypatch.setattr("simclr_dist.convert.shards.gather", gather)
    with pytest.raises(DataError, match=r"001.png: changed, or went, while it was being sharded"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what others wrote


def a_file(partial: Path) -> None:
    partial.write_text("years of work")


def a_link(partial: Path) -> None:
    (partial.parent / "elsewhere").mkdir()
    (partial.parent / "elsewhere" / "thesis.txt").write_text("years of work")
    partial.symlink_to("elsewhere")


def a_folder(partial: Path) -> None:
    (partial / "out").mkdir(parents=True)
    (partial / "out" / "thesis.txt").write_text("years of work")


def one_with_a_lock(partial: Path) -> None:
    a_folder(partial)
    (partial / "lock").touch()


def one_with_settings(partial: Path) -> None:
    one_with_a_lock(partial)
    (partial / "settings.json").write_text("[]")


FOREIGN = [a_file, a_link, a_folder, one_with_a_lock, one_with_settings]


def everything(folder: Path) -> dict[str, bytes]:
    """All files that were there before a run. Its own scaffolding holds none but an empty lock."""
    return {str(path): path.read_bytes() for path in [folder, *folder.rglob("*")] if path.is_file()}


@pytest.mark.parametrize("make", FOREIGN)
def test_a_foreign_partial_is_refused_and_left_alone(tmp_path: Path, source: Path, make: Callable[[Path], None]) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    make(partial)
    before = everything(partial)
    says = r"^\S*out\.partial\S*: (is in the way and was not made by .*|.* conversion with .*|cannot be read; .*)$"
    for act in (lambda: convert(source, out), lambda: write_part(source, out, SETTINGS, 1, 2, processes=1)):
        with pytest.raises(DataError, match=says):
            act()
        assert before.items() <= everything(partial).items()
    assert not out.exists()


@pytest.mark.parametrize("make", FOREIGN)
def test_a_finished_conversion_leaves_a_foreign_partial_alone(
    tmp_path: Path, source: Path, make: Callable[[Path], None]
) -> None:
    convert(source, tmp_path / "out")
    make(tmp_path / "out.partial")
    before = everything(tmp_path / "out.partial")
    assert write_shards(source, tmp_path / "out", **SETTINGS.__dict__, processes=1).already
    assert before.items() <= everything(tmp_path / "out.partial").items()


def test_a_file_that_a_user_put_into_the_partial_stays(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(source, tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == {"notes.txt": b"mine"}


def test_a_finished_conversion_does_not_take_the_partial_of_a_run_at_work(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    about = _Conversion(source, tmp_path / "out", SETTINGS, parts=1, processes=1, progress=False).about
    with hold(tmp_path / "out", about) as partial:
        assert write_shards(source, tmp_path / "out", **SETTINGS.__dict__, processes=1).already
        assert partial.settings.exists()


@pytest.mark.parametrize("steps", range(8))
def test_what_a_killed_removal_leaves_is_removed_by_the_next_run(
    tmp_path: Path, source: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {"rmtree": shutil.rmtree, "unlink": Path.unlink, "rmdir": Path.rmdir}
    done = 0

    def killed(name: str) -> Callable[..., None]:
        def act(path: Path, **options: Any) -> None:
            nonlocal done
            if removing and done == steps:
                raise KillError
            done += removing
            real[name](path, **options)  # type: ignore[operator]

        return act

    def remove(partial: Partial) -> None:
        nonlocal removing
        removing = True
        remove_all(partial)

    removing, remove_all = False, Partial.remove
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "remove", remove)
        patch.setattr(shutil, "rmtree", killed("rmtree"))
        patch.setattr(Path, "unlink", killed("unlink"))
        patch.setattr(Path, "rmdir", killed("rmdir"))
        with pytest.raises(KillError):
            convert(source, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    assert write_shards(source, tmp_path / "out", **SETTINGS.__dict__, processes=1).already
    assert not (tmp_path / "out.partial").exists()


# ---- parts


def test_parts_give_the_bytes_of_one_run(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    for done, part in enumerate((3, 1, 2), 1):
        summary = write_part(source, out, SETTINGS, part, 3, processes=1)
        assert summary.parts_done == done
        assert summary.bad == (part == 3)
        assert not out.exists()
    again = write_part(source, out, SETTINGS, 2, 3, processes=1)
    assert (again.good, again.parts_done) == (128, 3)
    finished = finish_shards(source, out, SETTINGS, processes=1)
    assert (finished.written, len(finished.rejected)) == (499, 1)
    assert contents(out) == convert(source, tmp_path / "straight")
    assert not (tmp_path / "out.partial").exists()


def test_parts_of_a_tar(tmp_path: Path, source: Path) -> None:
    with tarfile.open(tmp_path / "src.tar", "w") as tar:
        tar.add(source, "src")
    for part in (1, 2, 3, 4, 5, 6):  # more than there are chunks
        write_part(tmp_path / "src.tar", tmp_path / "out", SETTINGS, part, 6, processes=1)
    finish_shards(tmp_path / "src.tar", tmp_path / "out", SETTINGS, processes=1)
    assert contents(tmp_path / "out") == convert(tmp_path / "src.tar", tmp_path / "straight")


def test_parts_that_are_missing_or_do_not_fit_are_named(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="there are no parts of it; begin with --part 1/N"):
        finish_shards(source, out, SETTINGS)
    assert not (tmp_path / "out.partial").exists()
    write_part(source, out, SETTINGS, 2, 4, processes=1)
    with pytest.raises(DataError, match="of 4 parts these are not done: 1, 3, 4; run each, like --part 1/4"):
        finish_shards(source, out, SETTINGS)
    other = ShardSettings(shard_size=50, seed=3, split=(0.8, 0.2), short_side=64)
    for act in (lambda: write_part(source, out, other, 1, 4), lambda: finish_shards(source, out, other)):
        with pytest.raises(DataError, match="short_side None, not 64"):
            act()
    with pytest.raises(DataError, match="parts 4, not 3"):
        write_part(source, out, SETTINGS, 1, 3)
    with pytest.raises(DataError, match="parts 4, not 1"):
        convert(source, out)
    for part in (1, 3, 4):
        write_part(source, out, SETTINGS, part, 4, processes=1)
    unit = tmp_path / "out.partial" / "units" / "000002.arrow"
    write_part(source, tmp_path / "x", other, 3, 4, processes=1)
    shutil.copy(tmp_path / "x.partial" / "units" / "000002.arrow", unit)
    with pytest.raises(DataError, match=r"000002.arrow: \(part 3\) was made with other settings"):
        finish_shards(source, out, SETTINGS)
    with pytest.raises(ConfigError, match="part: 5 must be at least 1 and at most 4"):
        write_part(source, out, SETTINGS, 5, 4)


def test_a_part_that_begins_while_another_makes_the_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, other = Path.exists, []

    def exists(path: Path, **more: Any) -> bool:
        seen = looks(path, **more)
        if path.name == "lock" and not other:  # the other part's moment
            other.append(path.touch())
        return seen

    monkeypatch.setattr(Path, "exists", exists)
    write_part(source, tmp_path / "out", ShardSettings(), 1, 2, processes=1)


def test_a_part_does_not_wait_for_torch(tmp_path: Path, source: Path) -> None:
    """Which the writer of tars brings along: a second of each task's start, and its memory."""
    code = (
        "import sys; from simclr_dist.cli.main import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    words = ["shard", source, tmp_path / "out", "--part", "1/2", "--processes", "1"]
    subprocess.run([sys.executable, "-c", code, *words], check=True)


@pytest.mark.parametrize("part", [1, None])
def test_a_lock_of_a_lost_node_may_pass(
    tmp_path: Path, source: Path, part: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that SLURM has started again elsewhere is started once more; what is typed is refused."""
    out, words = tmp_path / "out", ["--part", "1/1"] if part else ["--finish"]
    about = _Conversion(source, out, ShardSettings(), parts=1, processes=1, progress=False).about
    with hold(out, about, part):
        for job, code in ((None, 2), ("7", 1)):
            monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
            assert main(["shard", str(source), str(out), *words]) == code
            assert capsys.readouterr().err.startswith(f"simclr-dist: {out}: another run ")


def test_strict_parts(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match=r"strict, and 1 images of part 1 cannot be used; the first: dog/077.png: not an image"):
        write_part(source, tmp_path / "out", SETTINGS, 1, 1, strict=True, processes=1)
    with pytest.raises(DataError, match="strict, and 1 images"):
        finish_shards(source, tmp_path / "out", SETTINGS, strict=True, processes=1)
    assert finish_shards(source, tmp_path / "out", SETTINGS, processes=1).written == 499


# ---- the batch script


def batch(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = clean | {"PATH": path} | variables
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_batch_script(tmp_path: Path, source: Path) -> None:
    arguments = (str(source), str(tmp_path / "out"), "--shard-size", "50", "--seed", "3", "--split", "0.8/0.2")
    usage = batch(*arguments)
    assert (usage.returncode, "this is for sbatch" in usage.stderr) == (2, True)
    assert "usage: sbatch" in batch("src", SLURM_JOB_ID="7").stderr
    early = batch(*arguments, SLURM_JOB_ID="8")
    assert (early.returncode, "there are no parts" in early.stderr) == (2, True)
    for part in ("1", "2"):
        done = batch(*arguments, SLURM_JOB_ID="9", SLURM_ARRAY_TASK_ID=part, SLURM_ARRAY_TASK_MAX="2")
        assert done.returncode == 0, done.stderr
    assert "2 of 2 parts are done; go on with --finish" in done.stdout
    again = batch(*arguments, SLURM_JOB_ID="9", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_MAX="2", PARTS="3")
    assert (again.returncode, "parts 2, not 3" in again.stderr) == (2, True)
    assert batch(*arguments, SLURM_JOB_ID="10").returncode == 0
    assert contents(tmp_path / "out") == convert(source, tmp_path / "straight")
    requeued = batch(*arguments, SLURM_JOB_ID="10", SLURM_RESTART_COUNT="1")
    assert requeued.returncode == 0, requeued.stderr
    assert requeued.stdout.startswith(f"{tmp_path / 'out'}: was done already, ")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    other = batch(*arguments, "--short-side", "64", SLURM_JOB_ID="11")
    assert (other.returncode, "exists and is not empty" in other.stderr) == (2, True)


def test_the_same_conversion_again_is_done_already(tmp_path: Path, source: Path) -> None:
    out, settings = tmp_path / "out", {**SETTINGS.__dict__, "processes": 1}
    first = write_shards(source, out, **settings)
    before = contents(out)
    (tmp_path / "out.partial" / "units").mkdir(parents=True)  # empty, as a kill may leave it
    assert write_shards(source, out, **settings) == replace(first, already=True)
    assert finish_shards(source, out, SETTINGS, processes=1) == replace(first, already=True)
    assert contents(out) == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(DataError, match="strict, and 1 images cannot be used"):
        write_shards(source, out, **settings, strict=True)

    def refused(says: str) -> None:
        for act in (lambda: write_shards(source, out, **settings), lambda: finish_shards(source, out, SETTINGS)):
            with pytest.raises(DataError, match=says):
                act()

    with pytest.raises(DataError, match="exists and is not empty"):
        write_part(source, out, SETTINGS, 1, 2)
    (tar := next((out / "train").glob("*.tar"))).rename(tmp_path / "kept")
    refused("in manifest.parquet, but No such file")
    (tmp_path / "kept").rename(tar)
    record = json.loads((out / "conversion.json").read_text())
    (out / "conversion.json").write_text(json.dumps(record | {"seed": 4}))
    refused("exists and is not empty")
    (out / "conversion.json").write_text(json.dumps(record))
    assert write_shards(source, out, **settings).already
    os.utime(source / "cat" / "000.png", ns=(1, 1))
    refused("exists and is not empty")


def test_a_terminated_part_leaves_whole_files(tmp_path: Path, source: Path) -> None:
    """SIGTERM, as SLURM sends at the end of the time: the part goes on when it is started again."""
    command = [sys.executable, "-m", "simclr_dist", "shard", str(source), str(tmp_path / "out"), "--part", "1/1"]
    process = subprocess.Popen([*command, "--processes", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list((tmp_path / "out.partial" / "units").glob("*.arrow")):
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate()
    finish = ShardSettings()
    write_part(source, tmp_path / "out", finish, 1, 1, processes=1)
    finish_shards(source, tmp_path / "out", finish, processes=1)
    write_shards(source, tmp_path / "straight", processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_disk_that_fails_for_a_moment_costs_nothing_that_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        for number in range(200):
            content = encoded(number)
            about = tarfile.TarInfo(f"{number:03d}.png")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    write_shards(archive, tmp_path / "whole", processes=1)
    real, reads = archives._content, 0

    def failing(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 190:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_content", failing)
        with pytest.raises(DataError, match=r"images\.tar: cannot be read: Input/output error"):
            write_shards(archive, tmp_path / "out", processes=1)
    kept = [path.name for path in (tmp_path / "out.partial" / "units").iterdir()]
    assert kept
    write_shards(archive, tmp_path / "out", processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
