#!/usr/bin/env bash
# TensorBoard over one run, or a folder of runs: launch/tensorboard.sh RUNS [more options of tensorboard]
# It listens on this machine only. From elsewhere: ssh -L 6006:127.0.0.1:6006 THIS_MACHINE
set -euo pipefail
PATH="$PATH:$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
if [ $# -eq 0 ]; then
  echo "usage: launch/tensorboard.sh RUNS [more options of tensorboard]" >&2
  exit 2
fi
runs=$1
shift
[ -d "$runs" ] || { echo "launch/tensorboard.sh: $runs: no such folder" >&2; exit 2; }
exec tensorboard --logdir "$runs" --host 127.0.0.1 --port "${PORT:-6006}" "$@"
