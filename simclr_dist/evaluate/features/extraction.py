"""Frozen features: every image of a set once, in manifest order, whatever the number of processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from simclr_dist.data.reader import Sample
from simclr_dist.data.steps import mind_parent_only
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.evaluate.features import workers as processes
from simclr_dist.method.distributed import all_gather_rows, rank, world_size
from simclr_dist.system.errors import DataError, RankError

RAW_PIXELS = "raw_pixels"
_PIXEL_SIZE = 32


class EncoderError(DataError):
    """An encoder that cannot be loaded, or gives no usable features; another one may."""


class Images(Protocol):
    """What is read: rows 0..n-1, each to a Sample (ShardDataset is one)."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample: ...


class Features(NamedTuple):
    """`h` [n, d] (float32; of raw pixels uint8), `label` int64 [n] (-1: none), `row` int64 [n], which is 0..n-1."""

    h: Tensor
    label: Tensor
    row: Tensor


def extract(
    images: Images,
    encoders: Mapping[str, nn.Module],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pixels: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    title: str = "features",
    view: Callable[[Tensor, int], Tensor] = eval_view,
    colour: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Features]:
    """Features of all images by each encoder, and with `pixels` by none (`RAW_PIXELS`), from one decode of each image.

    Rank r of the process group's W reads rows r, r + W, ...; no image is padded, repeated or dropped, and each rank
    returns the features of all rows in row order, on `device`. One `view` an image, eval mode, no gradient.
    Raw pixels are the view at `pixel_side(image_size)` pixels, flattened. `colour` makes the encoders' input of a batch of
    views (uint8 [n, 3, s, s], on `device`) and their rows (int64 [n]); without it they are normalised.

    Raises DataError for an empty set, EncoderError for features that are not finite, RankError for an image that cannot
    be read.
    """
    if len(images) == 0:
        raise DataError("there are no images to extract features from")
    mine = range(rank(), len(images), world_size())
    sizes = [image_size] if encoders else []
    sizes += [pixel_side(image_size)] if pixels else []
    views = _Views(images, sizes, view)
    loader: DataLoader[_Batch | str] = DataLoader(
        views,
        batch_size=batch_size,
        sampler=mine,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=mind_parent_only,
    )
    colours = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    with torch.inference_mode(), _eval_mode(encoders.values()):
        # The empty first parts give a rank without images the shapes that the others gather.
        example = torch.zeros(1, 3, image_size, image_size, device=device)
        parts = {name: [encoder(example)[:0].float()] for name, encoder in encoders.items()}
        if pixels:
            parts[RAW_PIXELS] = [torch.empty(0, 3 * sizes[-1] ** 2, dtype=torch.uint8, device=device)]
        labels, rows = ([torch.empty(0, dtype=torch.int64)] for _ in range(2))
        with tqdm(total=len(mine), unit=" images", desc=title, disable=None if rank() == 0 else True) as bar:
            for batch in processes.read(loader, views.abandoned):
                if isinstance(batch, str):
                    raise RankError(batch)
                if encoders:
                    x = batch.views[0].to(device, non_blocking=True)
                    x = colour(x, batch.row) if colour else normalise(x, *colours)
                    for name, encoder in encoders.items():
                        parts[name].append(encoder(x).float())
                if pixels:
                    parts[RAW_PIXELS].append(batch.views[-1].flatten(1).to(device))
                labels.append(batch.label)
                rows.append(batch.row)
                bar.update(len(batch.row))
        row, label = (all_gather_rows(torch.cat(part).to(device)) for part in (rows, labels))
        order = row.argsort()
        row, label = row[order], label[order]
        assert torch.equal(row.cpu(), torch.arange(len(images))), "each row exactly once"
        features = {}
        for name in list(parts):
            h = all_gather_rows(torch.cat(parts.pop(name)))[order]
            if bad := int((~h.isfinite().all(dim=1)).sum()):
                raise EncoderError(f"{name}: the representation of {bad} of {len(h)} images is not finite")
            features[name] = Features(h, label, row)
    return features


def pixel_side(image_size: int) -> int:
    """The side of raw pixels beside an encoder of `image_size`."""
    return min(image_size, _PIXEL_SIZE)


def extract_features(
    encoder: nn.Module,
    images: Images,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> Features:
    """`extract` for one encoder: h float32 [n, d]."""
    found = extract(
        images,
        {"encoder": encoder},
        image_size=image_size,
        mean=mean,
        std=std,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    return found["encoder"]


def in_precision(encoder: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """The encoder as it is ("fp32"), or computed in bf16 where autocast does so ("bf16")."""
    assert precision in ("fp32", "bf16"), precision
    return _Autocast(encoder, device.type) if precision == "bf16" else encoder


class _Batch(NamedTuple):
    views: list[Tensor]
    label: Tensor
    row: Tensor


class _Views(Dataset["_Batch | str"]):
    """Row to the views of its image at each size; or to the reason why it cannot be read.

    The reason is a value because an exception out of a worker process would reach the user as a traceback.
    """

    def __init__(self, images: Images, sizes: Sequence[int], view: Callable[[Tensor, int], Tensor]) -> None:
        self.images = images
        self.sizes = sizes
        self.view = view
        self.abandoned = torch.zeros((), dtype=torch.uint8).share_memory_()

    def __getitem__(self, row: int) -> "_Batch | str":
        if self.abandoned:
            return "nobody waits for it"
        try:
            image, label, row = self.images[row]
        except DataError as error:
            return str(error)
        return _Batch([self.view(image, size) for size in self.sizes], torch.tensor(label), torch.tensor(row))


def _collate(items: "list[_Batch | str]") -> "_Batch | str":
    batch = []
    for item in items:
        if isinstance(item, str):
            return item
        batch.append(item)
    views = [torch.stack(same_size) for same_size in zip(*(item.views for item in batch), strict=True)]
    return _Batch(views, torch.stack([item.label for item in batch]), torch.stack([item.row for item in batch]))


@contextmanager
def _eval_mode(encoders: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(encoder, encoder.training) for encoder in encoders]
    for encoder, _ in modes:
        encoder.eval()
    try:
        yield
    finally:
        for encoder, training in modes:
            encoder.train(training)


class _Autocast(nn.Module):
    """An encoder computed in bf16 where autocast does so."""

    def __init__(self, encoder: nn.Module, device_type: str) -> None:
        super().__init__()
        self.encoder = encoder
        self._device_type = device_type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self._device_type, torch.bfloat16):
            h: Tensor = self.encoder(x)
        return h
