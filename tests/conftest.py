"""One thread, as the ranks have: the same sums wherever a test runs, and no fight over a machine's few cores. And quick starts:
most of what the tests take is Python importing torch."""

import gc
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # they would compile the package anew, each of them
_STARTUP = str(Path(__file__).with_name("startup"))
os.environ["PYTHONPATH"] = os.pathsep.join([_STARTUP, *filter(None, [os.environ.get("PYTHONPATH")])])
gc.disable()  # until all is imported

import pytest  # noqa: E402
import torch  # noqa: E402

from simclr_dist.system import signals  # noqa: E402
from simclr_dist.system.errors import ConfigError  # noqa: E402
from simclr_dist.system.machine import cpp_compiler  # noqa: E402

torch.set_num_threads(1)
# Ignored under nohup, and in a script's background; programs that tests start would ignore them too. A handler stays here.
for _number, _handler in ((signal.SIGHUP, lambda *_: None), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    """What is there now stays: the collector need not look at it again."""
    gc.freeze()
    gc.enable()
    if "forkserver" in sys.modules:  # ours, and not the standard library's
        sys.modules["forkserver"].start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With SIMCLR_DIST_FORBID_SKIPS (CI): a skip fails. Not so for a GPU, ray (70 MB), or Trackio (an older Pillow)."""
    report = yield
    if (
        report.skipped
        and "SIMCLR_DIST_FORBID_SKIPS" in os.environ
        and not re.search("CUDA|pip install (ray|trackio)", str(report.longrepr))
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip where `compile: true` has no compiler."""
    try:
        cpp_compiler()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def stop_signals_as_before() -> Iterator[None]:
    """Commands set handlers for their process, and note its signals; here that is the process of all tests."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    signals._requested, signals._requested_at, signals._interrupted = 0, None, False
