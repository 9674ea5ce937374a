"""Completion in real shells: Tab is pressed, and the word is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_dist.cli.options import key_values
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.config.strict_yaml import leaves
from terminal import TAB, terminal

READY = "ready> "
START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "--no-rcs", "-i"],
}
SET_UP = {
    "bash": "PS1='ready''> '; source <(simclr-dist --print-completion bash)\n",
    "zsh": "PS1='ready''> '; autoload -U compinit; compinit -D -u; source <(simclr-dist --print-completion zsh)\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where completion happens: a config, a folder and a file that is no config."""
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


KILL_LINE = "\x15"
TABS = {  # what is typed, and what stands there after Tab
    "simclr-dist tra": "simclr-dist train ",
    "simclr-dist --vers": "simclr-dist --version ",
    "simclr-dist train mi": "simclr-dist train mine.yaml",
    "simclr-dist train mine.yaml --optim.na": "--optim.name ",
    "simclr-dist train mine.yaml --optim.name adamw --nno": "adamw --nnodes ",
    "simclr-dist train mine.yaml --precision b": "--precision bf16 ",
    "simclr-dist submit can": "simclr-dist submit cancel ",
    "simclr-dist plan mine.yaml --model.projector_di": "--model.projector_dim ",
    "simclr-dist eval --protocols li": "--protocols linear ",
    "simclr-dist train mine.yaml --sweep optim.base": "--sweep optim.base_lr=",
    "simclr-dist shard pho": "simclr-dist shard photos/",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_tab(name: str, folder: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    with terminal(START[name], folder, {"HOME": str(folder), "HISTFILE": ""}) as shell:
        shell.press(SET_UP[name])
        shell.wait_for(re.escape(READY))
        for typed, completed in TABS.items():
            shell.press(typed + TAB)
            shell.wait_for(re.escape(completed))
            shell.press(KILL_LINE)
        shell.press("simclr-dist train mine.yaml --optim.w" + TAB + TAB)
        for key in ("weight_decay", "warmup_epochs", "warmup_steps"):
            shell.wait_for(key)


@pytest.mark.slow
def test_fish(folder: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")

    def complete(line: str) -> list[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"simclr-dist --print-completion fish | source; complete -C {line!r}"],
            capture_output=True, text=True, check=True, cwd=folder, env={**os.environ, "PATH": path, "HOME": str(folder)},
        )  # fmt: skip
        return [word.partition("\t")[0] for word in done.stdout.splitlines()]

    assert complete("simclr-dist tra") == ["train"]
    assert complete("simclr-dist train mine.yaml --optim.na") == ["--optim.name"]
    assert complete("simclr-dist train mine.yaml --precision b") == ["bf16"]
    assert complete("simclr-dist eval --arch resnet3") == ["resnet34"]
    assert "mine.yaml" in complete("simclr-dist train m")


def test_every_setting_is_offered_with_values_that_the_config_takes(tmp_path: Path) -> None:
    offered = {key: key_values(key) for key, _ in leaves(Config().to_dict())}
    assert offered["precision"] == ("fp32", "bf16", "fp16", "fp64")
    assert offered["model.width"] == ("1", "2", "4")
    assert offered["views.interpolation"] == ("bicubic", "bilinear")
    assert offered["compile"] == ("true", "false")
    assert offered["seed"] == ()
    config = tmp_path / "config.yaml"
    config.write_text("{run_folder: r, steps: 1, data: {shards: s}, channels_last: false}\n")
    for key, values in offered.items():
        if key.startswith(
            ("model.init", "activation_checkpointing", "channels_last", "compile", "data.reader", "data.allow_pipe")
        ):
            continue  # some of their values need another setting beside them
        for value in values:
            load_config(config, [f"--{key}", value])
