"""A run from outside: what it writes, how it ends, what it refuses."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_runs as runs
from simclr_dist.cli.train import main
from simclr_dist.convert.shards import write_shards
from simclr_dist.data.manifest import Manifest, load_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels.decode import describe_decoders
from simclr_dist.encoder.file import load_encoder, untrained_encoder
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.system.errors import ConfigError
from simclr_dist.train import loop, state
from simclr_dist.train.monitor.board import SECOND

METRICS = [
    "step",
    "loss/nt_xent",
    "loss/chance",
    "loss/negatives_an_anchor",
    "similarity/positive",
    "similarity/negative",
    "retrieval/top1",
    "retrieval/top5",
    "embedding/alignment",
    "embedding/uniformity",
    "embedding/effective_rank",
    "optim/learning_rate",
    "optim/gradient_norm",
    "optim/clipped_share",
    "optim/skipped_steps",
    "optim/longest_skip",
    "data/bad_samples",
    "lars/trust_ratio_min",
    "lars/trust_ratio_median",
    "lars/trust_ratio_max",
    "timing",
]
TIMING = [
    "speed/images_per_second",
    "speed/data_wait_percent",
    "speed/memory_gib",
    "speed/seconds_left",
    "speed/step_ms",
    "ranks/images_per_second_min",
    "ranks/images_per_second_max",
    "ranks/data_wait_percent_max",
    "ranks/memory_gib_max",
    "ranks/own_ms",
    "ranks/own_ms_others",
    "ranks/slowest",
    "ranks/starving",
    "run/restarts",
    "run/checkpoint_seconds",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(shards: Path, *arguments: str, **changes: Any) -> int:
    """Write the config and train in this process."""
    return main([str(runs.write_config(Path(), shards, **changes)), *arguments])


def status() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/status.json").read_text())
    return found


def our_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "simclr-dist: " in line]


def files(*patterns: str) -> dict[str, tuple[int, bytes]]:
    paths = [path for pattern in patterns for path in Path("run").glob(pattern) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def go_back_to(step: int) -> None:
    """The run folder of a run that was killed some time after the checkpoint of `step`."""
    for path in [*Path("run/checkpoints").iterdir(), *Path("run/encoders").iterdir()]:
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


def damage(shards: Path, rows: list[int]) -> tuple[Path, Manifest]:
    """A copy in which one byte of each row's image is another; sizes stay."""
    copy = Path("damaged").resolve()
    shutil.copytree(shards, copy)
    m = load_manifest(copy)
    for row in rows:
        path = copy / m.shards[m.shard[row]]
        content = bytearray(path.read_bytes())
        content[m.offset[row] + m.size[row] // 2] ^= 0xFF
        path.write_bytes(content)
    return copy, m


def rows_of_step(m: Manifest, step: int) -> list[int]:
    rows: list[int] = Plan(m.shard_sizes, seed=0, global_batch_size=24, window=2)[step][1].tolist()
    return rows


def test_what_a_run_writes(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, steps=7, checkpoint={"every": 3, "export_every": 3, "keep_last": 2}) == 0
    assert {path.name for path in Path("run").iterdir()} - {"code"} == {
        "heartbeat",
        "ledger.jsonl",
        "starts",
        "config.yaml",
        "env.json",
        "status.json",
        "train.log",
        "metrics.jsonl",
        "checkpoints",
        "encoders",
    }
    assert status()["state"] == "done"
    assert status()["exit_code"] == 0
    assert sorted(path.name for path in Path("run/checkpoints").glob("*.pt")) == ["step-00000006.pt", "step-00000007.pt"]
    encoders = sorted(Path("run/encoders").glob("*.safetensors"))
    assert [path.stem for path in encoders] == ["step-00000003", "step-00000006", "step-00000007"]
    state = runs.checkpoint(Path("run"), 7)
    env = json.loads(Path("run/env.json").read_text())
    assert env["decoder"] == state["environment"]["decoder"] == describe_decoders()
    encoder = load_encoder(encoders[-1])
    assert encoder.card["step"] == 7
    assert encoder.card["images_seen"] == 7 * 24
    assert all(torch.equal(value, state["model"][f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    output = capsys.readouterr().out
    assert "205 images, 8 steps an epoch, 13 left over" in output
    assert "46 negatives an anchor" in output
    assert Path("run/train.log").read_text() == output


def test_metrics_are_these(shards: Path) -> None:
    assert start(shards, steps=4) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert list(line) == METRICS
        assert list(line["timing"]) == TIMING
        assert line["loss/chance"] == pytest.approx(np.log(47))
        assert line["loss/negatives_an_anchor"] == 46
        assert abs(line["loss/nt_xent"] - line["loss/chance"]) < 2
        assert -1 <= line["similarity/positive"] <= 1
        assert line["optim/gradient_norm"] > 0


def test_the_decoupled_loss_and_fp16(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the loss scale is resumed with the rest."""
    changes: dict[str, Any] = {"steps": 4, "precision": "fp16", "loss": {"decoupled": True}}
    assert start(shards, **changes) == 0
    (*_, line) = runs.metrics(Path("run"))
    assert line["loss/chance"] == pytest.approx(np.log(46))
    assert abs(line["loss/dcl"] - line["loss/chance"]) < 2
    assert "loss/nt_xent" not in line
    assert f"step 4/4  loss {line['loss/dcl']:.4f} (chance 3.83)" in capsys.readouterr().out
    expected = runs.checkpoint(Path("run"), 4)
    assert expected["loss_scale"]["factor"] == line["optim/loss_scale"]
    assert (expected["loss_scale"]["good_steps"] > 0) == (expected["counters"]["skipped"] < 4)
    go_back_to(2)
    assert start(shards, **changes) == 0
    runs.assert_same_bits(runs.checkpoint(Path("run"), 4), expected)


def test_a_finished_run_says_so_and_changes_nothing(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(shards) == 0
    before = files("checkpoints/*", "encoders/*")
    metrics = runs.metrics(Path("run"))
    capsys.readouterr()
    before_that = state.environment
    monkeypatch.setattr(state, "environment", lambda world: {**before_that(world), "world_size": 2})
    assert start(shards) == 0
    done = capsys.readouterr()
    assert done.out == "done already: 6 steps; encoder run/encoders/step-00000006.safetensors\n"
    assert "WARNING" not in done.err, "of another number of processes: no step is done by them"
    assert files("checkpoints/*", "encoders/*") == before
    assert len(before) == 2 * 2 + 3
    assert runs.metrics(Path("run")) == metrics
    assert status()["state"] == "done"


def test_a_run_can_be_made_longer(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards) == 0
    capsys.readouterr()
    assert start(shards, "--steps", "9", "--checkpoint.export_every", "7") == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0].startswith(
        "WARNING: steps: 9: 9 steps and not 6 as before, so the learning rate goes from 0 to "
    )
    assert "resumed at step 6" in out
    exports = ["step 7: exported run/encoders/step-00000007.safetensors"]
    assert [line for line in out.splitlines() if "exported" in line] == exports
    assert "done: 9 steps; encoder run/encoders/step-00000009.safetensors" in out
    assert [line["step"] for line in runs.metrics(Path("run"))] == list(range(1, 10))
    assert status()["state"] == "done"
    assert Path("run/encoders/step-00000009.safetensors").exists()


def test_the_same_images_in_other_shards_are_another_order(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, steps=3) == 0
    write_shards(shards.parent / "images", Path("recut"), shard_size=50, processes=1)
    assert load_manifest("recut").digest == load_manifest(shards).digest
    before = files("*.*", "checkpoints/*")
    capsys.readouterr()
    assert start(Path("recut").resolve(), steps=4) == 2
    assert "holds other images than the run began with" in capsys.readouterr().err
    assert files("*.*", "checkpoints/*") == before


def test_a_run_without_its_kernels_says_so(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "kernel_problem", lambda *_: "Triton cannot compile: gcc fails")
    assert start(shards, steps=2) == 0
    line = "WARNING: colour and loss are computed by plain torch operations, which are slower: Triton cannot compile: gcc fails"
    assert line in Path("run/train.log").read_text()


def test_what_ranks_refuse_leaves_no_run_and_a_done_one_as_it_was(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> str:
        raise ConfigError("compile: true: there is no Triton")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "kernel_problem", missing)
        assert start(shards) == 2
    assert not Path("run").exists()
    assert start(shards) == 0
    before = files("*")
    capsys.readouterr()
    assert start(shards, steps=4) == 2
    assert "steps: 4: the run in run has done 6 already; " in capsys.readouterr().err
    assert files("*") == before


def test_bfloat16_on_a_cpu_without_it_is_said(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_dist.config.together.has_bfloat16", lambda: False)
    assert start(shards, "--precision", "bf16", steps=2) == 0
    assert "WARNING: precision: bf16: this CPU has no instructions for it: " in Path("run/train.log").read_text()


def test_each_step_draws_by_its_number_and_images(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout is keyed by what the loop hands in; a run that goes on counts from where it was."""
    seen: list[tuple[int, list[int]]] = []
    training_step = loop.training_step

    def noted(*arguments: Any, rows: Any, step: int) -> dict[str, torch.Tensor]:
        seen.append((step, torch.cat(list(rows)).tolist()))
        return training_step(*arguments, rows=rows, step=step)

    monkeypatch.setattr(loop, "training_step", noted)
    assert start(shards, steps=3) == 0
    assert start(shards, steps=5) == 0
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    first_epoch = [row for _, rows in seen[:2] for row in rows]
    assert len(set(first_epoch)) == len(first_epoch)


def test_a_run_from_published_weights_says_so_and_outlives_them(shards: Path) -> None:
    published = untrained_encoder(
        {"encoder": "resnet10", "width": 1, "stem": "small_stride2", "image_size": 16}, seed=5
    ).state_dict()
    named = {f"module.encoder_q.{name}": tensor for name, tensor in published.items()}
    torch.save({"state_dict": {**named, "module.queue": torch.zeros(2)}}, "theirs.pth")
    model = {"init": "file", "init_file": "theirs.pth"}
    assert start(shards, model=model, steps=2, optim={"base_lr": 0.0}) == 0
    encoder = load_encoder("run/encoders/step-00000002.safetensors")
    assert torch.equal(encoder.conv1.weight, published["conv1.weight"]), "at a rate of 0 nothing has moved"
    said = encoder.card["init"]
    assert said.startswith("file theirs.pth: sha256 ")
    assert "behind 'state_dict.module.encoder_q.', all of the encoder's numbers; left out: queue 1; how they" in said
    assert f"started from: {said}; fp32 on cpu" in Path("run/train.log").read_text()

    Path("theirs.pth").unlink()
    assert start(shards, model=model, steps=3, optim={"base_lr": 0.0}) == 0, "a resumed run needs them no more"
    assert load_encoder("run/encoders/step-00000003.safetensors").card["init"] == said


def test_start_weights_that_do_not_fit_are_refused_before_there_is_a_run(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = untrained_encoder({"encoder": "resnet18", "width": 1, "stem": "imagenet", "image_size": 16}, seed=5)
    torch.save(other.state_dict(), "other.pth")
    Path("damaged.pth").write_bytes(b"PK")
    reasons = {"absent.pth": "cannot read the weights", "damaged.pth": "no whole file", "other.pth": "of these settings has"}
    for name, reason in reasons.items():
        assert start(shards, model={"init": "file", "init_file": name}, steps=2) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"simclr-dist: model.init_file: {name}: ")
        assert reason in line
        assert not Path("run").exists()


def test_fewer_steps_than_are_done_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, steps=4) == 0
    before = files("checkpoints/*", "encoders/*")
    capsys.readouterr()
    assert start(shards, steps=3) == 2
    refused = "simclr-dist: steps: 3: the run in run has done 4 already; ask for more, or name another run_folder\n"
    assert capsys.readouterr().err == refused
    assert files("checkpoints/*", "encoders/*") == before


def test_another_seed_is_another_run(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, steps=3) == 0
    before = files("*.*", "checkpoints/*", "encoders/*")
    capsys.readouterr()
    assert start(shards, "--seed", "1", steps=3) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("simclr-dist: run_folder: 'run' holds another run (seed: 0 -> 1)")
    assert files("*.*", "checkpoints/*", "encoders/*") == before


def test_other_images_are_another_run(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, steps=3) == 0
    shutil.copytree(shards, "moved")
    assert start(Path("moved").resolve(), steps=4) == 0, "the same images elsewhere"
    others = runs.make_shards(Path("others").resolve(), seed=1)
    before = files("checkpoints/*", "encoders/*", "metrics.jsonl")
    capsys.readouterr()
    assert start(others, steps=5) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"simclr-dist: data\.shards: '.*/others/shards' holds other images than the run began with.*", line)
    assert files("checkpoints/*", "encoders/*", "metrics.jsonl") == before


@pytest.mark.parametrize("arguments", [[], ["--seed", "1"], ["missing.yaml"]])
def test_a_call_without_a_config_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("simclr-dist: ")


def test_a_diverging_run_ends_and_names_the_last_good_checkpoint(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"name": "sgd", "lr_rule": "constant", "base_lr": 1.0e30, "clip_norm": 0.0, "warmup_steps": 0}
    changes: dict[str, Any] = {"steps": 60, "max_skipped_steps": 4, "checkpoint": {"every": 1}}
    assert start(shards, optim=optim, **changes) == 3
    skipped = {int(line["step"]): line["optim/skipped_steps"] for line in runs.metrics(Path("run"))}
    last = max(skipped)
    assert skipped[last] == 4
    assert skipped[last - 4] == 0
    good = f"run/checkpoints/step-{last - 4:08d}.pt"
    # With one checkpoint a step and three kept, the good one is gone; so it must be said.
    (line,) = our_lines(capsys.readouterr().err)
    assert line.startswith(f"simclr-dist: diverged: step {last}: 4 steps in a row were not finite; last good checkpoint: none")
    assert status()["state"] == "diverged"
    assert status()["exit_code"] == 3

    shutil.rmtree("run")
    changes["checkpoint"] = {"every": 1, "keep_last": 9}
    assert start(shards, optim=optim, **changes) == 3
    assert f"last good checkpoint: {good}; " in capsys.readouterr().err
    assert f"last good checkpoint: {good}; " in status()["reason"]
    state = runs.checkpoint(Path("run"), last - 4)
    assert state["counters"]["skipped"] == 0
    # The skipped steps have left nothing behind.
    for name, value in runs.checkpoint(Path("run"), last - 1)["model"].items():
        assert torch.equal(value, state["model"][name]) or name.endswith("num_batches_tracked")


def test_a_lower_max_skipped_steps_counts_what_this_start_sees(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier start has survived ends no healthy run; what is logged is still of the whole run."""
    backward, bad = loop.backward, {2, 3, 4}

    def failing(*arguments: Any, step: int, **more: Any) -> tuple[torch.Tensor, ...]:
        loss, *z = backward(*arguments, step=step, **more)
        return (loss * torch.nan if step in bad else loss), *z

    monkeypatch.setattr(loop, "backward", failing)
    assert start(shards, steps=6, max_skipped_steps=5) == 0
    assert start(shards, steps=9, max_skipped_steps=3) == 0
    assert [line["optim/longest_skip"] for line in runs.metrics(Path("run"))] == [0, 0, 1, 2, 3, 3, 3, 3, 3]
    bad |= {9, 10, 12}
    assert start(shards, steps=13, max_skipped_steps=3) == 0
    assert [line["optim/skipped_steps"] for line in runs.metrics(Path("run"))][9:] == [4, 5, 5, 6]
    bad |= {13, 14}
    assert start(shards, steps=20, max_skipped_steps=3) == 3, "one of the three before this start"
    found = "step 15: 3 steps in a row were not finite; last good checkpoint: run/checkpoints/step-00000010.pt; "
    assert found in status()["reason"]


@pytest.mark.slow
def test_tensorboard_goes_on_where_the_checkpoint_was(shards: Path) -> None:
    assert start(shards, steps=12, log={"tensorboard": True}) == 0
    go_back_to(5)
    assert start(shards, steps=12, log={"tensorboard": True}) == 0
    assert [len(list(Path("run/tb").glob(files))) for files in ("events*", "second/events*")] == [2, 2]
    second = EventAccumulator("run/tb/second", size_guidance={"scalars": 0}).Reload()
    events = EventAccumulator("run/tb", size_guidance={"scalars": 0, "images": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {*METRICS[1:-1], *TIMING} - SECOND
    assert set(second.Tags()["scalars"]) == {*METRICS[1:-1], *TIMING} & SECOND
    lines = runs.metrics(Path("run"))
    for name in ("loss/nt_xent", "loss/chance", "optim/learning_rate", "optim/gradient_norm"):
        scalars = (second if name in SECOND else events).Scalars(name)
        assert [scalar.step for scalar in scalars] == list(range(1, 13))
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)
    (views,) = events.Images("views")
    assert views.step == 0
    # 16 images, each with its two views side by side: 4 a row, 4 rows.
    assert (views.width, views.height) == (4 * (2 * 16 + 8) + 8, 4 * (16 + 8) + 8)


def test_tensorboard_has_the_steps_before_an_error(shards: Path) -> None:
    bad, _ = damage(shards, rows_of_step(load_manifest(shards), 3)[:1])
    assert start(bad, log={"tensorboard": True}) == 2
    events = EventAccumulator("run/tb").Reload()
    assert [scalar.step for scalar in events.Scalars("loss/nt_xent")] == [1, 2, 3]


def test_micro_batches(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shards, "--micro-batches", "4", "--precision", "fp64", steps=3) == 0
    assert "24 = 4 micro-batches x 1 rank x 6" in capsys.readouterr().out
    lines = runs.metrics(Path("run"))
    assert {line["loss/negatives_an_anchor"] for line in lines} == {46}
    # BatchNorm's group is a micro-batch, so its statistics are updated four times a step.
    assert runs.checkpoint(Path("run"), 3)["model"]["encoder.bn1.num_batches_tracked"] == 12


def test_bf16(shards: Path) -> None:
    assert start(shards, "--precision", "bf16", steps=2) == 0
    lines = runs.metrics(Path("run"))
    assert all(np.isfinite(line["loss/nt_xent"]) for line in lines)
    assert all(value.dtype != torch.bfloat16 for value in runs.checkpoint(Path("run"), 2)["model"].values())


def test_a_bad_image_ends_the_run_with_one_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = rows_of_step(load_manifest(shards), 2)[5]
    bad, m = damage(shards, [row])
    assert start(bad) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"simclr-dist: {bad}/{m.shards[m.shard[row]]}: image {m.key[row]}: ")
    assert status()["state"] == "failed"
    assert status()["exit_code"] == 2
    assert status()["reason"] == line.removeprefix("simclr-dist: ")


@pytest.mark.slow
@pytest.mark.parametrize("slot", [5, 20])  # on rank 0, on rank 1
def test_a_bad_image_ends_all_ranks_with_one_line(shards: Path, capfd: pytest.CaptureFixture[str], slot: int) -> None:
    row = rows_of_step(load_manifest(shards), 2)[slot]
    bad, m = damage(shards, [row])
    config = runs.write_config(Path(), bad)
    assert torchrun(2, ["-m", "simclr_dist.train", str(config)], Path("run")) == 2
    (line,) = our_lines(capfd.readouterr().err)
    assert line.endswith(status()["reason"])
    assert f": image {m.key[row]}: " in line
    assert status()["state"] == "failed"


@pytest.mark.slow
def test_bad_images_are_replaced_and_listed(shards: Path) -> None:
    m = load_manifest(shards)
    rows = [rows_of_step(m, 1)[3], rows_of_step(m, 4)[0]]
    bad, m = damage(shards, rows)
    assert start(bad, steps=7, data={"on_bad_sample": "replace"}) == 0
    listed = Path("run/bad_samples.txt").read_text().splitlines()
    names = {f"{bad}/{m.shards[m.shard[row]]}: image {m.key[row]}" for row in rows}
    assert {line.partition(": its bytes")[0] for line in listed} == names
    assert set(runs.checkpoint(Path("run"), 5)["bad_samples"]) == {m.key[row] for row in rows}
    assert [line["data/bad_samples"] for line in runs.metrics(Path("run"))] == [0, 1, 1, 1, 2, 2, 2]

    # A resumed run has not forgotten those before its checkpoint.
    go_back_to(5)
    assert start(bad, steps=7, data={"on_bad_sample": "replace"}) == 0
    assert Path("run/bad_samples.txt").read_text().splitlines() == listed
    assert [line["data/bad_samples"] for line in runs.metrics(Path("run"))] == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_bad_images_of_all_ranks_are_listed(shards: Path, tmp_path: Path) -> None:
    step = rows_of_step(load_manifest(shards), 1)
    bad, _ = damage(shards, [step[3], step[20]])
    for name, world_size in (("one", 1), ("two", 2)):
        runs.write_config(tmp_path / name, bad, steps=3, precision="fp64", data={"on_bad_sample": "replace"})
        runs.train(tmp_path / name, world_size)
    alone, shared = tmp_path / "one/run", tmp_path / "two/run"
    assert len((alone / "bad_samples.txt").read_text().splitlines()) == 2
    assert (shared / "bad_samples.txt").read_text() == (alone / "bad_samples.txt").read_text()
    assert runs.checkpoint(shared, 3)["bad_samples"] == runs.checkpoint(alone, 3)["bad_samples"]
    for line, expected in zip(runs.metrics(shared), runs.metrics(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-6)


def test_too_many_bad_images_end_the_run(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = load_manifest(shards)
    bad, _ = damage(shards, [rows_of_step(m, 1)[3], rows_of_step(m, 2)[7], rows_of_step(m, 4)[0]])
    assert start(bad, data={"on_bad_sample": "replace", "max_bad_samples": 1}) == 2
    (line,) = our_lines(capsys.readouterr().err)
    assert line.startswith("simclr-dist: data.max_bad_samples: 2 unreadable images are too many")
    assert status()["state"] == "failed"
    assert [entry["step"] for entry in runs.metrics(Path("run"))] == [1, 2]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(shards: Path, tmp_path: Path) -> None:
    runs.write_config(tmp_path, shards, steps=100000, data={"workers": 1})
    with runs.started(tmp_path, 1) as ranks:
        while not Path("run/metrics.jsonl").exists() or runs.last_step(Path("run")) < 3:
            assert ranks.wait(0.05) == [None], ranks.output
        (worker,) = ranks.children(0)
        os.kill(worker, signal.SIGKILL)
        begin = time.monotonic()
        assert ranks.wait() == [1], ranks.output
        assert time.monotonic() - begin < 60
        output = ranks.output
    assert status()["state"] == "crashed", output
    assert status()["exit_code"] == 1
    assert "DataLoader worker" in status()["reason"]
