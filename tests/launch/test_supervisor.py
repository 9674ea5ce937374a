"""The parent without torch: exit codes, signals handed on, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.launch.supervisor import children


def parent(code: str, *arguments: str) -> subprocess.Popen[str]:
    text = (
        "import sys\nfrom simclr_dist.launch import supervisor\nfrom simclr_dist.system import signals\nsignals.listen()\n"
        + code
    )
    return subprocess.Popen([sys.executable, "-c", text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> str:
    for _ in range(1000):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} does not appear")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("child", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)])
def test_the_exit_code_is_the_childs(child: str, code: int) -> None:
    run = parent(f"print(supervisor.supervise([sys.executable, '-c', 'import os, sys; {child}']))")
    assert run.communicate(timeout=60) == (f"{code}\n", "")


LISTENER = """
import os, sys, time
from simclr_dist.system import signals
signals.listen()
open(sys.argv[1], "w").write(f"{os.getpid()}\\n")
while not signals.requested():
    time.sleep(0.01)
sys.exit(signals.requested())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_handed_on(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "child.py").write_text(LISTENER)
    run = parent(
        "print(supervisor.supervise([sys.executable, *sys.argv[1:]]))", str(tmp_path / "child.py"), str(tmp_path / "pid")
    )
    wait_for(tmp_path / "pid")
    run.send_signal(number)
    assert run.communicate(timeout=60)[0] == f"{int(number)}\n"


def test_the_grandchildren_are_told_and_the_child_hears_nothing(tmp_path: Path) -> None:
    """torchrun does not listen: its ranks do."""
    (tmp_path / "child.py").write_text(LISTENER)
    (tmp_path / "agent.py").write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    )
    run = parent(
        "print(supervisor.supervise([sys.executable, *sys.argv[1:]], tell=supervisor.children))",
        *(str(tmp_path / name) for name in ("agent.py", "child.py", "pid")),
    )
    wait_for(tmp_path / "pid")
    agent = children(run.pid)
    assert len(agent) == 1
    os.kill(agent[0], signal.SIGTERM)  # SLURM signals it as well
    time.sleep(0.2)
    assert is_alive(agent[0])
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == "15\n"


def test_a_killed_parent_takes_its_child_along(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(LISTENER)
    run = parent("supervisor.supervise([sys.executable, *sys.argv[1:]])", str(tmp_path / "child.py"), str(tmp_path / "pid"))
    child = int(wait_for(tmp_path / "pid"))
    assert is_alive(child)
    run.kill()
    run.communicate(timeout=60)
    for _ in range(500):
        if not is_alive(child):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child lives on")


def test_giving_up_kills_the_child() -> None:
    began = time.monotonic()
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(30)']"
    run = parent(f"print(supervisor.supervise({sleeper}, give_up=lambda child: child > 0))")
    assert run.communicate(timeout=60)[0] == "-9\n"
    assert time.monotonic() - began < 25
