"""The documents' commands, typed as they stand there: with few tiny images and steps, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import simclr_dist
from forkserver import completed
from simclr_dist.cli.main import main, make_parser
from simclr_dist.config.load import load_config
from simclr_dist.preflight.demo.images import CLASSES, render

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:\.venv/bin/)?simclr-dist (.+)")

# Behind the tutorial's Python: torchvision's network and transforms give what ours give.
SAME = """
images = torch.randn(3, 3, card["image_size"], card["image_size"])
with torch.no_grad():
    torch.testing.assert_close(plain(images), encoder(images))
image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
torch.testing.assert_close(preprocess(image), encoder.preprocess(image))
"""

# What makes the tutorial's run small enough for a test.
SMALLER = {
    "global_batch_size: 256": "global_batch_size: 32\ndevice: cpu",
    "epochs: 200": "steps: 2",
    "  image_size: 128": "  image_size: 32",
    "  encoder: resnet18": "  encoder: resnet10\n  stem: small_stride2\n  projector_hidden: 16\n  projector_dim: 8",
    "  warmup_epochs: 10": "  warmup_steps: 1",
    "train\nviews": "train\n  workers: 1\nviews",
}


def indented(document: Path) -> list[str]:
    """The lines of its indented blocks, without comments behind them."""
    lines = document.read_text(encoding="utf-8").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("    ")]


def fenced(document: Path, language: str) -> list[str]:
    """Its blocks in that language."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def commands(document: Path) -> list[str]:
    """What it says behind `simclr-dist`, in its order."""
    return [match[1] for line in indented(document) if (match := COMMAND.fullmatch(line))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_can_be_typed(document: Path) -> None:
    """Also those that need a cluster, which tests/slurm and tests/submit run: no verb or option in them is unknown."""
    inline = re.findall(r"`(?:\.venv/bin/)?simclr-dist ((?:[a-z]+ )[^`]*--[^`]*)`", document.read_text(encoding="utf-8"))
    for command in [*commands(document), *(" ".join(line.split()) for line in inline)]:
        if command in ("--help", "shard --index", "shard --verify") or re.search(r"[\[|]|\.\.\.", command):
            continue
        known, rest = make_parser().parse_known_args(shlex.split(command))
        assert known.verb, command
        assert not rest or hasattr(known, "config"), f"{command}: {rest}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    tutorial = ROOT / "docs" / "tutorial.md"
    for number in range(60):
        path = tmp_path / "PHOTOS" / CLASSES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(number % 3, np.random.default_rng(number), size=40)).save(path)
    config = fenced(tutorial, "yaml")[0]
    for old, new in SMALLER.items():
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "my.yaml").write_text(config)
    (tmp_path / "launch").symlink_to(ROOT / "launch")

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    typed = commands(tutorial)
    assert [command.split()[0] for command in typed] == [
        "--help", "train", "shard", "plan", "train", "eval", "eval", "finetune", "embed", "export", "export", "check", "submit",
    ]  # fmt: skip
    for command in typed:
        words = shlex.split(command.replace("step-00001000", "step-00000002"))
        words += ["--epochs", "1", "--seeds", "1"] if words[0] == "finetune" else []
        words += ["--device", "auto", "--run_folder", "runs/cluster"] if words[0] == "submit" else []  # on machines with GPUs
        done = completed(main, words, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for made in ("runs/mine/eval/step-00000002.json", "runs/mine/eval/step-00000002.html", "features.parquet", "mine.onnx"):
        assert (tmp_path / made).stat().st_size > 1000, made
    python = "".join([*fenced(tutorial, "python"), SAME]).replace("step-00001000", "step-00000002")
    run = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "128\nTrue\n"


def test_the_tutorials_configs_are_configs(tmp_path: Path) -> None:
    """The second is for a few hundred pictures: a batch that leaves room for an epoch of several steps."""
    configs = []
    for number, text in enumerate(fenced(ROOT / "docs" / "tutorial.md", "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        configs.append(load_config(tmp_path / f"{number}.yaml"))
    _, small = configs
    assert small.device == "cpu"
    assert small.global_batch_size <= 256 // 4
    assert small.total_steps(256) == 800


def test_every_message_of_the_troubleshooting_page_is_one() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE)
    said = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "simclr_dist").rglob("*.py"))
    for cell in first_cells:
        for quoted in re.findall(r"`([^`]+)`", cell):
            assert quoted in said, quoted
    assert len(first_cells) > 20


@pytest.mark.slow
def test_the_api_reference(tmp_path: Path) -> None:
    """Every public name has a text there, and every room a page."""
    command = [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    front = (tmp_path / "simclr_dist.html").read_text(encoding="utf-8")
    for name in simclr_dist.__all__:
        assert re.search(rf'id="{name}"(?:(?!<section).)*?class="docstring"', front, re.DOTALL), name
    for page in ("method/loss", "method/optim", "data/reader", "evaluate/protocols/linear", "encoder/file"):
        assert (tmp_path / "simclr_dist" / f"{page}.html").exists(), page
