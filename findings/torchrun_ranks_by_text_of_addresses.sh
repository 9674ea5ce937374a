#!/usr/bin/env bash
# With the c10d rendezvous torchrun numbers the machines by their addresses, and compares those as text: of .9, .10 and .100 the
# first becomes .10. So the machine that hosts the rendezvous need not have rank 0, machines with neighbouring numbers are no
# neighbours in rank, and one that joins an elastic run may push the others' ranks back.
#
# Seen with torch 2.14.1. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

venv/bin/python - <<'EOF_PYTHON'
import socket
import subprocess
import sys

with socket.create_server(("127.0.0.9", 0)) as server:
    port = server.getsockname()[1]


def machine(address):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=3", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=127.0.0.9:{port}", f"--rdzv-conf=is_host={int(address == '127.0.0.9')}"]
    command += [f"--local-addr={address}", "--no-python", "sh", "-c", "echo $RANK"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


machines = {address: machine(address) for address in ("127.0.0.9", "127.0.0.10", "127.0.0.100")}
ranks = {address: int(process.communicate()[0]) for address, process in machines.items()}
print("rank of each machine:", ranks)
assert ranks == {"127.0.0.9": 2, "127.0.0.10": 0, "127.0.0.100": 1}, ranks
EOF_PYTHON
echo "as described: the host of the rendezvous, 127.0.0.9, has the last rank"
