"""Hold small images in memory, decoded once. A rank shares them with its workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from simclr_dist.data.order import Rows
from simclr_dist.data.pixels.decode import DTYPES
from simclr_dist.data.pixels.resize import crop_views
from simclr_dist.data.reader import Images, Sample, ShardDataset
from simclr_dist.data.views.crops import Interpolation
from simclr_dist.system.errors import DataError, RankError, UnreachableError

AUTO_BYTES = 2**30
"""`data.in_memory: auto` holds sets of at most so many bytes of pixels (350,000 images of 32 x 32)."""
_BATCH_SIDE = 40
_PAUSE_BYTES = 2**22  # some tenths of a second of decoding


def held_in_memory(images: Images, choice: str, pause: Callable[[], object] = lambda: None) -> Images:
    """Decode `images` if `choice` is "always", or "auto" and they are few. The views are the same either way.

    A stream stays as it is. `pause` is called at times while images are decoded, equally often on every rank, and may raise.
    Raises RankError when a server of shards fails.
    """
    if not isinstance(images, ShardDataset):
        return images
    wanted = choice == "always" or (choice == "auto" and images.kind.pixel_bytes * images.manifest.pixels <= AUTO_BYTES)
    return DecodedImages(images, pause) if wanted else images


class DecodedImages(Dataset[Sample]):
    """All images by manifest row. Each is checked by sha256 and decoded once, at the start.

    Workers that are forked later share the memory. An image that cannot be read raises its DataError when its row is read, as
    from shards. A server of shards that fails raises RankError.
    """

    def __init__(self, images: ShardDataset, pause: Callable[[], object] = lambda: None) -> None:
        self.manifest, self.kind = (manifest := images.manifest), images.kind
        heights, widths = manifest.height.astype(np.int64), manifest.width.astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(heights * widths * self.kind.channels)])
        total = int(self._starts[-1])
        try:
            self._pixels = torch.empty(total, dtype=DTYPES[self.kind.bit_depth])
        except RuntimeError:
            raise RankError(
                f"data.in_memory: the pixels of {len(manifest)} images take {total * self.kind.bit_depth / 2**33:.3g} GiB,"
                " which this machine does not have; set it to never"
            ) from None
        self._bad: dict[int, str] = {}
        same = bool((heights == heights[0]).all() and (widths == widths[0]).all())
        self.of_one_size = same and max(heights[0], widths[0]) <= _BATCH_SIDE and self.kind.bit_depth == 8
        """Whether all have 8 bits and one size, a small one: then `crops` can be called."""
        pauses = np.diff(self._starts // _PAUSE_BYTES) > 0
        for row in range(len(manifest)):
            if pauses[row]:
                pause()
            try:
                image = images[row].image
                if image.shape[1:] != (heights[row], widths[row]):
                    raise DataError(
                        f"{manifest.folder}/{manifest.shards[manifest.shard_of(row)]}: image {manifest.key[row]}: has"
                        f" {image.shape[2]} x {image.shape[1]} pixels, the manifest says {widths[row]} x {heights[row]};"
                        " shard the images again"
                    )
            except UnreachableError as error:
                raise RankError(str(error)) from None
            except DataError as error:
                self._bad[row] = str(error)
            else:
                self._stored(row).copy_(image)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> Sample:
        if row in self._bad:
            raise DataError(self._bad[row])
        return Sample(self._stored(row), int(self.manifest.label[row]), int(row))

    def expect(self, now: Iterable[int], ahead: Iterable[int]) -> None:
        """Do nothing: all images are in memory."""

    def crops(self, rows: Rows, box: Rows, flip: NDArray[np.bool_], size: int, how: Interpolation) -> Tensor:
        """Make `crop_view` of each row, with the same bits. All rows take one call: uint8 [n, c, size, size]."""
        whole = self._pixels.view(len(self), self.kind.channels, int(self.manifest.height[0]), int(self.manifest.width[0]))
        return crop_views(whole, rows, box, flip, size, how)

    def _stored(self, row: int) -> Tensor:
        """View a row's pixels as [c, h, w]. They lie as `crops` takes them, or channels last, as `crop_view` likes it."""
        height, width = int(self.manifest.height[row]), int(self.manifest.width[row])
        pixels = self._pixels[self._starts[row] : self._starts[row + 1]]
        if self.of_one_size:
            return pixels.view(self.kind.channels, height, width)
        return pixels.view(height, width, self.kind.channels).permute(2, 0, 1)
