"""Compute the sums of `tiles` by Triton kernels for CUDA. No tile of the matrix leaves the chip.

Each product is three TF32 ones ("tf32x3"). That keeps float32's digits on tensor cores.
"""

import subprocess
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from simclr_dist.system.errors import reason_of

# (rows, columns, options of the launch), from fast to small. GPUs differ by four times in the shared memory of a block, and
# Triton refuses only at a launch. A kernel that does not fit the registers is not refused, and keeps its numbers in far
# memory: on an A100 64 x 64 would keep 7 KiB a thread there. What fits is tried once for each device, kernel and width.
_SHAPES = (
    (64, 64, {"num_warps": 8, "num_stages": 2}),
    (32, 64, {"num_warps": 8, "num_stages": 2}),
    (32, 32, {"num_warps": 4, "num_stages": 1}),
    (16, 16, {"num_warps": 4, "num_stages": 1}),
)
_SPILLED_WORDS = 100  # that a thread may keep outside of its registers
_first_that_fits: dict[tuple[object, ...], int] = {}


@triton.jit
def _place(row, n, total, first):
    """Return the place of local rows among the columns."""
    return tl.where(row < n, first + row, total + first + row - n)


@triton.jit
def _similarities(z, columns, place, left, total, temperature, DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute one tile, -inf where there is no negative. Returns it and the columns' embeddings."""
    column = left + tl.arange(0, COLUMNS)
    d = tl.arange(0, WIDTH)
    there = (column < 2 * total)[:, None] & (d < DIM)[None, :]
    other = tl.load(columns + column.to(tl.int64)[:, None] * DIM + d[None, :], mask=there, other=0.0)
    s = tl.dot(z, tl.trans(other), input_precision="tf32x3") / temperature
    partner = tl.where(place < total, place + total, place - total)
    negative = (column[None, :] != place[:, None]) & (column[None, :] != partner[:, None]) & (column < 2 * total)[None, :]
    return tl.where(negative, s, float("-inf")), other


@triton.jit
def _log_sum_exp(
    z, columns, result, n, total, first, temperature,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = _place(row, n, total, first)
    d = tl.arange(0, WIDTH)
    there = (row < 2 * n)[:, None] & (d < DIM)[None, :]
    rows = tl.load(z + row.to(tl.int64)[:, None] * DIM + d[None, :], mask=there, other=0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for left in range(0, 2 * total, COLUMNS):
        s, _ = _similarities(rows, columns, place, left, total, temperature, DIM, WIDTH, COLUMNS)
        higher = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no negative so far: exp(-inf - 0) is 0, not nan
        sums = sums * tl.exp(highest - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        highest = higher
    tl.store(result + row, highest + tl.log(sums), mask=row < 2 * n)


@triton.jit
def _weighted_sum(
    z, columns, log_weight, log_weight_of_columns, result, n, total, first, temperature,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = _place(row, n, total, first)
    d = tl.arange(0, WIDTH)
    there = (row < 2 * n)[:, None] & (d < DIM)[None, :]
    rows = tl.load(z + row.to(tl.int64)[:, None] * DIM + d[None, :], mask=there, other=0.0)
    mine = tl.load(log_weight + row, mask=row < 2 * n, other=0.0)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for left in range(0, 2 * total, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        theirs = tl.load(log_weight_of_columns + column, mask=column < 2 * total, other=0.0)
        s, other = _similarities(rows, columns, place, left, total, temperature, DIM, WIDTH, COLUMNS)
        weight = tl.exp(s + mine[:, None]) + tl.exp(s + theirs[None, :])
        sums += tl.dot(weight, other, input_precision="tf32x3")
    tl.store(result + row.to(tl.int64)[:, None] * DIM + d[None, :], sums, mask=there)


@dataclass(frozen=True)
class Similarities:
    """`tiles.Similarities` for contiguous float32 on one CUDA device. d is at most 256."""

    z: Tensor
    columns: Tensor
    first: int
    temperature: float

    def log_sum_exp(self) -> Tensor:
        """Compute log-sum-exp over each row's negatives, [2n]. -inf where it has none."""
        result = self.z.new_empty(len(self.z))
        self._launch(_log_sum_exp, result)
        return result

    def weighted_sum(self, log_weight: Tensor, log_weight_of_columns: Tensor) -> Tensor:
        """Sum (exp(s_ij + log_weight_i) + exp(s_ij + log_weight_j)) z_j, [2n, d]. Over the negatives j of each row i."""
        result = torch.empty_like(self.z)
        self._launch(_weighted_sum, log_weight.contiguous(), log_weight_of_columns.contiguous(), result)
        return result

    def _launch(self, kernel: "triton.JITFunction[..., None]", *tensors: Tensor) -> None:
        rows, dim = self.z.shape
        width = max(16, triton.next_power_of_2(dim))
        key = (self.z.device, kernel, width)
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device(self.z.device) if self.z.is_cuda else nullcontext():
            for number in range(_first_that_fits.get(key, 0), len(_SHAPES)):
                block_rows, block_columns, options = _SHAPES[number]
                try:
                    place = rows // 2, len(self.columns) // 2, self.first
                    sizes = {"DIM": dim, "WIDTH": width, "ROWS": block_rows, "COLUMNS": block_columns}
                    launch = kernel[(triton.cdiv(rows, block_rows),)]
                    done = launch(self.z, self.columns, *tensors, *place, self.temperature, **sizes, **options)
                except OutOfResources:
                    if number + 1 == len(_SHAPES):
                        raise
                else:
                    if getattr(done, "n_spills", 0) > _SPILLED_WORDS and number + 1 < len(_SHAPES):
                        continue  # the next one writes the same sums
                    _first_that_fits[key] = number
                    return


def problem(device: torch.device) -> str:
    """Compile and launch a kernel. Returns '', or why it fails, with the cure."""
    z = torch.ones(2, 16, device=device)
    try:
        Similarities(z, z, 0, 1.0).log_sum_exp()
    except subprocess.CalledProcessError as error:  # the compiler has written why
        why = f"{error.cmd[0]} fails"
    # A compiler that is not found, folders that cannot be written or run from, a driver that is not found, and Triton's own.
    except (RuntimeError, OSError, AssertionError, ImportError, TritonError) as error:
        why = reason_of(error)
    else:
        return ""
    needs = "a C compiler (gcc; CC names another), Python's headers (python3-dev) and a cache folder (TRITON_CACHE_DIR)"
    return f"Triton cannot compile: {why}; it needs {needs}"
