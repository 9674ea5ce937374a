"""Extract frozen features. Every image of a set comes once, in manifest order, whatever the number of processes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from simclr_dist.data.reader import Sample
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.data.workers import Loader
from simclr_dist.method.distributed import all_gather_rows, rank, world_size
from simclr_dist.system.errors import DataError

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
    """Features `h` [n, d], float32 (of raw pixels uint8). `label` is int64 [n] (-1: none), and `row` int64 [n]: 0..n-1."""

    h: Tensor
    label: Tensor
    row: Tensor

    def labelled(self) -> "Features":
        """Return the features of images that have a label."""
        keep = self.label >= 0
        return self if bool(keep.all()) else Features(*(part[keep] for part in self))


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
    flattened. `colour` turns a batch of views (uint8 [n, 3, s, s], on `device`) and their rows (int64 [n]) into
    the encoders' input. Without it the views are normalised.

    Raises DataError for an empty set, EncoderError for features that are not finite, RankError for an image that cannot
    be read.
    """
    if len(images) == 0:
        raise DataError("there are no images to extract features from")
    mine, image_size = range(rank(), len(images), world_size()), card["image_size"]
    sizes = ([image_size] if encoders else []) + ([pixel_side(image_size)] if pixels else [])
    make = partial(_views, images, sizes, view)
    loader: Loader[_Batch] = Loader(make, mine, workers=workers, batch_size=batch_size, collate=default_collate)
    with torch.inference_mode(), ExitStack() as modes:
        for encoder in encoders.values():
            modes.callback(encoder.train, encoder.training)
            encoder.eval()
        # The empty first parts give a rank without images the shapes that the others gather.
        example = torch.zeros(1, 3, image_size, image_size, device=device)
        parts = {name: [encoder(example)[:0].float()] for name, encoder in encoders.items()}
        if pixels:
            parts[RAW_PIXELS] = [torch.empty(0, 3 * sizes[-1] ** 2, dtype=torch.uint8, device=device)]
        labels, rows = ([torch.empty(0, dtype=torch.int64)] for _ in range(2))
        with tqdm(total=len(mine), unit=" images", desc=title, disable=None if rank() == 0 else True) as bar:
            for views, label, row in loader:
                if encoders:
                    x = views[0].to(device, non_blocking=True)
                    x = colour(x, row) if colour else normalise(x, card["mean"], card["std"])
                    for name, encoder in encoders.items():
                        parts[name].append(encoder(x).float())
                if pixels:
                    parts[RAW_PIXELS].append(views[-1].flatten(1).to(device))
                labels.append(label)
                rows.append(row)
                bar.update(len(row))
        row, label = (all_gather_rows(torch.cat(part).to(device)) for part in (rows, labels))
        assert torch.equal(row.sort().values.cpu(), torch.arange(len(images))), "each row exactly once"
        return _in_row_order(parts, row, label)


def _in_row_order(parts: dict[str, list[Tensor]], row: Tensor, label: Tensor) -> dict[str, Features]:
    """Gather all ranks' parts in row order. `row` and `label` are theirs. `parts` is emptied, so memory holds each once."""
    order, features = row.argsort(), {}
    for name in list(parts):
        h = all_gather_rows(torch.cat(parts.pop(name)))[order]
        if bad := int((~h.isfinite().all(dim=1)).sum()):
            raise EncoderError(f"{name}: the representation of {bad} of {len(h)} images is not finite")
        features[name] = Features(h, label[order], row[order])
    return features


def pixel_side(image_size: int) -> int:
    """Return the side of raw pixels beside an encoder of `image_size`."""
    return min(image_size, _PIXEL_SIZE)


def in_precision(encoder: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Set the encoder's precision and return it. "bf16" computes in bf16 where autocast does so; "fp32" changes nothing."""
    assert precision in ("fp32", "bf16"), precision
    if precision == "bf16":
        encoder.forward = torch.autocast(device.type, torch.bfloat16)(encoder.forward)
    return encoder


def _views(
    images: Images, sizes: Sequence[int], view: Callable[[Tensor, int], Tensor], row: int
) -> tuple[list[Tensor], int, int]:
    """Return one image's view at each size, its label and its row."""
    image, label, row = images[row]
    return [view(image, size) for size in sizes], label, row
