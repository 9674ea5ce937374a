"""`compile: true` on a CPU: what the compiled colour does to a run. torch.compile itself, which takes minutes, stays away."""

from pathlib import Path

import pytest
import torch

import training_runs as runs

pytestmark = pytest.mark.slow


def the_encoder_as_it_is() -> None:
    torch._dynamo.config.disable = True


def train(folder: Path) -> None:
    with runs.started(folder, 2, hook=the_encoder_as_it_is) as ranks:
        assert ranks.wait(600.0) == [0, 0], ranks.output


def killed_after(folder: Path, step: int) -> None:
    with runs.started(folder, 2, hook=the_encoder_as_it_is) as ranks:
        ranks.until(lambda: runs.last_step(folder / "run") >= step)
        ranks.kill()


@pytest.mark.usefixtures("compiler")
def test_a_run_with_compiled_colour_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Its views are the others' up to rounding, and that they are not the same bits shows who made them."""
    shards = runs.make_shards(tmp_path / "images")
    plain, straight, killed = tmp_path / "plain", tmp_path / "straight", tmp_path / "killed"
    for folder in (plain, straight, killed):
        runs.write_config(folder, shards, compile=folder != plain, checkpoint={"every": 3}, steps=20)
    train(straight)
    killed_after(killed, 4)
    assert not (killed / "run/encoders").exists()
    train(killed)
    runs.assert_same_bits(runs.checkpoint(killed / "run", 20), runs.checkpoint(straight / "run", 20))
    assert runs.metrics(killed / "run") == runs.metrics(straight / "run")

    train(plain)
    first, of_others = (runs.metrics(folder / "run")[0]["loss/nt_xent"] for folder in (straight, plain))
    assert first == pytest.approx(of_others, abs=1e-4)
    assert first != of_others


def test_without_a_compiler_a_run_ends_in_one_line(tmp_path: Path) -> None:
    runs.write_config(tmp_path, runs.make_shards(tmp_path / "images", images=30), compile=True)
    with runs.started(tmp_path, 2, environment={"CXX": "no-such-compiler"}) as ranks:
        assert ranks.wait() == [2, 2]
        line = (
            "simclr-dist: compile: true: needs a C++ compiler: 'no-such-compiler' is not found (CXX names another); install it"
        )
        assert [text for text in ranks.output.splitlines() if "compiler" in text] == [f"{line}, or set compile: false"]
    assert not (tmp_path / "run").exists()
