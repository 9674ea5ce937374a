"""A disk that fills or turns read-only under a run: it goes on without saving, or ends in one line, and nothing is lost."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from faults.commands import running, simclr_dist
from faults.small_disk import SmallDisk
from faults.straight import STEPS
from simclr_dist.config.load import load_config
from simclr_dist.config.strict_yaml import write_yaml
from simclr_dist.encoder.file import load_encoder
from simclr_dist.run.checkpoint import load_newest, saved_steps
from simclr_dist.run.folder import newest_step, truncate_metrics
from simclr_dist.system.errors import SaveError

pytestmark = pytest.mark.slow


SETTINGS: dict[str, Any] = {"steps": STEPS, "checkpoint": {"every": 2, "keep_last": 1}}
PAGES = 2500  # four checkpoints of 2.5 MB


def checkpoints_on(disk: SmallDisk, folder: Path) -> None:
    """The run folder before its first start, with its checkpoints elsewhere."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(write_yaml(load_config(folder / "config.yaml").to_dict()))
    (run / "checkpoints").symlink_to(disk.path)


class Watched:
    """A run between its saves."""

    def __init__(self, ranks: runs.Ranks, run: Path) -> None:
        self._ranks = ranks
        self._run = run

    def until_saved(self, step: int) -> None:
        """Until there is a checkpoint of `step` or later."""
        self._ranks.until(lambda: newest_step(self._run) >= step)

    def until_failed(self, times: int) -> None:
        """Until so many saves have failed."""
        self._ranks.until(lambda: len(runs.events(self._run, "save_failed")) >= times)

    def between_saves(self) -> None:
        """Hold the run where no save is under way: there is the checkpoint that is kept, with its seal, and nothing else."""
        while True:
            self._ranks.hold()
            found = sorted(path.suffix for path in (self._run / "checkpoints").iterdir() if path.name != "ballast")
            if found == [".json", ".pt"]:
                return
            self.go_on()

    def go_on(self) -> None:
        self._ranks.signal(signal.SIGCONT)


def contents(disk: SmallDisk) -> dict[str, bytes]:
    """All but the ballast that fills it."""
    return {path.name: path.read_bytes() for path in disk.path.iterdir() if path.name != "ballast"}


@pytest.mark.parametrize("small_disk", [PAGES], indirect=True)
def test_in_mid_run_training_goes_on_and_saves_again_later(
    shards: Path, straight: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    runs.write_config(tmp_path, shards, **SETTINGS)
    checkpoints_on(small_disk, tmp_path)
    run = tmp_path / "run"
    with runs.started(tmp_path, 2) as ranks:
        watched = Watched(ranks, run)
        for why in ("No space left on device", "Read-only file system"):
            failed = len(runs.events(run, "save_failed"))
            watched.until_saved(newest_step(run) + 1)
            watched.between_saves()
            if why.startswith("No"):
                small_disk.fill(leave=20)
            else:
                small_disk.set_read_only(True)
            before = contents(small_disk)
            watched.go_on()
            watched.until_failed(failed + 2)
            watched.between_saves()
            assert contents(small_disk) == before
            state = load_newest(run / "checkpoints", report=pytest.fail)
            assert state is not None
            for entry in runs.events(run, "save_failed")[failed:]:
                line = f"step {entry['step']}: run/checkpoints/step-{entry['step']:08d}.pt: cannot be written: {why}"
                assert line.endswith(entry["why"])
                assert f"WARNING: {line}; training goes on, and the last checkpoints are whole\n" in ranks.output
            small_disk.clear() if why.startswith("No") else small_disk.set_read_only(False)
            watched.go_on()
            watched.until_saved(state["step"] + 1)
        assert ranks.wait() == [0, 0], ranks.output
    runs.assert_same_run(run, straight, STEPS)


@pytest.mark.parametrize("small_disk", [PAGES], indirect=True)
@pytest.mark.parametrize("place", ["checkpoints", "run folder"])
def test_at_the_end_it_is_one_line_and_the_same_command_goes_on(
    shards: Path, straight: Path, tmp_path: Path, small_disk: SmallDisk, place: str
) -> None:
    if place == "checkpoints":
        runs.write_config(tmp_path, shards, **SETTINGS)
        checkpoints_on(small_disk, tmp_path)
        run, checkpoints = tmp_path / "run", "run/checkpoints"
    else:
        run = small_disk.path / "run"
        runs.write_config(tmp_path, shards, **SETTINGS, run_folder=str(run))
        checkpoints = f"{run}/checkpoints"
    with runs.started(tmp_path, 2) as ranks:
        watched = Watched(ranks, run)
        watched.until_saved(STEPS // 2)
        watched.between_saves()
        saved = newest_step(run)
        small_disk.fill()
        watched.go_on()
        assert ranks.wait() == [1, 1], ranks.output
        (line,) = (line for line in ranks.output.splitlines() if line.startswith("simclr-dist: "))
        assert line.startswith(f"simclr-dist: {checkpoints}/step-{STEPS:08d}.pt: cannot be written: No space left on device; ")
        assert line.endswith("; what was saved before is whole, and once it can be written the same command goes on")
        where = "run/encoders" if place == "checkpoints" else rf"{tmp_path}/encoder-\w+"
        assert re.search(rf"; the encoder is {where}/step-{STEPS:08d}\.safetensors; what was", line), line
        assert "Traceback" not in ranks.output
    assert saved_steps(run / "checkpoints") == [saved]
    assert load_newest(run / "checkpoints", report=pytest.fail) is not None
    if place == "checkpoints":
        assert (runs.status(run)["state"], runs.status(run)["exit_code"]) == ("crashed", 1)
    else:
        with runs.started(tmp_path, 2) as ranks:
            assert ranks.wait() == [2, 2], ranks.output
            assert "Traceback" not in ranks.output
            (line,) = (line for line in ranks.output.splitlines() if line.startswith("simclr-dist: "))
            assert line.startswith(f"simclr-dist: run_folder: '{run}': its files need "), line
    small_disk.clear()
    output = runs.train(tmp_path, 2)
    assert f"resumed at step {saved}" in output
    assert "waiting" not in output, "for a sign of life of the start that found the disk full"
    runs.assert_same_run(run, straight, STEPS)


def test_metrics_that_cannot_be_cut_back_stay_whole(small_disk: SmallDisk) -> None:
    """Before the first step of a resumed run."""
    path = small_disk.path / "metrics.jsonl"
    lines = "".join(f'{{"step": {step}}}\n' for step in range(9))
    path.write_text(lines)
    small_disk.fill()
    with pytest.raises(SaveError, match=r"metrics\.jsonl.*: cannot be written: No space left on device"):
        truncate_metrics(small_disk.path, 5)
    assert path.read_text() == lines
    small_disk.clear()
    truncate_metrics(small_disk.path, 5)
    assert path.read_text() == lines[: lines.index('{"step": 6}')]


@pytest.mark.parametrize("small_disk", [PAGES], indirect=True)
def test_a_disk_that_others_fill_trains_once_and_the_encoder_lies_elsewhere(
    shards: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    run = small_disk.path / "run"
    runs.write_config(tmp_path, shards, steps=400, checkpoint={"every": 10**6}, log={"every": 100}, run_folder=str(run))
    with running(tmp_path, simclr_dist("train", "config.yaml", "--processes", "1")) as command:
        runs.until(lambda: runs.steps_done(run) > 0 or command.process.poll() is not None)
        small_disk.fill()
        assert command.wait() == 1, command.output
        lines = [line for line in command.output.splitlines() if line.startswith("simclr-dist: ")]
        assert (len(lines), command.output.count("step 400/400")) == (1, 1), command.output
    assert "Traceback" not in command.output
    assert len(runs.events(run, "start")) <= 1
    found = re.search(
        r"cannot be written: No space left on device; .*the encoder is (\S+/step-00000400.safetensors);", lines[0]
    )
    assert found is not None, lines
    assert Path(found[1]).parent.parent == tmp_path, "where the command was typed"
    assert load_encoder(found[1]).card["step"] == 400
