"""Copy rows of features to where there is space for them."""

import torch
from torch import Tensor

from simclr_dist.evaluate.space import empty
from simclr_dist.method.loss.tiles import unit_rows

ROWS_AT_ONCE = 8192


def copied(h: Tensor, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Copy some rows of features [n, d], or all."""
    count, dtype = len(h) if rows is None else len(rows), dtype or h.dtype
    copy = space_for(count, h.shape[1], dtype, h.device)
    for start in range(0, count, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        copy[part] = h[part if rows is None else rows[part].to(h.device)]
    return copy


def unit_copy(h: Tensor) -> Tensor:
    """Copy features [n, d] as float32 rows of norm 1 (`unit_rows`). Memory for some thousand rows more is needed."""
    z = space_for(len(h), h.shape[1], torch.float32, h.device)
    for part, rows in zip(z.split(ROWS_AT_ONCE), h.split(ROWS_AT_ONCE), strict=True):
        part.copy_(unit_rows(rows.float()))
    return z


def space_for(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return an uninitialised tensor [rows, columns]. On a CPU it may lie in a file (`space.empty`)."""
    if torch.device(device).type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return torch.from_numpy(empty(rows, columns, torch.empty(0, dtype=dtype).numpy().dtype))
