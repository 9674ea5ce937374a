#!/usr/bin/env bash
# OMP_DISPLAY_ENV is OpenMP's own way to show what is in force. The libgomp inside torch's wheels shows OMP_WAIT_POLICY =
# 'PASSIVE' where nothing is set, though its threads then spin 300,000 turns before they sleep; with OMP_WAIT_POLICY=PASSIVE
# set it shows the same word, and 0 turns. Only VERBOSE, which adds GOMP_SPINCOUNT, tells the two apart. On 2 cores beside one busy
# process the first trains at an eighth of the speed of the second.
#
# Seen with torch 2.14.1. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

shown() { # with these variables
  env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT "$@" OMP_DISPLAY_ENV=VERBOSE venv/bin/python -c 'import torch' 2>&1 |
    grep -E 'OMP_WAIT_POLICY|GOMP_SPINCOUNT' | tr -d " '" | tr '\n' ' '
}
unset_=$(shown)
passive=$(shown OMP_WAIT_POLICY=PASSIVE)
echo "nothing set: $unset_"
echo "passive set: $passive"
[ "$unset_" = "OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=300000 " ]
[ "$passive" = "OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 " ]
echo "as described: the policy is shown alike, and the turns differ"
