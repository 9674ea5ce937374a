"""Measure the kNN accuracy of a running training, on separate images. Nothing in the training reads it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.config.settings import Config
from simclr_dist.data.manifest import Manifest
from simclr_dist.data.pixels.decode import DTYPES
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.method.distributed import World, all_gather_rows, all_sum, together
from simclr_dist.method.model import SimCLR
from simclr_dist.train.inputs import choose

K = 20  # of some hundred or thousand images that vote; the evaluation's 200 is for a whole training set
TEMPERATURE = 0.1


class OnlineProbe:
    """kNN on a fixed choice of images, evenly spread over the shards. Every second one votes, the others are classified.

    Each rank holds its share, decoded once. Images that the run trains on are left out. Raises ConfigError when too few
    remain, and DataError (on every rank) for one that cannot be read.
    """

    def __init__(self, config: Config, settings: ViewSettings, train: Manifest, world: World, *, steps_per_epoch: int) -> None:
        self.every = config.probe.every_epochs * steps_per_epoch
        self._settings = settings
        self._batch = max(1, min(512, 2 * config.global_batch_size // (config.micro_batches * world.size)))
        self._device = world.device
        images = together(lambda: ShardDataset(config.probe.shards, checked=True, kind=config.data.kind))
        rows, self.left_out = choose(config.probe, images.manifest, train)
        self.images = len(rows)
        classes, places = np.unique(images.manifest.label[rows], return_inverse=True)
        self._labels, self.classes = torch.from_numpy(places), len(classes)
        self._mine = [torch.arange(part + 2 * world.rank, len(rows), 2 * world.size) for part in (0, 1)]  # voting, asking
        self._crops = together(lambda: [self._read(images, rows[part.numpy()]) for part in self._mine])

    def __str__(self) -> str:
        left_out = f" ({self.left_out} that are trained on left out)" if self.left_out else ""
        images = f"{self.images} images of {self.classes} classes, half of them vote{left_out}"
        return f"kNN every {self.every} steps, k {K}, {images}"

    def is_due(self, step: int) -> bool:
        """Return whether to measure after `step` steps."""
        return step % self.every == 0

    @torch.no_grad()
    def measure(self, model: SimCLR) -> dict[str, float]:
        """Measure `probe/knn_top1` in percent, alike on every rank. Leaves the encoder and the random numbers alone."""
        was_training = model.encoder.training
        model.encoder.eval()
        try:
            voting, asking = (self._features(model, crops) for crops in self._crops)
        finally:
            model.encoder.train(was_training)
        index = all_gather_rows(self._mine[0].to(self._device))
        order = index.argsort()  # so that equal votes fall alike at every number of ranks
        bank, labels = all_gather_rows(voting)[order], self._labels.to(self._device)
        right = torch.zeros((), dtype=torch.float64, device=self._device)
        if len(asking):
            votes = weighted_knn(bank, labels[index[order]], asking, k=K, temperature=TEMPERATURE, classes=self.classes)
            right += (votes.argmax(1) == labels[self._mine[1].to(self._device)]).sum()
        return {"probe/knn_top1": 100 * float(all_sum(right)) / (self.images // 2)}

    def _read(self, images: ShardDataset, rows: NDArray[np.int64]) -> Tensor:
        size = self._settings.image_size
        crops = torch.empty(len(rows), images.kind.channels, size, size, dtype=DTYPES[images.kind.bit_depth])
        for place, row in enumerate(rows):
            crops[place] = eval_view(images[int(row)].image, size)
        return crops

    def _features(self, model: SimCLR, crops: Tensor) -> Tensor:
        order = torch.channels_last if model.channels_last else torch.contiguous_format
        kind = next(model.parameters()).dtype
        parts = []
        for batch in crops.split(self._batch):
            x = normalise(batch.to(self._device), self._settings.mean, self._settings.std)
            with torch.autocast(self._device.type, model.autocast, enabled=model.autocast is not None):
                h = model.encoder(x.to(kind).contiguous(memory_format=order))
            parts.append(h.float())
        return torch.cat(parts)
