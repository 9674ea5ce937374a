#!/usr/bin/env bash
# torch.optim.AdamW and SGD with fused=True on a CPU walk through the memory of weight, gradient and state side by side, whatever
# their strides. Where a gradient lies in another order than its weight (the weight channels_last, the gradient contiguous, as code
# that sets .grad itself makes it) other elements of the weight are updated than the gradient names. No error, no warning. The same
# step without fused is right. Gradients that autograd accumulates lie as their weight does.
#
# Seen with torch 2.14.1. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

venv/bin/python - <<'EOF_PYTHON'
import torch


def changed(kind, fused):
    weight = torch.nn.Parameter(torch.zeros(1, 2, 3, 4).contiguous(memory_format=torch.channels_last))
    weight.grad = torch.zeros(1, 2, 3, 4)
    weight.grad[0, 1, 0, 0] = 1
    kind([weight], lr=0.1, weight_decay=0, fused=fused).step()
    return weight.detach().nonzero().tolist()


print("torch", torch.__version__)
for kind in (torch.optim.SGD, torch.optim.AdamW):
    plain, fused = changed(kind, False), changed(kind, True)
    print(kind.__name__, "- a gradient at [0, 1, 0, 0] changes", plain, "- fused:", fused)
    assert plain == [[0, 1, 0, 0]] and len(fused) == 1 and fused != plain
EOF_PYTHON
echo "as described: fused optimizers on a CPU follow memory and not indices"
