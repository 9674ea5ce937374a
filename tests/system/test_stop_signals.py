"""Stop signals: noted, not obeyed at once; held back for a child that is not ready; ignored by reading processes."""

import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.system import signals
from simclr_dist.system.errors import LAST_WORD

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]


def python(code: str, *, blocked: bool = False) -> subprocess.Popen[str]:
    """A child that runs `code`, after it has been given the module."""
    return subprocess.Popen(
        [sys.executable, "-c", "import os, signal, sys, time\nfrom simclr_dist.system import signals\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # as it is where nohup has not started the tests
    )


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = child.communicate(timeout=20)
    return child.returncode, out, error


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted(number: signal.Signals) -> None:
    child = python(f"signals.listen(); os.kill(os.getpid(), {int(number)}); time.sleep(0.01); print(signals.requested())")
    assert ended(child) == (0, f"{int(number)}\n", "")
    assert signal.Signals(number).name.startswith("SIG")


def test_a_hang_up_that_nohup_has_ignored_stays_so() -> None:
    """No other signal does: a shell has Ctrl-C ignored for all that a script starts in the background."""
    once = "signals.listen(); [os.kill(os.getpid(), n) for n in (1, 2)]; time.sleep(0.01); print(signals.requested())"
    ignored = f"[signal.signal(n, signal.SIG_IGN) for n in (1, 2)]\nsignals.exit_on_signal(75, 'stopped')\n{once}\n"
    assert ended(python(ignored)) == (0, "2\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that takes nothing")
def test_a_stop_is_a_stop_where_nobody_can_be_told() -> None:
    """As on a terminal that has gone."""
    mute = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
    for begin in ("signals.exit_on_signal(75, 'x')\n", "with signals.importing(75, 'x'):\n    "):
        child = python(f"{mute}{begin}os.kill(os.getpid(), 1); time.sleep(5)")
        assert ended(child)[0] == 75


def test_the_second_ctrl_c_ends_a_process_that_stands_alone() -> None:
    twice = "signals.listen(); [os.kill(os.getpid(), 2) for _ in range(2)]; time.sleep(0.01); print('on')"
    assert "KeyboardInterrupt" in ended(python(twice))[2]
    for variable in ("WORLD_SIZE", LAST_WORD):
        watched = python(f"os.environ['{variable}'] = '2'\n" + twice)
        assert ended(watched) == (0, "on\n", ""), (
            "its parent passes on what a terminal sends to both: it hears each Ctrl-C twice"
        )


def test_one_ctrl_c_behind_another_signal_is_no_second_one() -> None:
    """A terminal interrupts a whole group of processes, and the parent among them may be quicker to hand a stop on."""
    code = "signals.listen(); [os.kill(os.getpid(), n) or time.sleep(0.01) for n in (15, 2)]; print(signals.requested())"
    assert ended(python(code)) == (0, "2\n", "")


def test_a_signal_before_listen_waits_for_it() -> None:
    """The parent blocks the signals: one that comes while the child imports is neither its end nor lost."""
    parent = (
        "import subprocess\n"
        "with signals.blocked():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(0.5);'\n"
        "        'from simclr_dist.system import signals; signals.listen(); time.sleep(0.01); print(signals.requested())'],\n"
        "        stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "child.terminate()\n"
        "print(child.communicate()[0].decode(), child.returncode)\n"
    )
    assert ended(python(parent)) == (0, "15\n 0\n", "")


def test_blocked_gives_the_signals_back() -> None:
    child = python(
        "signals.listen()\nwith signals.blocked():\n"
        "    os.kill(os.getpid(), 15); time.sleep(0.01); print(signals.requested())\n"
        "time.sleep(0.01); print(signals.requested())"
    )
    assert ended(child) == (0, "0\n15\n", "")


def test_work_without_state_ends_at_once() -> None:
    child = python(
        "signals.exit_on_signal(75, 'stopped by {signal}')\n"
        "try:\n    print('ready', flush=True); time.sleep(20)\nfinally:\n    print('cleaned up')"
    )
    assert child.stdout is not None
    child.stdout.readline()
    began = time.monotonic()
    child.send_signal(signal.SIGUSR2)
    child.send_signal(signal.SIGTERM)  # SLURM sends two
    code, out, error = ended(child)
    assert (code, out) == (75, "cleaned up\n")
    assert error in ("stopped by SIGUSR2\n", "stopped by SIGTERM\n"), "once, whichever came first"
    assert time.monotonic() - began < 10


def test_a_stop_while_libraries_are_imported() -> None:
    """At once, as an import may swallow what is raised; one that was noted before counts; afterwards by SystemExit."""
    begin = "with signals.importing(75, 'stopped by {signal}'):\n"
    swallows = begin + "    try: os.kill(os.getpid(), 15); time.sleep(5)\n    except BaseException: print('swallowed')"
    assert ended(python(swallows)) == (75, "", "stopped by SIGTERM\n")
    noted = "signals.listen(); os.kill(os.getpid(), 10); time.sleep(0.01)\n" + begin + "    print('imported')"
    assert ended(python(noted)) == (75, "", "stopped by SIGUSR1\n")
    after = begin + "    pass\ntry: os.kill(os.getpid(), 12); time.sleep(5)\nfinally: print('cleaned up')"
    assert ended(python(after)) == (75, "cleaned up\n", "stopped by SIGUSR2\n")


def test_the_collector_rests_while_libraries_are_imported() -> None:
    with signals.importing(1, ""):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), signals.uncollected():
        raise ImportError
    assert gc.isenabled()


def test_reading_processes_mind_their_parent_only() -> None:
    start = "signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS); signals.obey_parent_only(); time.sleep(0.1)\n"
    child = python(start + "[os.kill(os.getpid(), n) for n in signals.SIGNALS]; time.sleep(0.1); print('on')")
    assert ended(child) == (0, "on\n", "")
    child = python(start + "print('ready', flush=True); time.sleep(20); print('on')")
    assert child.stdout is not None
    child.stdout.readline()
    child.terminate()
    assert ended(child) == (0, "", "")


def test_every_way_into_training_listens_before_torch() -> None:
    """Else a signal in the seconds of the import would be the end."""
    for module, arguments in (("cli.train", ["missing.yaml"]), ("cli.main", ["train", "missing.yaml"])):
        code = (
            f"import simclr_dist.{module} as entry\nsignals.listen = lambda: (print('torch' in sys.modules), os._exit(0))\n"
            f"entry.main({arguments})"
        )
        assert ended(python(code)) == (0, "False\n", "")
