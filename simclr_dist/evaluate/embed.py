"""Write the features of a user's own images to a file. The ranks share the work."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.convert.sources.folders import FileChunk
from simclr_dist.convert.sources.originals import Source
from simclr_dist.data.pixels.decode import DTYPES, decode_any
from simclr_dist.data.pixels.kinds import RGB8, Kind, kind_of
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.preprocess import encoder_kind
from simclr_dist.evaluate.features.extraction import Images, check_alike, extract, in_precision
from simclr_dist.evaluate.features.file import About, write_features
from simclr_dist.evaluate.map import write_map
from simclr_dist.evaluate.sets import open_images
from simclr_dist.evaluate.settings import EmbedSettings
from simclr_dist.evaluate.sources import check_out, find_images
from simclr_dist.method.distributed import World, all_sum, on_rank_0, process_group, together
from simclr_dist.system.errors import DataError, RankError, UnreachableError, printable, reason_of

_NAMED = 10  # images that are left out are named up to this number, then counted


class Embedded(NamedTuple):
    """Result of `embed`: `images` of `size` numbers each. It counts images `left_out`; `reasons` are the first ten's."""

    images: int
    size: int
    left_out: int
    reasons: tuple[str, ...]


class ImageFiles:
    """The files of a `Source` as images. They get the checks, limits and pixels of `simclr-dist shard`.

    `key` is each file's printable path in the source's folder; `sha256` uint8 [n, 32], shared with readers, fills as they read.
    """

    def __init__(self, source: Source, kind: Kind = RGB8) -> None:
        self.kind = kind
        chunks = [chunk for chunk in source.chunks if isinstance(chunk, FileChunk)]
        self._files = [(chunk.root, name, label) for chunk in chunks for name, label in chunk.files]
        self.key = tuple(printable(name) for _, name, _ in self._files)
        self.classes = source.classes
        self.sha256 = torch.zeros(len(self._files), 32, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._files)

    def source(self, row: int) -> str:
        return self.key[row]

    def __getitem__(self, row: int) -> Sample:
        """Read an image. Raises DataError with the file's name for what is no image, or is larger than is decoded."""
        root, name, label = self._files[row]
        (original,) = FileChunk.of(root, row, [(name, label)]).read()
        try:
            if original.problem:
                raise DataError(original.problem)
            image = decode_any(original.content, self.kind)
        except DataError as error:
            path = printable(os.path.join(root, name))  # noqa: PTH118 (a name need not be valid text)
            raise DataError(f"{path}: {reason_of(error)}") from None
        self.sha256[row] = torch.frombuffer(bytearray(hashlib.sha256(original.content).digest()), dtype=torch.uint8)
        return Sample(image, label, row)


class Readable:
    """Images of which some cannot be read. Such a one becomes a black pixel, and 1 in `bad` uint8 [n], shared with readers."""

    def __init__(self, images: Images) -> None:
        self._images, self.kind = images, kind_of(images)
        self.bad = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        try:
            return self._images[row]
        except UnreachableError:
            raise
        except DataError:
            self.bad[row] = 1
            return Sample(torch.zeros(self.kind.channels, 1, 1, dtype=DTYPES[self.kind.bit_depth]), -1, row)


def embed(
    encoder: str | Path,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: EmbedSettings | None = None,
    *,
    device: str = "auto",
) -> Embedded:
    """Write the features of `source` by an exported encoder to `out`. Every image is in the file (`features.file`) once.

    `source` is a folder of shards, a folder of images (flat, or a folder a class), or image files. Rows are in the order of
    the manifest, or of sorted paths, whatever the number of ranks and workers. Labels are the source's, class folders by
    sorted name. Returns the same on every rank; rank 0 writes.

    Raises ConfigError for a setting out of range; DataError for an encoder file that is none, a source without images, and
    an `out` that cannot be written; RankError for an image that cannot be read, unless `settings.skip_bad`.
    """
    sources = [source] if isinstance(source, str | Path) else source
    images, settings = find_images(sources), settings or EmbedSettings()
    check_out(out, sources, settings.map)
    with process_group(device) as world:
        return embed_within(world, encoder, images, Path(out), settings)


def embed_within(
    world: World, encoder: str | Path, source: str | Path | Source, out: Path, settings: EmbedSettings
) -> Embedded:
    """Do `embed` within a world, of a source from `sources.find_images`."""
    network = together(lambda: load_encoder(encoder, world.device, settings.layer))
    check_alike(network, encoder)
    card, digests = network.card, network.digests
    images = together(
        lambda: ImageFiles(source, encoder_kind(card)) if isinstance(source, Source) else open_images(source, card, encoder)
    )
    on_rank_0(lambda: _check_room(out, 4 * len(images) * card["feature_size"]))
    read = Readable(images) if settings.skip_bad else images
    try:
        how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers, "device": world.device}
        encoders = {"encoder": in_precision(network, settings.precision, world.device)}
        h, label = (part.cpu().numpy() for part in extract(read, encoders, card, **how)["encoder"][:2])
    except RankError as error:
        raise RankError(f"{error}; mend it, or leave such images out with --skip-bad") from None
    bad = np.zeros(len(images), dtype=bool)
    if isinstance(read, Readable):
        bad = all_sum(read.bad.to(world.device)).cpu().numpy() > 0
    if bad.all():
        raise DataError(f"none of the {len(images)} images can be read, like {_reason(images, 0)}")
    digest, classes, keys = _describe(images, label, world.device)
    about = About.of_card(card, digests["sha256"], precision=settings.precision, data_digest=digest, classes=classes)
    left_out, rows = np.flatnonzero(bad).tolist(), np.flatnonzero(~bad).tolist()
    if left_out:
        label, h, keys = label[~bad], h[~bad], [keys[row] for row in rows]
    sources = [images.source(row) for row in rows]
    on_rank_0(lambda: write_features(out, keys, label, h, about, sources), however_long=True)
    if settings.map is not None:
        picture = Path(settings.map)
        on_rank_0(lambda: write_map(picture, h, label, classes, images, rows), however_long=True)
    return Embedded(len(h), h.shape[1], len(left_out), tuple(_reason(images, row) for row in left_out[:_NAMED]))


def _check_room(out: Path, size: int) -> None:
    """Raise DataError where the disk has no room for `size` bytes. They are written when all is read."""
    if size > (free := shutil.disk_usage(out.parent).free):
        why = f"the features take {size / 2**20:.1f} MiB, and its disk has {free / 2**20:.1f} MiB free"
        raise DataError(f"{out}: {why}; make room, or name a file on another disk")


def _describe(
    images: ShardDataset | ImageFiles, label: NDArray[np.int64], device: torch.device
) -> tuple[str, tuple[str, ...], Sequence[str]]:
    """Return digest, class names and keys. Call it after all has been read."""
    if isinstance(images, ShardDataset):
        return images.manifest.digest, images.manifest.classes, images.manifest.key.tolist()
    # Each file was read by one rank, the others have zeros; a file that could not be read has zeros everywhere.
    hashes = all_sum(images.sha256.to(device)).cpu().numpy()
    content = json.dumps([images.key, images.classes]).encode() + hashes.tobytes() + label.astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest(), images.classes, images.key


def _reason(images: Images, row: int) -> str:
    """Say why an image cannot be read."""
    try:
        images[row]
    except DataError as error:
        return str(error)
    return f"image {row} could not be read, and now can"
