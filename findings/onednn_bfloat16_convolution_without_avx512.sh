#!/usr/bin/env bash
# torch.autocast("cpu", torch.bfloat16) is offered on every x86 CPU. With AVX-512 but without its bfloat16 instructions a training
# step of a small convolutional network takes some 1.4 times as long as in float32: one would guess so. With AVX2 alone it takes
# 9 times as long: oneDNN has AVX2 kernels for float32 and runs bfloat16 convolutions by its plain reference. No warning is given.
# ONEDNN_MAX_CPU_ISA lets a newer CPU play an older one.
#
# Seen with torch 2.14.1 on a CPU with AVX512-BF16. Fails when bfloat16 is less than 4 times as slow with AVX2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

cat >step.py <<'EOF_PYTHON'
import time

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
images = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def milliseconds(dtype):
    times = []
    for _ in range(4):
        start = time.process_time()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = network(images).float().square().mean()
        loss.backward()
        times.append(1e3 * (time.process_time() - start))
    return min(times)


print(milliseconds(None), milliseconds(torch.bfloat16))
EOF_PYTHON

for instructions in DEFAULT AVX512_CORE AVX2; do
    read -r plain half < <(ONEDNN_MAX_CPU_ISA=$instructions venv/bin/python step.py 2>warnings)
    echo "$instructions: float32 $plain ms, bfloat16 $half ms; lines on stderr: $(grep -ci bfloat16 warnings || true)"
done
python3 -c "assert $half > 4 * $plain, 'less than four times as slow'"
echo "as described: bfloat16 convolutions have no kernel for AVX2"
