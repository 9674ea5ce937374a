"""Extract frozen features. Every image of a set comes once, in manifest order, whatever the number of processes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from simclr_dist.data.pixels.kinds import kind_of
from simclr_dist.data.reader import Sample
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.data.workers import Loader
from simclr_dist.evaluate.rows import ROWS_AT_ONCE, copied, space_for
from simclr_dist.method.distributed import all_equal, all_gather, rank, world_size
from simclr_dist.method.precision import computing
from simclr_dist.system.errors import DataError
from simclr_dist.system.progress import Progress

RAW_PIXELS = "raw_pixels"
_PIXEL_SIZE = 32
_Batch = tuple[list[Tensor], Tensor, Tensor]  # views at each size, labels, rows


class EncoderError(DataError):
    """An encoder cannot be loaded or gives no usable features. Another encoder may work."""


class Images(Protocol):
    """Rows 0..n-1, each read as a Sample (ShardDataset is one)."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample: ...


class Features(NamedTuple):
    """Features `h` [n, d], float32; of raw pixels of 8 bits uint8. Those of 16 bits are on the same scale.

    `label` is int64 [n] (-1: none), and `row` int64 [n]: 0..n-1.
    """

    h: Tensor
    label: Tensor
    row: Tensor

    def labelled(self) -> "Features":
        """Return the features of images that have a label."""
        keep = (self.label >= 0).nonzero()[:, 0]
        return self if len(keep) == len(self.h) else Features(copied(self.h, keep), self.label[keep], self.row[keep])


def extract(
    images: Images,
    encoders: Mapping[str, nn.Module],
    card: Mapping[str, Any],
    *,
    pixels: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    title: str = "features",
    view: Callable[[Tensor, int], Tensor] = eval_view,
    colour: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Features]:
    """Extract the features of all images by each encoder. `pixels` adds raw pixels (`RAW_PIXELS`). Each image is decoded once.

    `card` gives the view's "image_size" and the "mean" and "std" that it is normalised with. Rank r of W reads rows
    r, r + W, ...; no image is padded, repeated or dropped, and each rank returns the features of all rows in row order, on
    `device`. One `view` an image, eval mode, no gradient. Raw pixels are the view at `pixel_side(image_size)` pixels,
    flattened. `colour` turns a batch of views (uint8 or uint16 [n, c, s, s], on `device`) and their rows (int64 [n]) into
    the encoders' input. Without it the views are normalised.

    Raises DataError for an empty set, EncoderError for features that are not finite, RankError for an image that cannot
    be read.
    """
    if len(images) == 0:
        raise DataError("there are no images to extract features from")
    mine, image_size = range(rank(), len(images), world_size()), card["image_size"]
    sizes = ([image_size] if encoders else []) + ([pixel_side(image_size)] if pixels else [])
    how: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "pin_memory": torch.device(device).type == "cuda"}
    loader: Loader[_Batch] = Loader(partial(_views, images, sizes, view), mine, collate=default_collate, **how)
    with torch.inference_mode(), ExitStack() as modes:
        for encoder in encoders.values():
            modes.callback(encoder.train, encoder.training)
            encoder.eval()
        # It gives a rank without images the shapes that the others gather.
        kind = kind_of(images)
        example = torch.zeros(1, kind.channels, image_size, image_size, device=device)
        shapes = {name: (encoder(example).shape[1], torch.float32) for name, encoder in encoders.items()}
        if pixels:
            shapes[RAW_PIXELS] = (kind.channels * sizes[-1] ** 2, torch.uint8 if kind.bit_depth == 8 else torch.float32)
        features = {name: space_for(len(mine), *shape, device) for name, shape in shapes.items()}
        labels, done = torch.empty(len(mine), dtype=torch.int64), 0
        with Progress(title, len(mine), "images", shown=rank() == 0) as shown:
            for views, label, row in loader:
                part = slice(done, done + len(row))
                assert row.tolist() == list(mine[part]), "each row exactly once"
                if encoders:
                    x = views[0].to(device, non_blocking=True)
                    x = colour(x, row) if colour else normalise(x, card["mean"], card["std"])
                    for name, encoder in encoders.items():
                        features[name][part] = encoder(x)
                if pixels:
                    features[RAW_PIXELS][part] = _as_8_bits(views[-1].flatten(1).to(device, non_blocking=True))
                labels[part], done = label, part.stop
                shown.done += len(row)
        assert done == len(mine), "each row exactly once"
        label = _gathered(labels[:, None].to(device), len(images))[:, 0]
        rows = torch.arange(len(images), device=device)
        return {name: Features(_checked(name, _gathered(features.pop(name), len(images))), label, rows) for name in shapes}


def _as_8_bits(pixels: Tensor) -> Tensor:
    return pixels if pixels.dtype == torch.uint8 else pixels.float() / 257


def _gathered(mine: Tensor, count: int) -> Tensor:
    """Gather all `count` rows, in row order. `mine` [n, d] are rows r, r + W, ... of rank r of W."""
    ranks = world_size()
    if ranks == 1:
        return mine
    whole = space_for(count, mine.shape[1], mine.dtype, mine.device)
    for start in range(0, -(-count // ranks), ROWS_AT_ONCE):
        part = mine[start : start + ROWS_AT_ONCE]
        padded = part.new_zeros(min(ROWS_AT_ONCE, -(-count // ranks) - start), part.shape[1])
        padded[: len(part)] = part
        rows = whole[start * ranks : (start + len(padded)) * ranks]
        rows.copy_(all_gather(padded).transpose(0, 1).flatten(0, 1)[: len(rows)])
    return whole


def _checked(name: str, h: Tensor) -> Tensor:
    """Return the features. Raises EncoderError where they are not finite."""
    if bad := sum(int((~rows.isfinite().all(dim=1)).sum()) for rows in h.split(ROWS_AT_ONCE)):
        raise EncoderError(f"{name}: the representation of {bad} of {len(h)} images is not finite")
    return h


def check_alike(network: nn.Module, path: object) -> None:
    """Raise EncoderError where ranks have loaded different files. One may be replaced while they read it."""
    if not all_equal(network.digests):
        raise EncoderError(f"{path}: was not the same file on every rank; evaluate it again")


def pixel_side(image_size: int) -> int:
    """Return the side of raw pixels beside an encoder of `image_size`."""
    return min(image_size, _PIXEL_SIZE)


def in_precision(encoder: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Set the encoder's precision and return it. Raises ConfigError for one that the device has not."""
    with computing(precision, device):
        pass
    encoder.forward = computing(precision, device)(encoder.forward)
    return encoder


def _views(
    images: Images, sizes: Sequence[int], view: Callable[[Tensor, int], Tensor], row: int
) -> tuple[list[Tensor], int, int]:
    """Return one image's view at each size, its label and its row."""
    image, label, row = images[row]
    return [view(image, size) for size in sizes], label, row
