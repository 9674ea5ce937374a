"""torchrun on this machine, with the exit code that torchrun loses."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from simclr_dist.run import read_status


def torchrun(processes: int, command: Sequence[str], run: Path | None = None) -> int:
    """Start `command` under torchrun on this machine; the exit code is the run folder's, since torchrun's is always 1."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    before = read_status(run) if run else {}
    code = subprocess.run(launcher, env={"OMP_NUM_THREADS": threads, **os.environ}, check=False).returncode
    if code and run and (status := read_status(run)) != before and status.get("exit_code"):
        return int(status["exit_code"])
    return 0 if code == 0 else 1
