#!/usr/bin/env bash
# torch's FlopCounterMode counts no operation at all for attention on a CPU: F.scaled_dot_product_attention takes a kernel of its own
# there (_scaled_dot_product_flash_attention_for_cpu), which has no entry among the counter's formulas, and what has none counts as 0
# without a word. The same call by the plain kernels, and the same call on tensors of the meta device, are counted. So the FLOPs
# of a vision transformer depend on where they were counted.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.flop_counter import FlopCounterMode

heads, tokens, size = 4, 64, 16
x = torch.randn(1, heads, tokens, size)


def counted(x):
    with FlopCounterMode(display=False) as counter:
        attention(x, x, x)
    return counter.get_total_flops()


usual, meta = counted(x), counted(x.to("meta"))
with sdpa_kernel(SDPBackend.MATH):
    plain = counted(x)
print("torch", torch.__version__, "- counted: on the CPU", usual, "- by the plain kernels", plain, "- on meta", meta)
assert usual == 0 and plain == meta == heads * 2 * (2 * tokens * tokens * size)
EOF_PYTHON
echo "as described: attention on a CPU counts as no operation"
