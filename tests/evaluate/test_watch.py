"""The watch over a run: each encoder once, whatever is there at the start, and what TensorBoard shows of it."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

import ranks
from evaluated import CARD, draw_images
from forkserver import Command
from simclr_dist.cli.main import main
from simclr_dist.encoder.file import export_encoder, untrained_encoder
from simclr_dist.evaluate import finetune, job
from simclr_dist.evaluate.job import evaluate
from simclr_dist.evaluate.result.board import Curves
from simclr_dist.evaluate.settings import FinetuneSettings, Settings
from simclr_dist.evaluate.watch import Orders, watch
from simclr_dist.method.distributed import World, set_timeout
from simclr_dist.run.claim import claim_run
from simclr_dist.run.status import End, read_ledger, record_end, record_event, write_status
from simclr_dist.system.errors import DataError

Make = Callable[..., Path]
SETTINGS = Settings(k=10, workers=0)
QUICK = Settings(k=10, workers=0, baselines=False, protocols=("knn",))


@pytest.fixture
def sets(make_shards: Make) -> tuple[Path, Path]:
    return make_shards("train", *draw_images(61, seed=0)), make_shards("test", *draw_images(31, seed=1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that has exported nothing yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def curve(run: Path, tag: str = "eval/knn_top1") -> list[tuple[int, float]]:
    """What TensorBoard shows: the steps and values of a curve."""
    protocol = tag.removeprefix("eval/").removesuffix("_top1")
    newest = max((run / "tb" / "eval").glob(f"{protocol}-*/events*"), key=lambda file: file.stat().st_mtime_ns)
    shown = EventAccumulator(str(newest)).Reload()
    return [(event.step, round(event.value, 3)) for event in shown.Scalars(tag)]


def results(run: Path) -> dict[int, dict[str, float]]:
    """Top-1 of the trained encoders by step and protocol, from the files."""
    found = {}
    for path in sorted((run / "eval").glob("*.json")):
        result = json.loads(path.read_text())
        protocols = result["protocols"].items()
        found[result["encoder"]["step"]] = {name: part["results"]["trained"]["top1"] for name, part in protocols}
    return found


def test_each_encoder_is_evaluated_once(run: Path, make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    encoders = [make_encoder(seed=step, step=step) for step in (300, 100, 200)]
    write_status(run, "done", 0)
    lines: list[str] = []
    assert watch(run, *sets, SETTINGS, device="cpu", say=lines.append) == 0
    assert [line.split(":")[0] for line in lines] == ["step-00000100", "step-00000200", "step-00000300", str(run)]
    assert lines[-1] == f"{run}: done; 3 encoders evaluated"
    for path in encoders:
        alone = evaluate(path, *sets, k=10, workers=0, device="cpu", out=tmp_path / "alone.json")
        found = json.loads((run / "eval" / f"{path.stem}.json").read_text())
        for protocol, part in alone["protocols"].items():
            top1 = {name: row["top1"] for name, row in found["protocols"][protocol]["results"].items()}
            assert top1 == {name: row["top1"] for name, row in part["results"].items()}
        assert set(found) == set(alone)
        assert found["baselines_measured_for"] == "step-00000100.safetensors", "measured once, and said"
    accuracy = results(run)
    assert curve(run) == [(step, round(accuracy[step]["knn"], 3)) for step in (100, 200, 300)]
    assert curve(run, "eval/linear_top1") == [(step, round(accuracy[step]["linear"], 3)) for step in (100, 200, 300)]

    written = {path: path.stat().st_mtime_ns for path in (run / "eval").glob("*.json")}
    lines.clear()
    assert watch(run, *sets, SETTINGS, device="cpu", say=lines.append) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (run / "eval").glob("*.json")}
    assert all(line.endswith("; evaluated before") for line in lines[:-1])
    assert len(lines) == 4
    assert [step for step, _ in curve(run)] == [100, 200, 300], "a restart shows no step twice"


def test_what_has_changed_is_evaluated_again(run: Path, make_encoder: Make, sets: tuple[Path, Path], make_shards: Make) -> None:
    make_encoder(seed=1, step=100)
    make_encoder(seed=2, step=200)
    write_status(run, "done", 0)

    def again(settings: Settings, *shards: Path) -> list[str]:
        lines: list[str] = []
        assert watch(run, shards[0], shards[1], settings, device="cpu", say=lines.append) == 0
        return [line.split(": ", 1)[1] for line in lines if line.endswith("again")]

    assert again(Settings(k=10, workers=0, baselines=False), *sets) == []
    assert again(SETTINGS, *sets) == ["evaluated before with baselines left out, now measured: again"] * 2
    assert again(Settings(k=10, workers=0, baselines=False, batch_size=7), *sets) == [], "it has all that is asked for"
    assert again(Settings(k=5, workers=0), *sets) == ["evaluated before with k 10, now 5: again"] * 2
    assert (
        again(Settings(k=5, workers=0, l2=0.1, seed=7), *sets)
        == ["evaluated before with l2 chosen, now 0.1, seed 0, now 7: again"] * 2
    )
    settings = Settings(k=5, workers=0, l2=0.1, seed=7)
    make_encoder(seed=9, step=100)
    assert [line.split()[3] for line in again(settings, *sets)] == ["encoder"], "exported anew, after a resume"
    other = make_shards("other", *draw_images(31, seed=2))
    assert [line.split()[3:5] for line in again(settings, sets[0], other)] == [["test", "images"]] * 2
    (run / "eval" / "step-00000100.json").write_text("{")
    assert again(settings, sets[0], other) == [], "no result of ours: nothing to say"
    assert set(results(run)) == {100, 200}
    assert [step for step, _ in curve(run)] == [100, 200]


def test_baselines_of_another_shape_are_measured(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    make_encoder(seed=1, step=100)
    make_encoder(seed=2, step=200, mean=[0.4, 0.5, 0.5])
    write_status(run, "done", 0)
    watch(run, *sets, SETTINGS, device="cpu")
    second = json.loads((run / "eval" / "step-00000200.json").read_text())
    assert second["baselines_measured_for"] == "step-00000200.safetensors"


@pytest.mark.parametrize("state", ["failed", "diverged"])
def test_a_run_that_ended_badly(run: Path, make_encoder: Make, sets: tuple[Path, Path], state: str) -> None:
    make_encoder(seed=1, step=100)
    write_status(run, state, 3, reason="loss is not finite")
    lines: list[str] = []
    assert watch(run, *sets, SETTINGS, device="cpu", say=lines.append) == 0
    assert lines[-1] == f"{run}: {state} (loss is not finite); 1 encoders evaluated"


def test_an_encoder_that_cannot_be_evaluated(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    broken, dead = make_encoder(seed=1, step=100), run / "encoders" / "step-00000200.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    encoder = untrained_encoder(CARD, 2)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    export_encoder(dead, encoder, {**CARD, "step": 200})
    make_encoder(seed=3, step=300)
    write_status(run, "diverged", 3)
    lines: list[str] = []
    assert watch(run, *sets, SETTINGS, device="cpu", say=lines.append) == 2
    assert lines[0].startswith("step-00000100: cannot be evaluated: ")
    assert lines[1].startswith(f"step-00000200: cannot be evaluated: {dead}: ")
    assert lines[1].endswith(": conv1.weight: has numbers that are not finite")
    assert lines[-1] == f"{run}: diverged; 1 encoders evaluated, 2 could not be"
    assert set(results(run)) == {300}


def test_a_finetuning_that_diverges_ends_no_watch(
    run: Path, make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next encoder's may not."""
    for step in (100, 300):
        make_encoder(seed=step, step=step)
    write_status(run, "done", 0)

    def train_and_test(encoder: Any, sets: Any, settings: FinetuneSettings, say: Any) -> Any:
        rate = 1e9 if encoder.card["step"] == 100 else settings.base_lr
        return finetune.train_and_test(encoder, sets, dataclasses.replace(settings, base_lr=rate), say)

    monkeypatch.setattr(job, "train_and_test", train_and_test)
    lines: list[str] = []
    settings = dataclasses.replace(QUICK, protocols=("knn", "finetune"), finetune_epochs=1)
    assert watch(run, *sets, settings, device="cpu", say=lines.append) == 2
    assert lines[0].startswith("step-00000100: cannot be evaluated: base_lr: the scores of seed 0 are not finite after epoch 1")
    assert lines[-1] == f"{run}: done; 1 encoders evaluated, 1 could not be"
    assert set(results(run)) == {300}


def test_a_second_watcher_waits(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    make_encoder(seed=1, step=100)
    write_status(run, "done", 0)
    watch(run, *sets, SETTINGS, device="cpu")
    other = os.open(run / "eval" / ".watch", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            os.close(other)

    assert watch(run, *sets, SETTINGS, poll=0.01, device="cpu", say=say) == 0
    assert lines[0].startswith(f"{run}: is watched by process {os.getpid()} on ")
    assert lines[1].endswith("evaluated before")


def test_an_error_while_it_waits_is_not_one_of_the_lock(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    make_encoder(seed=1, step=100)
    (run / "eval").mkdir()
    other = os.open(run / "eval" / ".watch", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)

    def say(line: str) -> None:
        assert "cannot be locked" not in line
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        watch(run, *sets, SETTINGS, poll=0.01, device="cpu", say=say)
    os.close(other)


def told(run: Path, *events: dict[str, object]) -> None:
    for event in events:
        record_event(run, **event)  # type: ignore[arg-type]  # values of many types


SUBMITTED, RESUBMITTED = ({"event": "submitted", "kind": "train", "job": job} for job in ("7", "9"))
EVALUATION = {"event": "submitted", "kind": "eval", "job": "8"}
EVAL_REQUEUED = {"event": "requeued", "kind": "eval", "job": "8", "why": "SIGUSR2", "crash": False, "saved": 1}
STARTED = {"event": "start", "generation": 1, "job": "7", "step": 0}
FAILED = {"event": "stop", "generation": 1, "state": "failed", "exit_code": 2, "why": "no images"}
GAVE_UP = {"event": "gave_up", "kind": "train", "job": "7", "why": "4 crashes"}


def test_a_requeue_of_the_evaluation_does_not_hide_the_end(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    make_encoder(seed=1, step=100)
    told(run, SUBMITTED, EVALUATION, STARTED, GAVE_UP, EVAL_REQUEUED)
    write_status(run, "crashed", 1)

    def say(line: str) -> None:
        lines.append(line)
        assert "waiting" not in line

    lines: list[str] = []
    assert watch(run, *sets, QUICK, device="cpu", say=say) == 0
    assert lines[-1] == f"{run}: crashed (given up: 4 crashes); 1 encoders evaluated"


def test_the_end_of_an_earlier_start_does_not_end_a_new_watcher(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    """A failed run that is submitted again, with its evaluation."""
    make_encoder(seed=1, step=100)
    claim_run(run).release()
    told(run, SUBMITTED, STARTED, FAILED, RESUBMITTED, EVALUATION)
    write_status(run, "failed", 2, reason="no images")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            make_encoder(seed=2, step=200)
            claim = claim_run(run)
            record_end(run, claim.generation, End("done", 0))
            claim.release()

    assert watch(run, *sets, QUICK, poll=0.01, device="cpu", say=say) == 0
    assert lines[1] == f"{run}: submitted; waiting for its next encoder"
    assert lines[-1] == f"{run}: done; 2 encoders evaluated"


def test_an_end_that_only_slurm_knows_ends_the_watch(run: Path, make_encoder: Make, sets: tuple[Path, Path]) -> None:
    """After a last look for encoders."""
    told(run, SUBMITTED)
    lines: list[str] = []

    def note_end(folder: Path) -> None:
        make_encoder(seed=1, step=100)
        told(folder, GAVE_UP)

    assert watch(run, *sets, QUICK, poll=0.01, device="cpu", say=lines.append, note_end=note_end) == 0
    assert lines[0] == f"{run}: submitted; waiting for its next encoder"
    assert lines[-1] == f"{run}: not started (given up: 4 crashes); 1 encoders evaluated"


def test_that_all_is_evaluated_is_on_record_in_a_job(
    run: Path, make_encoder: Make, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in each start, and in a watcher that waits for another to end too."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    make_encoder(seed=1, step=100)

    def waits() -> list[object]:
        return [(entry["kind"], entry["job"]) for entry in read_ledger(run) if entry["event"] == "waiting"]

    def say(line: str) -> None:
        assert waits() == [("eval", "8")] * ("waiting" in line), "not before the first encoder is evaluated"
        if "waiting" in line:
            write_status(run, "done" if "running" in line else "running", 0)

    assert watch(run, *sets, QUICK, poll=0.01, device="cpu", say=lambda line: "done" in line or say(line)) == 0
    assert waits() == [("eval", "8")]
    other = os.open(run / "eval" / ".watch", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    watch(run, *sets, QUICK, poll=0.01, device="cpu", say=lambda line: os.close(other) if "waiting" in line else None)
    assert waits() == [("eval", "8")] * 2


def test_sets_that_cannot_be_compared_are_refused(run: Path, make_encoder: Make, make_shards: Make) -> None:
    make_encoder(seed=1, step=100)
    images, labels = draw_images(9, seed=2)
    train, test = make_shards("a", images, labels), make_shards("b", images, labels, ("bright", "dark", "spotted"))
    with pytest.raises(DataError, match="'spotted' is in one of them only"):
        watch(run, train, test, SETTINGS, device="cpu")
    (run / "eval").write_text("in the way")
    with pytest.raises(DataError, match=r"eval/\.watch: cannot be written"):
        watch(run, train, train, SETTINGS, device="cpu")


def test_the_curve_keeps_its_order(tmp_path: Path) -> None:
    def result(step: int, top1: float) -> dict[str, object]:
        of = {"settings": {"layer": "h", "precision": "fp32"}, "train": {"digest": "1"}, "test": {"digest": "2"}}
        knn = {"settings": {"k": 10}, "results": {"trained": {"top1": top1}}}
        return {**of, "encoder": {"step": step}, "protocols": {"knn": knn}}

    shown = Curves(tmp_path / "tb" / "eval")
    (tmp_path / "tb").write_text("in the way")
    for step in (100, 300):
        with pytest.raises(OSError, match="tb"):
            shown.add(result(step, step / 10), when=5.0)
    (tmp_path / "tb").unlink()
    shown.add(result(400, 40), when=7.0)
    assert curve(tmp_path) == [(100, 10), (300, 30), (400, 40)], "what was refused comes later"
    shown.add(result(200, 20), when=8.0)
    assert curve(tmp_path) == [(100, 10), (200, 20), (300, 30), (400, 40)]
    shown.add(result(300, 33), when=9.0)
    assert curve(tmp_path) == [(100, 10), (200, 20), (300, 33), (400, 40)]
    shown.add(result(500, 50), when=10.0)
    Curves(tmp_path / "tb" / "eval").add(result(100, 1), when=11.0)
    assert curve(tmp_path) == [(100, 1)], "a new start begins anew"


@pytest.mark.slow
def test_a_watcher_sees_encoders_come(run: Path, make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    shards = ["--train", str(sets[0]), "--test", str(sets[1])]
    log = tmp_path / "log"
    watcher = Command(main, ["eval", "--watch", run, *shards, "--k", "10", "--device", "cpu", "--poll", "0.1"], log=log)

    def wait_for(line: str) -> None:
        deadline = time.monotonic() + 120
        while line not in log.read_text():
            assert watcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    try:
        wait_for(f"{run}: not started; waiting for its next encoder\n")
        for step, state in ((100, "running"), (200, "preempted"), (300, "crashed")):
            make_encoder(seed=step, step=step)
            wait_for(f"step-{step:08d}: kNN ")
            write_status(run, state, None)
            wait_for(f"{run}: {state}; waiting for its next encoder\n")
            assert (step, round(results(run)[step]["knn"], 3)) == curve(run)[-1]
        make_encoder(seed=4, step=400)
        write_status(run, "done", 0)
        assert watcher.wait(timeout=60) == 0
    finally:
        with watcher:
            watcher.kill()
    said = [line.split(":")[0] for line in log.read_text().splitlines() if "waiting" not in line]
    assert said == ["step-00000100", "step-00000200", "step-00000300", "step-00000400", str(run)]
    assert [step for step, _ in curve(run)] == [100, 200, 300, 400]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
def test_two_processes_watch_as_one(run: Path, make_encoder: Make, sets: tuple[Path, Path], tmp_path: Path) -> None:
    for step in (100, 200, 300):
        make_encoder(seed=step, step=step)
    broken = run / "encoders" / "step-00000200.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    write_status(run, "done", 0)
    job = ["eval", "--watch", run, "--train", sets[0], "--test", sets[1], "--k", "10"]
    job += ["--workers", "1", "--device", "cpu", "--poll", "0.1"]
    codes, said, _ = ranks.commands(main, job, 2)
    assert codes == [2, 2]
    assert said.count("step-00000200: cannot be evaluated") == 1
    assert set(results(run)) == {100, 300}
    broken.write_bytes(whole)
    codes, said, errors = ranks.commands(main, job, 2)
    assert codes == [0, 0], errors
    assert [line.split(":")[0] for line in said.splitlines()[:-1]] == [f"step-00000{n}00" for n in (1, 2, 3)]
    both = results(run)
    shutil.rmtree(run / "eval")
    watch(run, *sets, SETTINGS, device="cpu")
    assert results(run) == both


def _wait_longer_than_the_time_out(here: World) -> int:
    set_timeout(1 / 60)
    orders = Orders(here)
    if here.is_main:
        time.sleep(3)
        orders.give({"code": 5})
    code = 5 if here.is_main else int(orders.take()["code"])
    distributed.barrier()
    return code


def test_ranks_may_wait_longer_than_a_collective() -> None:
    assert ranks.run(_wait_longer_than_the_time_out, 2) == [5, 5]


MISTAKES = {
    (): "eval: name an ENCODER, or a run with --watch RUN",
    ("x.safetensors", "--watch", "RUN"): "eval: 'x.safetensors' and --watch 'RUN': name one encoder, or one run",
    ("--watch", "RUN", "--out", "x.json"): "--out: 'x.json': not with --watch, which writes RUN/eval/step-XXXXXXXX.json",
    ("x.safetensors", "--poll", "5"): "--poll: 5: goes with --watch only",
    ("--watch", "RUN", "--poll", "0"): "--poll: 0: must be above 0, and finite",
    ("--watch", "RUN", "--l2", "-1"): "l2: -1.0 is too small; the least is 0",
    ("--watch", "."): "--watch: '.' is not a run folder (it has no config.yaml); start the training first",
    ("--watch", "no/where"): "--watch: 'no/where' is not a run folder (it has no config.yaml); start the training first",
}


def test_mistakes_are_one_line_without_torch(run: Path, tmp_path: Path) -> None:
    probe = "import json, sys; from simclr_dist.cli.main import main\n"
    probe += "for case in json.loads(sys.argv[1]): print(main(['eval', *case]), 'torch' in sys.modules, flush=True)"
    cases = [[str(run) if part == "RUN" else part for part in case] for case in MISTAKES]
    shards = ["--train", "a", "--test", "b"]
    command = [sys.executable, "-c", probe, json.dumps([[*case, *shards] for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2 False"] * len(MISTAKES), done.stderr
    told = [f"simclr-dist: {line}" for line in MISTAKES.values()]
    assert done.stderr.splitlines() == [line.replace("'RUN'", repr(str(run))) for line in told]
