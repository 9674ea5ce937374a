"""Collect all features that an evaluation needs. They come out of files that fit, else of the images."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.encoder.card import LoadedEncoder
from simclr_dist.evaluate.features import views
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features, Images, extract, in_precision, pixel_side
from simclr_dist.evaluate.features.file import About
from simclr_dist.evaluate.features.store import FeatureStore
from simclr_dist.evaluate.result.file import TRAINED, UNTRAINED
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import Settings
from simclr_dist.method.distributed import World, all_gather_objects, await_rank_0, on_rank_0


class Collector:
    """Features of a trained encoder, of `untrained` and of pixels. They are of both sets and of augmented views.

    Every method is called by all ranks of `world` alike and returns features to rank 0 alone (`crops` to all). `store` is
    rank 0's. What it has is not extracted again. What it lacks goes into it when `keep` is called.
    """

    def __init__(
        self,
        world: World,
        sets: Sets,
        settings: Settings,
        trained: LoadedEncoder,
        sha256: str,
        untrained: nn.Module | None,
        store: FeatureStore | None,
    ) -> None:
        self._world, self._sets, self._settings, self._store = world, sets, settings, store
        self._card = trained.card
        networks = {TRAINED: trained} if untrained is None else {UNTRAINED: untrained, TRAINED: trained}
        self._networks = {name: in_precision(one, settings.precision, world.device) for name, one in networks.items()}
        self._sha256 = sha256
        self._untrained = None if untrained is None else _weights_digest(untrained)
        self._pending: list[tuple[About, Sequence[str], NDArray[np.int64], Tensor]] = []
        options = {"batch_size": settings.batch_size, "workers": settings.workers, "device": world.device}
        self._options: dict[str, Any] = {"card": self._card, **options}

    def sets(self, pixels: bool) -> dict[str, dict[str, Features]]:
        """Collect the features of "train" and "test", by encoder. With `pixels`, `RAW_PIXELS` is one of them."""
        return {name: self._set(name, pixels) for name in self._sets.images}

    def views(self, drawn: views.TrainingViews) -> list[dict[str, Features]]:
        """Collect the features of two augmented views, by encoder. `views.choose_rows` chooses the test images."""
        manifest, images, settings = self._sets.test, self._sets.images["test"], drawn.settings
        rows = views.choose_rows(len(manifest))
        keys = [str(manifest.key[row]) for row in rows]
        features = []
        for view, name in enumerate(("view a", "view b")):
            wanted = self._encoders("test", views={"seed": views.SEED, "view": view, **vars(settings)})
            crops = views.RandomCrops(images, settings, rows.tolist(), seed=views.SEED, epoch=0, view=view)
            how = {"view": views.as_it_is, "colour": views.view_colour(rows, settings, view), "title": f"{name} of test images"}
            features.append(self._collect(name, wanted, crops, keys, manifest.label[rows], **how))
        return features

    def crops(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Extract features [n, d] and labels [n] of new crops. Every rank gets those of all labelled training images."""
        await_rank_0()  # it has learnt from the epoch before
        settings = views.crop_and_flip(self._card["image_size"])
        crops = views.RandomCrops(self._sets.images["train"], settings, seed=self._settings.seed, epoch=epoch)
        encoder = {TRAINED: self._networks[TRAINED]}
        features = extract(crops, encoder, view=views.as_it_is, title=f"epoch {epoch + 1}", **self._options)[TRAINED].labelled()
        return features.h, features.label

    def keep(self) -> None:
        """Write what was extracted. Call it after the last work of all ranks, as the others do not wait for disks."""
        if self._store is not None:
            for about, keys, label, h in self._pending:
                self._store.keep(about, keys, self._sets.labels[label], h.cpu().numpy())
            self._store.report()
        self._pending.clear()

    def _set(self, name: str, pixels: bool) -> dict[str, Features]:
        images, side = self._sets.images[name], pixel_side(self._card["image_size"])
        manifest = images.manifest
        wanted = {}
        if pixels:
            dtype = "uint8" if manifest.kind.bit_depth == 8 else "fp32"
            shape = {"pixels": side, "channels": manifest.kind.channels}  # of which the digest says nothing
            wanted[RAW_PIXELS] = About("", shape, RAW_PIXELS, side, dtype, manifest.digest, self._sets.names[name])
        wanted |= self._encoders(name)
        return self._collect(name, wanted, images, manifest.key.tolist(), manifest.label, title=f"{name} features")

    def _encoders(self, name: str, **shape: Any) -> dict[str, About]:
        wanted = {}
        if self._untrained is not None:
            mean, std = self._card["mean"], self._card["std"]
            wanted[UNTRAINED] = self._about(name, self._untrained, init="random", mean=mean, std=std, **shape)
        return {**wanted, TRAINED: self._about(name, self._sha256, **shape)}

    def _about(self, name: str, sha256: str, **shape: Any) -> About:
        manifest = self._sets.images[name].manifest
        precision, digest = self._settings.precision, manifest.digest
        return About.of_card(
            self._card, sha256, precision=precision, data_digest=digest, classes=self._sets.names[name], **shape
        )

    def _collect(
        self, part: str, wanted: dict[str, About], images: Images, keys: Sequence[str], label: NDArray[np.int64], **how: Any
    ) -> dict[str, Features]:
        """Collect features of `wanted` for rank 0. They come out of the store, or all ranks extract them."""
        features = on_rank_0(lambda: self._stored(part, wanted, keys, label), however_long=True) or {}
        missing: list[str] = all_gather_objects([name for name in wanted if name not in features])[0]
        if missing:
            encoders = {name: self._networks[name] for name in missing if name != RAW_PIXELS}
            extracted = extract(images, encoders, pixels=RAW_PIXELS in missing, **self._options, **how)
            if self._world.is_main:
                features |= extracted
                if self._store is not None:
                    self._pending += [(wanted[name], keys, label, extracted[name].h) for name in missing]
        return {name: features[name] for name in wanted} if self._world.is_main else {}

    def _stored(
        self, part: str, wanted: dict[str, About], keys: Sequence[str], label: NDArray[np.int64]
    ) -> dict[str, Features]:
        if self._store is None:
            return {}
        stored, device = {}, self._world.device
        for name, about in wanted.items():
            if table := self._store.find(f"{part}: {name}", about, keys):
                h = torch.from_numpy(table.embedding).to(device)
                stored[name] = Features(h, torch.tensor(label, device=device), torch.arange(len(h), device=device))
        return stored


def _weights_digest(network: nn.Module) -> str:
    """Return the hex sha256 of all tensors by name. Fresh weights of a seed may differ under another torch."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
