#!/usr/bin/env bash
# nohup has a program start with SIGHUP ignored, and children inherit that. torchrun sets a handler of its own for SIGHUP all the
# same, so that `nohup torchrun ...` ends with the terminal: exit code 1, and its ranks
# are stopped. --signals-to-handle without SIGHUP leaves it ignored.
#
# Seen with torch 2.14.1. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

venv/bin/python - <<'EOF_PYTHON'
import signal
import subprocess
import sys

signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does


def exit_code(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", *options]
    command += ["--no-python", "sh", "-c", "echo ready; exec sleep 10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as torchrun:
        assert torchrun.stdout.readline() == "ready\n"
        torchrun.send_signal(signal.SIGHUP)
        return torchrun.wait()


codes = exit_code(), exit_code("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
print("exit codes after SIGHUP: as it is", codes[0], "- without SIGHUP among its signals", codes[1])
assert codes == (1, 0), codes
EOF_PYTHON
echo "as described: torchrun ends by a SIGHUP that it was started to ignore"
