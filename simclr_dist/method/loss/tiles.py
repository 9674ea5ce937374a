"""Sums over all negatives of each row, a tile of the similarity matrix at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_dist.method.distributed import all_gather, world_size

# Two tiles are alive at a time. On the CPU they should stay in a core's cache, on a GPU fill it with work.
_CPU_TILE_BYTES = 2**20
_CUDA_TILE_BYTES = 64 * 2**20


def gather_views(z: Tensor) -> Tensor:
    """[2n, d] of each rank, view a then view b, to [2N, d] in the order of the global batch: view a of all, then view b."""
    if world_size() == 1:
        return z
    return all_gather(z.view(2, len(z) // 2, -1)).transpose(0, 1).reshape(-1, z.shape[1])


@dataclass(frozen=True)
class Similarities:
    """The matrix z @ columns.T / temperature, of which only tiles ever exist; a row's own column and its partner's are -inf.

    columns: float [2N, d], the normalised embeddings of the global batch, view a of all images, then view b. z: [2n, d],
    those of this rank, whose images are `first`, `first` + 1, ... of the global batch. With z = columns the matrix is
    symmetric: then only tiles on and above the diagonal are computed, and each serves its rows and its columns.
    """

    z: Tensor
    columns: Tensor
    first: int
    temperature: float

    def log_sum_exp(self) -> Tensor:
        """Of each row, [2n]; -inf where a row has no negatives."""
        if self._fits_exp:
            sums = self.z.new_zeros(len(self.z))
            for rows, columns, mirrored, tile in self.tiles():
                tile.exp_()
                sums[rows] += tile.sum(1)
                if mirrored:
                    sums[columns] += tile.sum(0)
            return sums.log()
        found = self.z.new_full((len(self.z),), -torch.inf)
        for rows, columns, mirrored, tile in self.tiles():
            found[rows] = found[rows].logaddexp(tile.logsumexp(1))
            if mirrored:
                found[columns] = found[columns].logaddexp(tile.logsumexp(0))
        return found

    def weighted_sum(self, log_weight: Tensor, log_weight_of_columns: Tensor) -> Tensor:
        """sum_j (exp(s_ij + log_weight_i) + exp(s_ij + log_weight_j)) z_j over the negatives j of each row i, [2n, d]."""
        result = torch.zeros_like(self.z)
        scratch = self.z.new_empty(self._side**2)
        weight, weight_of_columns = log_weight.exp(), log_weight_of_columns.exp()
        for rows, columns, mirrored, tile in self.tiles():
            other = scratch[: tile.numel()].view(tile.shape)
            if self._fits_exp:
                torch.add(weight[rows, None], weight_of_columns[None, columns], out=other)
                tile.exp_().mul_(other)
            else:
                torch.add(tile, log_weight_of_columns[columns], out=other)
                tile.add_(log_weight[rows, None]).exp_().add_(other.exp_())
            result[rows].addmm_(tile, self.columns[columns])
            if mirrored:
                result[columns].addmm_(tile.T, self.z[rows])
        return result

    @property
    def _fits_exp(self) -> bool:
        """Whether exp of a similarity, and of the sum of two, can neither overflow nor vanish: |s| is at most 1/temperature."""
        return 2.2 / self.temperature < math.log(torch.finfo(self.z.dtype).max)

    @property
    def _side(self) -> int:
        """Rows and columns of a tile."""
        budget = _CUDA_TILE_BYTES if self.z.is_cuda else _CPU_TILE_BYTES * torch.get_num_threads()
        return max(1, min(math.isqrt(budget // self.z.element_size()), len(self.columns)))

    def tiles(self) -> Iterator[tuple[slice, slice, bool, Tensor]]:
        """(rows of z, columns, whether the mirrored tile is left out, similarities), the last good until the next one."""
        n, total, side = len(self.z) // 2, len(self.columns) // 2, self._side
        symmetric = self.z is self.columns
        scaled = self.z / self.temperature
        memory = self.z.new_empty(side**2)
        # Rows that are neighbours among the columns too: those of both views at once, or of one.
        stretches = [(0, 2 * n, 0)] if symmetric else [(0, n, self.first), (n, 2 * n, total + self.first)]
        for begin, end, place in stretches:
            for top in range(begin, end, side):
                rows = slice(top, min(top + side, end))
                here = place + top - begin
                for left in range(here if symmetric else 0, 2 * total, side):
                    columns = slice(left, min(left + side, 2 * total))
                    shape = (rows.stop - top, columns.stop - left)
                    tile = memory[: shape[0] * shape[1]].view(shape)
                    torch.mm(scaled[rows], self.columns[columns].T, out=tile)
                    for excluded in (here, here + total, here - total):  # itself; its partner, behind it or before it
                        if -shape[0] < excluded - left < shape[1]:
                            tile.diagonal(excluded - left).fill_(-torch.inf)
                    yield rows, columns, symmetric and left > here, tile
