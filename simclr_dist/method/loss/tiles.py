"""Sum over each row's negatives, one tile of similarities at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.method.distributed import all_gather, world_size

# Two tiles are alive at a time. On the CPU they should stay in a core's cache, on a GPU fill it with work.
_CPU_TILE_BYTES = 2**20
_CUDA_TILE_BYTES = 64 * 2**20


def unit_rows(x: Tensor) -> Tensor:
    """Divide each row by its norm, however large or small. Float [n, d]; rows of zeros stay.

    Rows are scaled by a power of two first, which rounds nothing: float32's squares end at norms of 1.8e19 and 1e-23.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    return F.normalize(x * (largest.frexp().mantissa / largest).nan_to_num(1.0), dim=1)


def gather_views(parts: Sequence[Tensor]) -> Tensor:
    """Gather [2n, d], `parts` of each rank, to [2N, d]. Each is view a, then b; the result is view a of all images, then b."""
    if world_size() * len(parts) == 1:
        return parts[0]
    views = all_gather(torch.stack(list(parts))).view(-1, 2, len(parts[0]) // 2, parts[0].shape[1])
    return views.transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Similarities:
    """The matrix z @ columns.T / temperature, made in tiles only. A row's own column and its partner's are -inf.

    columns: float [2N, d], the normalised embeddings of the global batch, view a of all images, then view b. z: [2n, d],
    those of this rank. Its images are `first`, `first` + 1, ... of the global batch. With z = columns the matrix is
    symmetric. Then only tiles on and above the diagonal are computed, and each serves its rows and its columns.
    """

    z: Tensor
    columns: Tensor
    first: int
    temperature: float

    def log_sum_exp(self) -> Tensor:
        """Compute log-sum-exp over each row's negatives, [2n]. -inf where it has none."""
        if self._fits_exp:
            sums = self.z.new_zeros(len(self.z))
            for rows, columns, mirrored, tile in self.tiles():
                tile.exp_()
                sums[rows] += tile.sum(1)
                if mirrored:
                    sums[columns] += tile.sum(0)
            return sums.log()
        result = self.z.new_full((len(self.z),), -torch.inf)
        for rows, columns, mirrored, tile in self.tiles():
            result[rows] = result[rows].logaddexp(tile.logsumexp(1))
            if mirrored:
                result[columns] = result[columns].logaddexp(tile.logsumexp(0))
        return result

    def weighted_sum(self, log_weight: Tensor, log_weight_of_columns: Tensor) -> Tensor:
        """Sum (exp(s_ij + log_weight_i) + exp(s_ij + log_weight_j)) z_j, [2n, d]. Over the negatives j of each row i."""
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
        """Return whether exp can neither overflow nor vanish. Of a similarity, and of the sum of two; |s| <= 1/temperature."""
        return 2.2 / self.temperature < math.log(torch.finfo(self.z.dtype).max)

    @property
    def _side(self) -> int:
        """Return the number of rows, and of columns, of a tile."""
        budget = _CUDA_TILE_BYTES if self.z.is_cuda else _CPU_TILE_BYTES * torch.get_num_threads()
        return max(1, min(math.isqrt(budget // self.z.element_size()), len(self.columns)))

    def tiles(self) -> Iterator[tuple[slice, slice, bool, Tensor]]:
        """Yield each tile; the next overwrites it. (rows of z, columns, is the mirrored tile left out, similarities)."""
        n, total, side = len(self.z) // 2, len(self.columns) // 2, self._side
        symmetric = self.z is self.columns
        scaled = self.z / self.temperature
        memory = self.z.new_empty(side**2)
        # Stretches of rows that are neighbours among the columns too: both views at once, or each alone.
        stretches = [(0, 2 * n, 0)] if symmetric else [(0, n, self.first), (n, 2 * n, total + self.first)]
        for begin, end, shift in stretches:
            for top in range(begin, end, side):
                rows = slice(top, min(top + side, end))
                place = shift + top - begin
                for left in range(place if symmetric else 0, 2 * total, side):
                    columns = slice(left, min(left + side, 2 * total))
                    shape = (rows.stop - top, columns.stop - left)
                    tile = memory[: shape[0] * shape[1]].view(shape)
                    torch.mm(scaled[rows], self.columns[columns].T, out=tile)
                    for excluded in (place, place + total, place - total):  # itself; its partner, behind it or before it
                        if -shape[0] < excluded - left < shape[1]:
                            tile.diagonal(excluded - left).fill_(-torch.inf)
                    yield rows, columns, symmetric and left > place, tile
