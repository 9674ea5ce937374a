"""`simclr-dist embed`: the features of a user's own images, in a file. Under torchrun, the ranks share the work:
`torchrun --nproc-per-node 2 -m simclr_dist.evaluate.embed ENCODER SRC OUT.parquet`.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr_dist.convert.sources.folders import FileChunk
from simclr_dist.convert.sources.originals import Source
from simclr_dist.data.manifest import Manifest
from simclr_dist.data.pixels.decode import decode
from simclr_dist.data.pixels.images import prepare_image
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.encoder.file import file_digest, load_encoder
from simclr_dist.evaluate.command import told_once
from simclr_dist.evaluate.embed_options import EmbedSettings, add_arguments, check_out, find_images, run
from simclr_dist.evaluate.features.extraction import Images, extract, in_precision
from simclr_dist.evaluate.features.file import About, write_features
from simclr_dist.method.distributed import World, all_sum, on_rank_0, together, world
from simclr_dist.system.errors import DataError, RankError, UnreachableError, printable

_TOLD = 10  # images that are left out are named up to here, then counted


class Embedded(NamedTuple):
    """What `embed` wrote: how many `images` of `size` numbers each; how many were `left_out`, and why the first ten were."""

    images: int
    size: int
    left_out: int
    reasons: tuple[str, ...]


class ImageFiles:
    """The files of a `convert.sources.Source` as images: decoded with the checks and limits of `simclr-dist shard`.

    The pixels are those that the shards made of the same files would have. `key` is each file's printable path, relative to
    the source's folder; `sha256` uint8 [n, 32], shared with reading processes, is filled in as files are read.
    """

    def __init__(self, source: Source) -> None:
        self._files = [
            (chunk.root, name, label) for chunk in source.chunks if isinstance(chunk, FileChunk) for name, label in chunk.files
        ]
        self.key = tuple(printable(name) for _, name, _ in self._files)
        self.classes = source.classes
        self.sha256 = torch.zeros(len(self._files), 32, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> Sample:
        """Raises DataError, naming the file, for what is not an image, or a larger one than is decoded."""
        root, name, label = self._files[row]
        (original,) = FileChunk.of(root, row, [(name, label)]).read()
        try:
            if original.problem:
                raise DataError(original.problem)
            image = decode(prepare_image(original.content).content)
        except DataError as error:
            path = printable(os.path.join(root, name))  # noqa: PTH118 (a name need not be valid text)
            raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
        self.sha256[row] = torch.frombuffer(bytearray(hashlib.sha256(original.content).digest()), dtype=torch.uint8)
        return Sample(image, label, row)


class Readable:
    """Images of which some cannot be read: those become one black pixel, and 1 in `bad` uint8 [n], shared with readers."""

    def __init__(self, images: Images) -> None:
        self._images = images
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
            return Sample(torch.zeros(3, 1, 1, dtype=torch.uint8), -1, row)


def embed(
    encoder: str | Path,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: EmbedSettings | None = None,
    *,
    device: str = "auto",
) -> Embedded:
    """Write the features of `source` by an exported encoder to `out` (`feature_file`), every image once.

    `source` is a folder of shards, a folder of images (flat, or a folder a class), or image files. Rows are in the order of
    the manifest, or of sorted paths, whatever the number of ranks and workers. Labels are the source's, class folders by
    sorted name. Returns the same on every rank; rank 0 writes.

    Raises ConfigError for a setting out of range; DataError for an encoder file that is none, a source without images, and
    an `out` that cannot be written; RankError for an image that cannot be read, unless `settings.skip_bad`.
    """
    sources = [source] if isinstance(source, str | Path) else source
    found = find_images(sources)
    check_out(out, sources)
    with world(device) as here:
        return embed_within(here, encoder, found, Path(out), settings or EmbedSettings())


def run_checked(encoder: str, found: str | Path | Source, out: str, settings: EmbedSettings, *, device: str) -> int:
    """`embed` of what `embed_options.check_arguments` has found, then lines on what was done; 0."""
    begin = time.perf_counter()
    with world(device) as here:
        done = embed_within(here, encoder, found, Path(out), settings)
    if not here.is_main:
        return 0
    if isinstance(found, Source):
        if found.skipped:
            print(f"files that are no images by their name: {len(found.skipped)}, like {found.skipped[0].name}")
        for problem in found.rejected[:_TOLD]:
            print(f"left out: {problem.name}: {problem.reason}")
        if len(found.rejected) > _TOLD:
            print(f"links that are left out: {len(found.rejected)} in all")
    for reason in done.reasons:
        print(f"left out: {reason}")
    if done.left_out:
        print(f"images that cannot be read and are left out: {done.left_out}")
    seconds, size = time.perf_counter() - begin, Path(out).stat().st_size
    print(f"{done.images} images, {done.size} numbers each, {size / 2**20:.1f} MiB in {seconds:.1f} s; written: {out}")
    return 0


def embed_within(here: World, encoder: str | Path, found: str | Path | Source, out: Path, settings: EmbedSettings) -> Embedded:
    """`embed` within a world, of what `embed_options.find_images` has found."""
    network = together(lambda: load_encoder(encoder, here.device, settings.layer))
    card: dict[str, Any] = network.card  # type: ignore[assignment]
    images = together(lambda: ShardDataset(found) if isinstance(found, str | Path) else ImageFiles(found))
    read = Readable(images) if settings.skip_bad else images
    try:
        features = extract(
            read,
            {"encoder": in_precision(network, settings.precision, here.device)},
            image_size=card["image_size"],
            mean=card["mean"],
            std=card["std"],
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=here.device,
        )["encoder"]
    except RankError as error:
        raise RankError(f"{error}; mend it, or leave such images out with --skip-bad") from None
    bad = np.zeros(len(images), dtype=bool)
    if isinstance(read, Readable):
        bad = all_sum(read.bad.to(here.device)).cpu().numpy() > 0
    if bad.all():
        raise DataError(f"none of the {len(images)} images can be read, like {_reason(images, 0)}")
    digest, classes, keys = _describe(images, features.label, here.device)
    about = About.of_card(card, file_digest(encoder), precision=settings.precision, data_digest=digest, classes=classes)
    label, h = features.label.cpu().numpy(), features.h.cpu().numpy()
    left_out = np.flatnonzero(bad).tolist()
    if left_out:
        label, h, keys = label[~bad], h[~bad], [key for key, lost in zip(keys, bad, strict=True) if not lost]
    on_rank_0(lambda: write_features(out, keys, label, h, about))
    return Embedded(len(h), h.shape[1], len(left_out), tuple(_reason(images, row) for row in left_out[:_TOLD]))


def _describe(
    images: ShardDataset | ImageFiles, label: Tensor, device: torch.device
) -> tuple[str, tuple[str, ...], Sequence[str]]:
    """Digest, class names and keys; after all has been read."""
    if isinstance(images, ShardDataset):
        manifest: Manifest = images.manifest
        return manifest.digest, manifest.classes, manifest.key.tolist()
    # Each file was read by one rank, the others have zeros; a file that could not be read has zeros everywhere.
    hashes = all_sum(images.sha256.to(device)).cpu().numpy()
    digest = hashlib.sha256(json.dumps([images.key, images.classes]).encode())
    digest.update(hashes.tobytes())
    digest.update(label.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest(), images.classes, images.key


def _reason(images: Images, row: int) -> str:
    """Why an image cannot be read."""
    try:
        images[row]
    except DataError as error:
        return str(error)
    return f"image {row} could not be read, and now can"


def main(argv: Sequence[str], prog: str = "python -m simclr_dist.evaluate.embed") -> int:
    """`simclr-dist embed`, where torchrun starts it; returns the exit code (a wrong command line exits with 2)."""
    parser = argparse.ArgumentParser(prog=prog, description="Features of images by an exported encoder, as Parquet.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return told_once(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
