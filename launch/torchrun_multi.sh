#!/usr/bin/env bash
# Several machines without a scheduler: run the same line on each of them, within half an hour:
#   NNODES=2 RDZV=10.0.0.1:29500 launch/torchrun_multi.sh CONFIG [--processes N] [--key value ...]
#
# NNODES  machines, or MIN:MAX: the run then goes on with fewer when one is lost. The global batch, and with it the number of
#         negatives, stays; so every number of machines from MIN to MAX must divide it.
# RDZV    HOST:PORT of one of the machines, where all meet.
#
# The run folder must be on a disk that all of them share. A machine that was lost joins again with the same line; the one at
# RDZV too, the others wait for it. Where the machines have several networks, name the device of the one between them:
# NCCL_SOCKET_IFNAME=eth0, or without GPUs GLOO_SOCKET_IFNAME=eth0. Exit codes and signals: see torchrun_single.sh.
set -euo pipefail
PATH="$PATH:$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
if [ $# -eq 0 ] || [ -z "${NNODES-}" ] || [ -z "${RDZV-}" ]; then
  echo "usage: NNODES=2 RDZV=HOST:PORT launch/torchrun_multi.sh CONFIG [--processes N] [--key value ...]" >&2
  exit 2
fi
exec simclr-dist train "$@" --nnodes "$NNODES" --rdzv-endpoint "$RDZV"
