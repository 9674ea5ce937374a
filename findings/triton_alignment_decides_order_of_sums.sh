#!/usr/bin/env bash
# Triton compiles a kernel anew for pointers that are divisible by 16, which is known to make loads faster. It also decides how many
# neighbours a thread holds (4 floats, else 1), and with that the order in which tl.sum adds. So one kernel, on the same numbers
# of the same shape, may give other last bits for x[1:] than for a copy of it, and a run that must repeat its bits depends on where
# an allocator puts a tensor. @triton.jit(do_not_specialize_on_alignment=[...]) ends it.
#
# Seen with triton 3.8.0, compiled for compute capability 8.0 (no GPU is needed). Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check triton==3.8.0
export TRITON_CACHE_DIR="$folder/cache"

cat >layout.py <<'EOF_PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x, out, COUNT: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, COUNT))))


def neighbours(aligned):
    by_16 = [["tt.divisibility", 16]]
    attributes = {(1,): by_16, **({(0,): by_16} if aligned else {})}
    signature = {"x": "*fp32", "out": "*fp32", "COUNT": "constexpr"}
    source = ASTSource(total, signature=signature, constexprs={"COUNT": 1024}, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    return int(re.search(r"sizePerThread = \[(\d+)\]", made.asm["ttgir"])[1])


aligned, other = neighbours(True), neighbours(False)
print("triton", triton.__version__, "- neighbours that a thread adds first:", aligned, "where x is aligned,", other, "where it is not")
assert (aligned, other) == (4, 1)
EOF_PYTHON
venv/bin/python layout.py
echo "as described: alignment decides the order of a sum"
