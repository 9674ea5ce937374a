"""Tiles and kernels: the sums that NT-Xent is made of, by each way to take them, against the whole matrix in float64."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_dist.method.loss import NTXentLoss, tiles
from simclr_dist.method.loss.tiles import Similarities

# (images here, of all, the first of them here, dimensions, temperature, bytes of a tile)
CASES = [
    (5, 5, 0, 8, 0.1, 2**20),
    (70, 70, 0, 24, 0.05, 8 * 33**2),
    (70, 70, 0, 24, 0.002, 8 * 33**2),
    (64, 64, 0, 16, 0.2, 8 * 32**2),
    (33, 99, 33, 128, 0.5, 8 * 20**2),
    (33, 99, 66, 40, 0.002, 8 * 20**2),
    (10, 30, 0, 40, 0.1, 8),
    (2, 2, 0, 3, 0.1, 2**20),
    (1, 1, 0, 3, 0.1, 2**20),
    (1, 3, 2, 3, 50.0, 2**20),
    (7, 7, 0, 250, 0.1, 2**20),
    (3, 3, 0, 256, 0.1, 2**20),
    (32, 32, 0, 17, 0.1, 8 * 16**2),
    (17, 34, 17, 1, 0.5, 8 * 5**2),
]


def _embeddings(n: int, total: int, first: int, dim: int) -> tuple[Tensor, Tensor]:
    """(rows of one rank, all columns); the same tensor when the rank has all."""
    columns = F.normalize(torch.randn(2 * total, dim, generator=torch.Generator().manual_seed(total)).double(), dim=1)
    if n == total:
        return columns, columns
    return torch.cat([columns[first : first + n], columns[total + first : total + first + n]]), columns


def _whole(z: Tensor, columns: Tensor, first: int, temperature: float) -> Tensor:
    n, total = len(z) // 2, len(columns) // 2
    row = torch.arange(n) + first
    own = torch.cat([row, row + total])
    matrix = z @ columns.T / temperature
    matrix[torch.arange(2 * n), own] = -torch.inf
    matrix[torch.arange(2 * n), (own + total) % (2 * total)] = -torch.inf
    return matrix


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]) -> None:
    n, total, first, dim, temperature, tile_bytes = case
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", tile_bytes)
    z, columns = _embeddings(n, total, first, dim)
    matrix = _whole(z, columns, first, temperature)
    found = Similarities(z, columns, first, temperature)
    torch.testing.assert_close(found.log_sum_exp(), matrix.logsumexp(1), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    of_columns = torch.randn(2 * total, generator=generator).double() - 1 / temperature
    of_rows = of_columns if n == total else torch.randn(2 * n, generator=generator).double() - 1 / temperature
    weights = (matrix + of_rows[:, None]).exp() + (matrix + of_columns).exp()
    torch.testing.assert_close(found.weighted_sum(of_rows, of_columns), weights @ columns, rtol=1e-11, atol=1e-13)


def test_a_symmetric_tile_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE_BYTES", 8 * 10**2)
    z, _ = _embeddings(50, 50, 0, 4)
    seen = [(rows.start, columns.start, mirrored) for rows, columns, mirrored, _ in Similarities(z, z, 0, 1.0).tiles()]
    assert seen == [(i, j, j > i) for i in range(0, 100, 10) for j in range(i, 100, 10)]
    assert len(list(Similarities(z, z.clone(), 0, 1.0).tiles())) == 100


class _Largest(TorchDispatchMode):
    """The most elements that a tensor has had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return found


@pytest.mark.parametrize("n", [1000, 2000])
def test_memory_is_linear(n: int) -> None:
    """No tensor is larger than a tile or than all embeddings; the matrix would have 4 to 16 million elements."""
    z_a, z_b = torch.randn(2, n, 32).requires_grad_().unbind(0)
    with _Largest() as largest:
        NTXentLoss(0.1)(z_a, z_b).backward()
    assert largest.elements <= max(2 * n * 32, tiles._CPU_TILE_BYTES * torch.get_num_threads() // 4)


def test_the_fused_kernels(tmp_path: Any) -> None:
    """On a GPU as they are; without one in Triton's interpreter, which takes minutes for more than this."""
    pytest.importorskip("triton")
    code = """
from itertools import product
import torch
from simclr_dist.method.loss import fused
from test_tiles import CASES, _embeddings, _whole
device = "cuda" if torch.cuda.is_available() else "cpu"
shapes = fused._SHAPES
small = [case for case in CASES if case[1] < 40]
for shape, (n, total, first, dim, temperature, _) in [(shapes[0], case) for case in CASES] + list(product(shapes[1:], small)):
    fused._SHAPES = (shape,)
    z, columns = _embeddings(n, total, first, dim)
    matrix = _whole(z, columns, first, temperature)
    lower = columns.float().to(device).contiguous()
    rows = lower if n == total else z.float().to(device).contiguous()
    found = fused.Similarities(rows, lower, first, temperature)
    lse, expected = found.log_sum_exp().double().cpu(), matrix.logsumexp(1)
    assert torch.allclose(lse, expected, rtol=0, atol=3e-6 + 6e-7 / temperature), (n, total, (lse - expected).abs().max())
    of_columns = torch.randn(2 * total, generator=torch.Generator().manual_seed(1)).double() - 1 / temperature
    of_rows = of_columns[: 2 * n]
    expected = ((matrix + of_rows[:, None]).exp() + (matrix + of_columns).exp()) @ columns
    sums = found.weighted_sum(of_rows.float().to(device), of_columns.float().to(device)).double().cpu()
    error = (sums - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < 2e-6 + 3e-7 / temperature, (n, total, error)
print("equal")
"""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpreter, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


def test_kernels_take_less_where_a_gpu_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses what does not fit a block's shared memory, and says what spills from registers; that is asked for once."""
    pytest.importorskip("triton")
    from simclr_dist.method.loss import fused

    asked: list[tuple[int, int]] = []

    class Kernel:
        def __init__(self, spills_above: int) -> None:
            self.spills_above = spills_above

        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*_: Any, ROWS: int, COLUMNS: int, **__: Any) -> Any:
                asked.append((ROWS, COLUMNS))
                if ROWS > 32:
                    raise fused.OutOfResources(200_000, 100_000, "shared memory")
                return SimpleNamespace(n_spills=1500 if self.spills_above < COLUMNS else 16)

            return launch

    monkeypatch.setattr(fused, "_first_that_fits", {})
    similarities = fused.Similarities(torch.ones(8, 4), torch.ones(8, 4), 0, 0.1)
    # The last: where all spill, the smallest serves.
    for spills_above, expected in ((64, 1), (32, 2), (0, 3)):
        kernel = Kernel(spills_above)
        for _ in range(2):
            similarities._launch(kernel)  # type: ignore[arg-type]
        tried = [shape[:2] for shape in fused._SHAPES[: expected + 1]]
        assert asked == [*tried, tried[-1]]
        asked.clear()
