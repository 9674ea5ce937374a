"""How far work is: a line that is rewritten on a terminal, lines elsewhere, and no silence of half a minute."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from simclr_dist.evaluate.watch import _Pause
from simclr_dist.system import progress
from simclr_dist.system.errors import say
from simclr_dist.system.progress import Progress
from terminal import terminal

WORK = """
import sys, time
from simclr_dist.system import progress, stdout
from simclr_dist.system.errors import say
progress.SECONDS = 0.2
with stdout.checked(), progress.Progress("verb"):
    with progress.Progress("reading", 4, "images") as shown:
        for number in range(4):
            shown.done += 1
            time.sleep(0.6)
            if number == 1:
                print("a result")
            if number == 2:
                say("a warning", "")
    print("the end")
"""

HELD_BACK = """
import os, signal
from simclr_dist.system import progress, signals
taken, spoken = [], progress.threading.Event()
signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
progress._REDRAWN = 0.01
progress.Progress.show = lambda _: spoken.set()
with progress.Progress("verb"), signals.blocked():
    os.kill(os.getpid(), signal.SIGUSR1)
    assert spoken.wait(30)
    assert not taken
assert taken == [signal.SIGUSR1]
"""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    monkeypatch.setattr(progress, "_REDRAWN", 0.01)


Until = Callable[[str], str]


@pytest.fixture
def until(capfd: pytest.CaptureFixture[str]) -> Until:
    """Wait for a pattern on standard error; returns what was there."""
    text = ""

    def wait(pattern: str) -> str:
        nonlocal text
        end = time.monotonic() + 60
        while not re.search(pattern, text):
            assert time.monotonic() < end, text
            text += capfd.readouterr().err
            time.sleep(0.005)
        return text

    return wait


def test_quick_work_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("verb"), Progress("reading", 4, "images") as shown:
        shown.done += 4
    assert capfd.readouterr() == ("", "")


def test_lines_also_while_the_work_waits(often: None, until: Until) -> None:
    """And the innermost block speaks for those around it."""
    with Progress("verb"):
        until(r"^verb: 0:00:00\n")
        with Progress("reading", 40, "images") as shown:
            until(r"\nreading: 0 of 40 images  0:00:00\n")
            shown.done += 10
            until(r"\nreading: 10 of 40 images  [\d.e+]+/s  0:0\d:\d\d left\n")
            shown.note = "half of it"
            until(r"\nreading: 10 of 40 images  half of it\n")
        text = until(r"half of it\nverb: ")
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_silent_verb_and_other_ranks_do_not_speak(often: None, until: Until) -> None:
    with Progress("verb"), Progress("other rank", 3, "images", shown=False) as shown:
        shown.done += 3
        assert "other rank" not in until("verb: ")


def test_a_watcher_that_waits_speaks(often: None, until: Until, tmp_path: Path) -> None:
    line = f"{tmp_path}: running; waiting for its next encoder"
    said: list[str] = []
    with closing(_Pause(tmp_path, 0.0, said.append, lambda _: until(f"{re.escape(line)}: 0:00:0"))) as pause:
        pause(line)
    assert said == [line]


def test_who_waits_for_days_speaks_ever_more_rarely(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """After half a minute, and then each time after twice as long, up to an hour. Looks between do not count."""
    now, line = 1000.0, "RUN: running; waiting for its next encoder"
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "_REDRAWN", 1e9)  # the clock is ours: no speaker
    pause, times = _Pause(Path(), 0.0, lambda _: None, lambda _: None), []
    with closing(pause):
        for now in range(1000, 1000 + 4 * 3600, 30):
            pause(line)
            progress._open[-1].show()
            times += [now - 1000] * bool(capfd.readouterr().err)
    assert times == [30, 60, 120, 240, 480, 960, 1920, 3840, 7440, 11040]


def test_a_block_in_one_that_counts_leaves_no_line(often: None, until: Until) -> None:
    """As the images of each of ninety epochs. The epochs leave theirs, whoever has spoken for them."""
    with Progress("verb"):
        with Progress("all", 2, "epochs") as shown:
            for epoch in range(2):
                with Progress(f"epoch {epoch}", 3, "images") as inner:
                    until(f"epoch {epoch}: 0 of 3")
                    inner.done = 3
                shown.done += 1
        text = until("all: 2 of 2 epochs")
    assert not re.search("epoch .: 3 of 3 images  [^0]", text)


def test_a_signal_that_is_held_back_is_not_taken_by_the_speaker() -> None:
    """In a process of its own: threads of torch take signals, too."""
    done = subprocess.run([sys.executable, "-c", HELD_BACK], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_child_may_speak(often: None, until: Until) -> None:
    with Progress("verb"):
        until("verb: ")
        if (child := os.fork()) == 0:
            say("of the child", "")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        until("of the child\n")


def test_a_terminal_has_one_line_that_is_rewritten(tmp_path: Path) -> None:
    """What is printed meanwhile stands in lines of its own."""
    with terminal([sys.executable, "-c", WORK], tmp_path) as shell:
        assert shell.close() == 0
    assert "\x1b" not in shell.raw
    text = shell.raw.replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    assert [line for line in lines if line in ("a result", "a warning", "the end")] == ["a result", "a warning", "the end"]
    assert re.fullmatch(r"reading: 4 of 4 images  [\d.]+/s  0:00:0\d", lines[-3])
    assert len(re.findall(r"\rreading: \d of 4 images  [\d.]+/s  0:00:0\d left", text)) > 2
    assert len(lines) == 5


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_terminal_that_cannot_and_one_without_colours(tmp_path: Path, environment: dict[str, str]) -> None:
    with terminal([sys.executable, "-c", WORK], tmp_path, environment) as shell:
        assert shell.close() == 0
    assert "\x1b" not in shell.raw
    assert ("\r" in shell.raw.replace("\r\n", "\n")) == ("TERM" not in environment)
    assert "reading: 2 of 4 images" in shell.shown


def test_a_terminal_of_no_width_gets_lines(tmp_path: Path) -> None:
    no_width = "import termios; termios.tcsetwinsize(2, (0, 0))"
    with terminal([sys.executable, "-c", no_width + WORK], tmp_path) as shell:
        assert shell.close() == 0
    assert "\r" not in shell.raw.replace("\r\n", "\n")
    assert "reading: 2 of 4 images" in shell.shown


def test_a_terminal_that_has_gone_costs_nothing(often: None, tmp_path: Path) -> None:
    gone = "import os, pty; master, slave = pty.openpty(); os.dup2(slave, 2); os.close(slave); os.close(master)\n"
    with terminal([sys.executable, "-c", gone + WORK], tmp_path) as shell:
        assert shell.close() == 0
    assert "the end" in shell.shown


def test_without_standard_error_nothing_is_said(
    often: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least of all on standard output, which a program may read."""
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("verb"):
        assert not progress._open
    assert capfd.readouterr() == ("", "")


def test_a_line_that_is_being_drawn_is_taken_away_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, done = threading.Event(), threading.Event()
    monkeypatch.setattr(progress, "_REDRAWN", 0.001)

    def draw(_: Progress) -> None:
        drawing.set()
        time.sleep(0.2)
        done.set()

    monkeypatch.setattr(Progress, "show", draw)
    with Progress("verb"):
        assert drawing.wait(30)
    assert done.is_set()
