"""Images by manifest row, each read checked; and the two views of a step's images."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode  # registers torch.ops.image

from simclr_dist import stopping
from simclr_dist.data.draws import ViewDraws, ViewSettings, draw_views
from simclr_dist.data.manifest import Manifest, load_manifest
from simclr_dist.data.order import Plan
from simclr_dist.data.views import colour_views, crop_view
from simclr_dist.errors import DataError, RankError


class Sample(NamedTuple):
    """One image: uint8 [3, h, w], its label (-1: none) and manifest row."""

    image: Tensor
    label: int
    row: int


class ShardDataset(Dataset[Sample]):
    """A folder of shards as a map from manifest row to image, read by offset.

    Raises DataError, naming key and shard, when the bytes are not those that the manifest was written for.
    """

    def __init__(self, folder: str | Path, *, open_shards: int = 32) -> None:
        self.manifest: Manifest = load_manifest(folder)
        self._open_shards = open_shards
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> Sample:
        try:
            # The op itself: torchvision.io.decode_image only adds a DeprecationWarning (0.29; TorchCodec is to replace it).
            content = torch.frombuffer(bytearray(self.read(row)), dtype=torch.uint8)
            image = torch.ops.image.decode_image(content, ImageReadMode.RGB.value, False)
        except RuntimeError as error:
            raise DataError(f"{self._name(row)}: cannot be decoded: {str(error).splitlines()[0]}") from None
        return Sample(image, int(self.manifest.label[row]), int(row))

    def read(self, row: int) -> bytes:
        """The image's bytes as they were converted; raises DataError when sha256 says otherwise."""
        m = self.manifest
        try:
            content = os.pread(self._descriptor(int(m.shard[row])), int(m.size[row]), int(m.offset[row]))
        except OSError as error:
            raise DataError(f"{self._name(row)}: cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).digest() != m.sha256[row].tobytes():
            raise DataError(f"{self._name(row)}: its bytes are not those of the manifest (sha256); shard the images again")
        return content

    def _name(self, row: int) -> str:
        m = self.manifest
        return f"{m.folder / m.shards[m.shard[row]]}: image {m.key[row]}"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._open_shards:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.manifest.folder / self.manifest.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class Views(NamedTuple):
    """One rank's part of a step, before colour.

    `crops`: uint8 [n, 3, s, s] of view a and of view b; `draws`: what `colour_views` has still to apply to each; `rows`:
    int64 [n], after replacements. `bad`: (manifest row, reason) of unreadable images met; `failed` is the reason for which
    the step cannot be made (a worker reports it, since an exception out of a worker would reach the user as a traceback).
    """

    step: int
    crops: tuple[Tensor, Tensor]
    draws: tuple[ViewDraws, ViewDraws]
    rows: Tensor
    bad: list[tuple[int, str]]
    failed: str | None = None


class StepDataset(Dataset[Views]):
    """A map from global step to this rank's views: a pure function, so a resumed run only starts at another index."""

    def __init__(self, images: ShardDataset, plan: Plan, settings: ViewSettings, *, replace_bad: bool = False) -> None:
        self.images = images
        self.plan = plan
        self.settings = settings
        self.replace_bad = replace_bad

    def __getitem__(self, step: int) -> Views:
        epoch, rows = self.plan[step]
        bad: list[tuple[int, str]] = []
        samples = []
        for row, slot in zip(rows, self.plan.slots(), strict=True):
            sample = self._first_readable(step, int(slot), int(row), bad)
            if sample is None:
                return Views(step, (torch.empty(0),) * 2, (), torch.empty(0), bad, failed=bad[-1][1])  # type: ignore[arg-type]
            samples.append(sample)
        images = [sample.image for sample in samples]
        used = np.array([sample.row for sample in samples], dtype=np.int64)
        height, width = np.array([image.shape[1:] for image in images]).T
        crops, draws = [], []
        for view in range(2):
            drawn = draw_views(
                self.settings, seed=self.plan.seed, epoch=epoch, rows=used, view=view, heights=height, widths=width
            )
            size, how = self.settings.image_size, self.settings.interpolation
            boxes = zip(images, drawn.box, drawn.flip, strict=True)
            crops.append(torch.stack([crop_view(image, box, flip, size, how) for image, box, flip in boxes]))
            draws.append(drawn)
        return Views(step, (crops[0], crops[1]), (draws[0], draws[1]), torch.from_numpy(used), bad)

    def _first_readable(self, step: int, slot: int, row: int, bad: list[tuple[int, str]]) -> Sample | None:
        """The slot's own image, else (with replace_bad) the first of its spares that can be read."""
        try:
            return self.images[row]
        except DataError as error:
            bad.append((row, str(error)))
        for spare in self.plan.spares(step, slot) if self.replace_bad else ():
            try:
                return self.images[int(spare)]
            except DataError as error:
                bad.append((int(spare), str(error)))
        return None


def load_steps(dataset: StepDataset, steps: range, *, workers: int, pin_memory: bool = False) -> Iterator[Views]:
    """The views of each step of `steps`, made ahead by `workers` processes; raises RankError when a step cannot be made."""
    loader: DataLoader[Views] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,  # the default would turn the draws' arrays into tensors
        sampler=steps,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=mind_parent_only,
    )
    with stopping.blocked():  # workers start here, and keep it so
        made = iter(loader)
    while True:
        try:
            views = next(made, None)
        except (EOFError, ConnectionError) as error:  # before torch has noticed
            raise RuntimeError("DataLoader worker died: killed, or out of memory") from error
        if views is None:
            return
        if views.failed is not None:
            raise RankError(views.failed)
        yield views


def two_views(views: Views, settings: ViewSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colour, blur and normalise on `device`: two float32 [n, 3, s, s]."""
    a, b = (
        colour_views(crops.to(device, non_blocking=True), draws, settings)
        for crops, draws in zip(views.crops, views.draws, strict=True)
    )
    return a, b


def mind_parent_only(_: int) -> None:
    """The `worker_init_fn` of a DataLoader whose iterator is made while stop signals are blocked."""
    stopping.mind_parent_only()


def _as_it_is(views: Any) -> Any:
    return views
