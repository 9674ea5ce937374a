#!/usr/bin/env bash
# One machine, every GPU of it (or --processes N):
#   launch/torchrun_single.sh CONFIG [--processes N] [--key value ...]
#
# Exit codes: 0 done, 1 crash, 2 wrong config or data, 3 diverged, 75 stopped with all saved. SIGTERM, SIGUSR1, SIGUSR2, SIGHUP
# (a terminal that goes; nohup keeps the run) and Ctrl-C stop the run at the next step, behind a checkpoint; the same line goes
# on. A rank that dies is started again.
# `simclr-dist train` runs torchrun and watches it; torchrun alone knows no exit codes but 0 and 1, and no restarts that count
# only fruitless starts. For those who want it all the same (status.json in the run folder says what became of the run; under
# nohup without SIGHUP in the list):
#   torchrun --standalone --nproc-per-node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGHUP --shutdown-timeout=600 \
#     -m simclr_dist.train CONFIG
set -euo pipefail
PATH="$PATH:$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
if [ $# -eq 0 ]; then
  echo "usage: launch/torchrun_single.sh CONFIG [--processes N] [--key value ...]" >&2
  exit 2
fi
exec simclr-dist train "$@"
