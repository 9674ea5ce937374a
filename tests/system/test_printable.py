"""What comes from files gives no command to a terminal, by whichever way it is shown."""

import io
import sys
from pathlib import Path

import pytest

from simclr_dist.cli.main import main
from simclr_dist.system import stdout
from simclr_dist.system.errors import LAYOUT, printable, say


def test_control_characters_are_escaped() -> None:
    assert printable("é\u4e00 ok") == "é\u4e00 ok"
    assert printable("\x1b[2J\r\x07\x9b\u202e\udcff\n") == r"\x1b[2J\r\x07\x9b\u202e\udcff\n"
    assert printable("a\tb\r\n", keep=LAYOUT) == "a\tb\\r\n"


def test_standard_output_and_the_program_s_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say("x\x1b[2J: no\tsuch thing")
    assert capsys.readouterr().err == "simclr-dist: x\\x1b[2J: no\tsuch thing\n"
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with stdout.checked():
        print("class \x1b]0;t\x07\n\tis 1\r")
    assert shown.getvalue() == "class \\x1b]0;t\\x07\n\tis 1\\r\n"


def test_a_run_s_lines_and_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr_dist.train.monitor.voice import Monitor

    Monitor(tmp_path, active=True, total_steps=1, first_step=0, tensorboard=False).say("new run: \x1b[2J\n  data")
    assert capsys.readouterr().out == (tmp_path / "train.log").read_text() == "new run: \\x1b[2J\n  data\n"


def test_a_name_in_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "\x1b[31m.yaml"]) == 2
    assert capfd.readouterr().err.startswith(r"simclr-dist: \x1b[31m.yaml: cannot read the config")
