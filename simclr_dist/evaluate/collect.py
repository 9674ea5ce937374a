"""All features that an evaluation needs: out of files where they fit, of the images where they do not."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr_dist.evaluate.features.augmented import SEED, TrainingViews, ViewImages, choose_rows, view_colour
from simclr_dist.evaluate.features.crops import RandomCrops, as_it_is, crop_and_flip
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features, Images, extract, in_precision, pixel_side
from simclr_dist.evaluate.features.file import About
from simclr_dist.evaluate.features.store import FeatureStore
from simclr_dist.evaluate.options import Settings
from simclr_dist.evaluate.result.report import TRAINED, UNTRAINED
from simclr_dist.evaluate.sets import Sets
from simclr_dist.method.distributed import World, all_gather_objects, on_rank_0


class _Wanted(NamedTuple):
    """One file's worth: whose features, and what they are features of."""

    name: str
    about: About


class Collector:
    """Features of a trained encoder with this `card`, of `untrained` and of pixels, of both sets and of augmented views.

    Every method is called by all ranks of `here` alike and returns features to rank 0 alone (`crops` to all). `store` is
    rank 0's: what it has is not extracted again, what it has not goes into it when `keep` is called.
    """

    def __init__(
        self,
        here: World,
        sets: Sets,
        settings: Settings,
        trained: nn.Module,
        sha256: str,
        untrained: nn.Module | None,
        store: FeatureStore | None,
    ) -> None:
        self._here, self._sets, self._settings, self._store = here, sets, settings, store
        self._card: dict[str, Any] = trained.card  # type: ignore[assignment]
        networks = {TRAINED: trained} if untrained is None else {UNTRAINED: untrained, TRAINED: trained}
        self._networks = {name: in_precision(one, settings.precision, here.device) for name, one in networks.items()}
        self._sha256 = sha256
        self._untrained = None if untrained is None else _weights_digest(untrained)
        self._pending: list[tuple[About, Sequence[str], NDArray[np.int64], Tensor]] = []

    def sets(self, pixels: bool) -> dict[str, dict[str, Features]]:
        """By "train" and "test", by encoder (with `pixels`, `RAW_PIXELS` too)."""
        return {name: self._set(name, pixels) for name in self._sets.images}

    def views(self, drawn: TrainingViews) -> list[Features]:
        """Of the test images' two augmented views (`augmented.choose_rows` of them), by the trained encoder."""
        manifest, images = self._sets.test, self._sets.images["test"]
        rows = choose_rows(len(manifest))
        found: list[Features] = []
        keys = [str(manifest.key[row]) for row in rows]
        for view in range(2):
            told = {"seed": SEED, "view": view, **dataclasses.asdict(drawn.settings)}
            wanted = [_Wanted(TRAINED, self._about("test", views=told))]
            one: Images = ViewImages(images, rows, drawn.settings, view)
            colour = view_colour(rows, drawn.settings, view)
            options = {"view": as_it_is, "colour": colour, "title": f"view {'ab'[view]} of test images"}
            got = self._collect(f"view {'ab'[view]}", wanted, one, keys, manifest.label[rows], **options)
            found += got.values()
        return found

    def crops(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Features [n, d] and labels [n] of new crops of all labelled training images, on every rank."""
        crops = RandomCrops(
            self._sets.images["train"], crop_and_flip(self._card["image_size"]), seed=self._settings.seed, epoch=epoch
        )
        encoder = {TRAINED: self._networks[TRAINED]}
        found = labelled(extract(crops, encoder, view=as_it_is, title=f"epoch {epoch + 1}", **self._options())[TRAINED])
        return found.h, found.label

    def keep(self) -> None:
        """Write what was extracted; after the last work of all ranks, since the others do not wait for disks."""
        if self._store is not None:
            for about, keys, label, h in self._pending:
                self._store.keep(about, keys, label, h.cpu().numpy())
            self._store.tell()
        self._pending.clear()

    def _set(self, name: str, pixels: bool) -> dict[str, Features]:
        manifest, images = self._sets.images[name].manifest, self._sets.images[name]
        wanted = []
        if pixels:
            side = pixel_side(self._card["image_size"])
            shape = {"pixels": side}
            wanted.append(
                _Wanted(RAW_PIXELS, About("", shape, RAW_PIXELS, side, "uint8", manifest.digest, tuple(manifest.classes)))
            )
        if self._untrained is not None:
            wanted.append(_Wanted(UNTRAINED, self._about(name, untrained=self._untrained)))
        wanted.append(_Wanted(TRAINED, self._about(name)))
        return self._collect(name, wanted, images, manifest.key.tolist(), manifest.label, title=f"{name} features")

    def _about(self, name: str, untrained: str = "", **shape: Any) -> About:
        if untrained:
            shape |= {"init": "random", "mean": self._card["mean"], "std": self._card["std"]}
        manifest = self._sets.images[name].manifest
        return About.of_card(
            self._card,
            untrained or self._sha256,
            precision=self._settings.precision,
            data_digest=manifest.digest,
            classes=manifest.classes,
            **shape,
        )

    def _collect(
        self, which: str, wanted: list[_Wanted], images: Images, keys: Sequence[str], label: NDArray[np.int64], **how: Any
    ) -> dict[str, Features]:
        found = on_rank_0(lambda: self._stored(which, wanted, keys)) or {}
        missing: list[str] = all_gather_objects([name for name, _ in wanted if name not in found])[0]
        if missing:
            encoders = {name: self._networks[name] for name in missing if name != RAW_PIXELS}
            made = extract(images, encoders, pixels=RAW_PIXELS in missing, **self._options(), **how)
            if self._here.is_main:
                found |= made
                if self._store is not None:
                    self._pending += [(about, keys, label, made[name].h) for name, about in wanted if name in made]
        return {name: found[name] for name, _ in wanted} if self._here.is_main else {}

    def _stored(self, which: str, wanted: list[_Wanted], keys: Sequence[str]) -> dict[str, Features]:
        found, device = {}, self._here.device
        for name, about in wanted if self._store is not None else ():
            assert self._store is not None
            if table := self._store.find(f"{which}: {name}", about, keys):
                label, h = torch.from_numpy(table.label.copy()), torch.from_numpy(table.embedding)
                found[name] = Features(h.to(device), label.to(device), torch.arange(len(h), device=device))
        return found

    def _options(self) -> dict[str, Any]:
        return {
            **{name: self._card[name] for name in ("image_size", "mean", "std")},
            "batch_size": self._settings.batch_size,
            "workers": self._settings.workers,
            "device": self._here.device,
        }


def labelled(features: Features) -> Features:
    """Those of images that have a label."""
    keep = features.label >= 0
    return features if bool(keep.all()) else Features(*(part[keep] for part in features))


def _weights_digest(network: nn.Module) -> str:
    """Hex sha256 of all tensors by name: fresh weights of a seed may be others under another torch."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
