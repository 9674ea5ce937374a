"""kNN while the run goes on: how good the representation is, on labelled images that the run does not train on.

Watched and never used to select: nothing in the training reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.config.settings import Config
from simclr_dist.data.manifest import Manifest
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.evaluate.protocols.knn import weighted_knn
from simclr_dist.method.distributed import World, all_gather_rows, all_sum, together
from simclr_dist.method.model import SimCLR
from simclr_dist.system.errors import ConfigError

K = 20  # of some hundred or thousand images that vote; the evaluation's 200 is for a whole training set
TEMPERATURE = 0.1


class OnlineProbe:
    """Holds each rank's share of the images, decoded once, uint8; every image is a neighbour or asks, never both.

    The images are a fixed choice, evenly spread over the shards: every second one votes, the others ask. Those that the run
    trains on are left out. Raises ConfigError when too few remain, DataError (on every rank) for one that cannot be read.
    """

    def __init__(self, config: Config, settings: ViewSettings, train: Manifest, here: World, *, steps_per_epoch: int) -> None:
        self.every = config.probe.every_epochs * steps_per_epoch
        self._settings = settings
        self._batch = max(1, min(512, 2 * config.global_batch_size // (config.micro_batches * here.size)))
        self._device = here.device
        images = together(lambda: ShardDataset(config.probe.shards))
        rows, self.left_out = choose(images.manifest, train, config.probe.images)
        if len(rows) < 4:
            raise ConfigError(
                f"probe.shards: {config.probe.shards!r} has {len(rows)} labelled images that the run does not train on"
                f" ({self.left_out} that it does); name others, as `simclr-dist shard --split` makes them"
            )
        self.images = len(rows)
        self._labels = torch.from_numpy(images.manifest.label[rows].astype(np.int64))
        self.classes = int(self._labels.max()) + 1
        self._mine = [torch.arange(part + 2 * here.rank, len(rows), 2 * here.size) for part in (0, 1)]  # voting, asking
        self._crops = together(lambda: [self._read(images, rows[part.numpy()]) for part in self._mine])

    def __str__(self) -> str:
        left_out = f" ({self.left_out} that are trained on left out)" if self.left_out else ""
        return (
            f"kNN every {self.every} steps, k {K}, {self.images} images of {self.classes} classes, half of them vote{left_out}"
        )

    def is_due(self, step: int) -> bool:
        """Whether it is time, after `step` steps."""
        return step % self.every == 0

    def measure(self, model: SimCLR) -> dict[str, float]:
        """`probe/knn_top1`, in percent of the asking images; on every rank alike.

        The encoder is left as it was: in its mode, with its running statistics, and no random number is drawn.
        """
        with torch.no_grad(), _eval_mode(model.encoder):
            voting, asking = (self._features(model, crops) for crops in self._crops)
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
        crops = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
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


def choose(images: Manifest, train: Manifest, most: int) -> tuple[NDArray[np.int64], int]:
    """Rows of at most `most` labelled images, evenly spread, and how many were left out because `train` has them too."""
    labelled = np.flatnonzero(images.label >= 0)
    known = np.isin(_digests(images)[labelled], _digests(train))
    free = labelled[~known]
    count = min(most, len(free))
    return free[np.arange(count) * len(free) // max(count, 1)], int(known.sum())


def _digests(manifest: Manifest) -> "NDArray[np.void]":
    return np.ascontiguousarray(manifest.sha256).view("V32").ravel()


@contextmanager
def _eval_mode(encoder: nn.Module) -> Iterator[None]:
    was = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was)
