"""Signal or end a program with all that it has started."""

import contextlib
import os
import signal
import subprocess

from simclr_dist.launch.supervisor import children


def signal_all(process: int, number: int) -> None:
    """To the process and everything below it, the oldest first."""
    processes = [process]
    for each in processes:  # which grows
        processes += children(each)
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


def end(program: "subprocess.Popen[str]") -> None:
    """Kill it, which has a session of its own, and all that it has started."""
    signal_all(program.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # some kernels do not tell who started whom
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()
