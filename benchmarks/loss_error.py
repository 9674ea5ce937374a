"""How far is the float32 gradient of the loss from float64's, ours and the reference's?

    python benchmarks/loss_error.py

Embeddings as they are at the start of a run, on its way and at its ends; the float64 gradient is that of our loss, which the
tests compare with the reference's. Relative error in norm.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.method.loss import NTXentLoss, nt_xent_reference

TEMPERATURES = (0.03, 0.05, 0.1, 0.5, 1.0)


def noise(*shape: int) -> Tensor:
    """Of the one generator, which `main` has seeded."""
    return torch.randn(*shape, dtype=torch.float64)


# Each gives the two views' embeddings, [2, n, d].
EMBEDDINGS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, d: noise(2, n, d),
    "aligned": lambda n, d: noise(1, n, d) + 0.3 * noise(2, n, d),
    "nearly converged": lambda n, d: 3 * F.normalize(noise(1, n, d), dim=2) + 0.02 * noise(2, n, d),
    "collapsed": lambda n, d: 1 + 1e-3 * noise(2, n, d),
}


def gradient(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the loss at `z` in that arithmetic, as float64 [2, n, d]."""
    z = z.detach().to(dtype, copy=True).requires_grad_()
    loss(z[0], z[1]).backward()
    assert z.grad is not None
    return z.grad.double()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=128)
    told = parser.parse_args()
    print(f"N = {told.images}, d = {told.dim}, seed 0, torch {torch.__version__}; in brackets the reference's error\n")
    print("| embeddings | " + " | ".join(f"tau {tau:g}" for tau in TEMPERATURES) + " |")
    print("|---|" + "---|" * len(TEMPERATURES))
    for name, make in EMBEDDINGS.items():
        torch.manual_seed(0)
        z = make(told.images, told.dim).float()
        cells = []
        for tau in TEMPERATURES:
            exact = gradient(NTXentLoss(tau), z, torch.float64)
            ours = gradient(NTXentLoss(tau), z, torch.float32)
            reference = gradient(partial(nt_xent_reference, temperature=tau), z, torch.float32)
            ours_error, its_error = (float((found - exact).norm() / exact.norm()) for found in (ours, reference))
            cells.append(f"{ours_error:.0e} ({its_error:.0e})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
