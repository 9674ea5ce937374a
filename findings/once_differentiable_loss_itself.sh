#!/usr/bin/env bash
# torch's once_differentiable promises an error when somebody differentiates twice. It looks at the incoming gradient alone: where
# that needs no gradient itself, as for the loss from which backward starts, there is no error. The first gradient then comes
# as a constant even under create_graph=True, and a gradient penalty on it adds nothing to the second one: no error, no warning,
# a wrong number. One more factor behind the same function, and the promised error comes.
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
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def penalised(function):
    x = torch.tensor(2.0, requires_grad=True)
    loss = function(x)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + first**2).backward()
    return x.grad.item()


right = penalised(lambda x: x**3)
print("torch", torch.__version__, "right:", right, "once_differentiable:", penalised(Cube.apply))
assert right == 12 + 2 * 12 * 12 and penalised(Cube.apply) == 12
try:
    penalised(lambda x: Cube.apply(x) * x)
    raise SystemExit("no error behind another factor")
except RuntimeError as error:
    assert "once_differentiable" in str(error), error
    print("behind another factor:", error)
EOF_PYTHON
echo "as described: no error where the loss itself is once_differentiable, and the penalty is lost"
