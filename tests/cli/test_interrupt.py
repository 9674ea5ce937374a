"""Ctrl-C on a terminal: every verb ends with one line that says what is saved and how to go on, and with its exit code."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import training_runs as runs
from simclr_dist.convert.shards import write_shards
from simclr_dist.run.status import read_status
from simclr_dist.system.errors import PREEMPTED
from terminal import INTERRUPT, Terminal, terminal

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("simclr-dist")
NEVER_ENDS = 1_000_000  # steps, or epochs
COPIES = 40  # of each image, in a folder that takes seconds to read

# The demo with a config and images that suit a test.
DEMO = """
import sys
from pathlib import Path
from simclr_dist.preflight.demo import run as demo
from simclr_dist.cli.main import main
demo.CONFIG, demo.DATA = Path("demo.yaml"), Path("data")
sys.exit(main(["demo", "--folder", "demo", "--processes", "1"]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, shards/, many/ (images), config.yaml, and run/ with an encoder."""
    folder = tmp_path_factory.mktemp("trained")
    shards = runs.make_shards(folder)
    runs.write_config(folder, shards, steps=2)
    runs.train(folder, 1)
    for image in (folder / "images").rglob("*.png"):
        for copy in range(COPIES):
            path = folder / "many" / image.parent.name / f"{copy}-{image.name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(image)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """`trained` to work in: nothing that is written reaches another test."""
    for name in ("shards", "run", "many"):
        (tmp_path / name).symlink_to(trained / name)
    shutil.copytree(trained / "run", tmp_path / "done")
    runs.write_config(tmp_path, tmp_path / "shards", steps=NEVER_ENDS, run_folder="new")
    return tmp_path


def encoder() -> str:
    return "done/encoders/step-00000002.safetensors"


def stopped(shell: Terminal) -> tuple[int, str]:
    """Exit code and last line of a program that gets Ctrl-C now; all that it says of it is that line."""
    before = len(shell.shown)
    shell.press(INTERRUPT)
    code = shell.close()
    after = shell.shown[before:]
    assert "Traceback" not in shell.shown, shell.shown
    assert "KeyboardInterrupt" not in shell.shown, shell.shown
    lines = re.findall(r"simclr-dist: .*", after)
    assert len(lines) == 1, shell.shown
    # The parent of a submitted job has one signal for all that it is sent.
    return code, lines[0].removeprefix("simclr-dist: ").replace("SIGTERM", "SIGINT")


SETS = ["--train", "shards", "--test", "shards", "--device", "cpu"]
EVALUATE = ["eval", encoder(), *SETS, "--protocols", "mlp", "--mlp-epochs", str(NEVER_ENDS), "--no-baselines"]
FINETUNE = ["finetune", encoder(), *SETS, "--labels", "1", "--epochs", str(NEVER_ENDS)]


@pytest.mark.parametrize(
    ("arguments", "when", "code", "line"),
    [
        (["train", "config.yaml"], "step +[1-9]", PREEMPTED,
         "stopped by SIGINT: everything is saved, and the same command goes on"),
        (EVALUATE, r"features of \d+ images", PREEMPTED, "stopped by SIGINT; the same command starts the evaluation again"),
        (FINETUNE, r"seed 0", PREEMPTED, "stopped by SIGINT; the same command starts the finetuning again"),
        (["embed", encoder(), "many", "out.parquet", "--batch-size", "8"], r"[1-9]\d* images", PREEMPTED,
         "stopped by SIGINT, nothing is written; the same command starts again"),
        (["shard", "many", "new-shards", "--processes", "1"], "decoding", 130,
         "interrupted; DST is not there yet, and the same command goes on from DST.partial"),
        (["shard", "many", "new-shards", "--processes", "2"], r"decoding: +[1-9]", 130,
         "interrupted; DST is not there yet, and the same command goes on from DST.partial"),
        (["submit", "config.yaml", "--local"], "step +[1-9]", PREEMPTED,
         "stopped by SIGINT: everything is saved, and the same command goes on"),
    ],
    ids=["train", "eval", "finetune", "embed", "shard", "shard in processes", "submit"],
)  # fmt: skip
def test_one_line_and_the_code(here: Path, arguments: list[str], when: str, code: int, line: str) -> None:
    with terminal([PROGRAM, *arguments], here) as shell:
        shell.wait_for(when)
        assert stopped(shell) == (code, line)
    left = {path.name for path in here.iterdir()} - {"shards", "run", "many", "done", "config.yaml"}
    assert left <= {"new", "new-shards.partial"}, "a part of something is left"
    if "new" in left:
        assert read_status(here / "new")["state"] == "preempted"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config.yaml", "--global_batch_size", "20000", "--micro_batches", "100", "--processes", "2"],
        ["plan", "config.yaml", "--measure", "--processes", "2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_ranks_that_have_nothing_to_save(here: Path, arguments: list[str]) -> None:
    """They do not outlive their parent either."""
    with terminal([PROGRAM, *arguments], here, {"PYTHONVERBOSE": ""}) as shell:
        runs.until(lambda: any("libtorch" in maps(rank) for rank in ranks(shell)) or shell.process.poll() is not None)
        started = ranks(shell)
        assert stopped(shell) == (130, "interrupted; the same command starts again")
        runs.until(lambda: not any(map(maps, started)))


def ranks(shell: Terminal) -> list[int]:
    """What torchrun has started."""
    return [rank for agent in runs.children(shell.process.pid) for rank in runs.children(agent)]


def maps(process: int) -> str:
    """What it has loaded: nothing when it has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return ""


def test_the_demo_goes_on_where_it_was(here: Path, trained: Path) -> None:
    """In its images, in training, and in the evaluation; then it comes to its end."""
    with terminal([PROGRAM, "demo"], here) as shell:
        shell.wait_for("generating")
        assert stopped(shell) == (130, "interrupted; finished parts stay, and the same command goes on")
    shutil.rmtree(here / "data", ignore_errors=True)

    for name in ("train", "test"):
        write_shards(trained / "images", here / "data" / name, shard_size=100, processes=1)
    runs.write_config(here, here / "data" / "train", steps=150)
    (here / "config.yaml").rename(here / "demo.yaml")
    command = [sys.executable, "-c", DEMO]
    with terminal(command, here) as shell:
        shell.wait_for("step +[1-9]")
        assert stopped(shell) == (PREEMPTED, "stopped by SIGINT: everything is saved, and the same command goes on")
    with terminal(command, here) as shell:
        shell.wait_for("done: 150 steps")
        line = "stopped by SIGINT; training is done and saved, and the same command goes on with the evaluation"
        assert stopped(shell) == (PREEMPTED, line)
    with terminal(command, here) as shell:
        shell.wait_for("picture: demo/demo.png")
        assert shell.close() in (0, 1), "1: it has not learned much in 150 steps"
