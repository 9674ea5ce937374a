"""Compute model and loss in pieces, to the same bits everywhere."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from simclr_dist.method.distributed import broadcast
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.method.model import SimCLR
from simclr_dist.method.pieces import Pieces, summed_in_groups


class InPieces(nn.Module):
    """The model, in DDP's place. Forward: both views of this rank's images, float [2n, c, s, s], to z [2n, d].

    A piece is both views of `images` images. Every rank begins with rank 0's weights.
    """

    def __init__(self, model: SimCLR, images: int) -> None:
        super().__init__()
        self.inner, self.images = model, images
        for tensor in model.state_dict().values():
            broadcast(tensor)

    def forward(self, x: Tensor) -> Tensor:
        pieces, keys = self._cut(x), getattr(self.inner.encoder, "keys", None)  # a module of the user's own has none
        with summed_in_groups(list(self.inner.parameters()), len(pieces.parts)), ExitStack() as stack:
            if keys is not None and keys.of_images is not None:
                stack.enter_context(keys.using(self._cut(keys.of_images), keys.of_layers))
            z = self.inner(pieces)
        views = zip(*(part.chunk(2) for part in z.parts), strict=True)
        return torch.cat([part for view in views for part in view])

    def _cut(self, x: Tensor) -> Pieces:
        # Copies: where a tensor begins in memory decides how it is multiplied.
        return Pieces([torch.cat(views) for views in zip(*(view.split(self.images) for view in x.chunk(2)), strict=True)])


class ExactNTXentLoss(NTXentLoss):
    """NTXentLoss in pieces. Its gradient has no factor world_size: nothing averages it over the ranks.

    Its pieces are those of all `micro_batches` together, as only so their order is that of the ranks.
    """

    def __init__(self, temperature: float, *, decoupled: bool, scale: float, micro_batches: int, images: int) -> None:
        super().__init__(temperature, decoupled=decoupled, scale=scale)
        self.micro_batches, self.images = micro_batches, images

    @property
    def factor(self) -> float:
        return 1

    def cut(self, z: Tensor) -> Sequence[Tensor]:
        return list(z.view(self.micro_batches, -1, self.images, z.shape[1]).transpose(0, 1).flatten(1, 2))
