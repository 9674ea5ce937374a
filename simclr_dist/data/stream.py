"""Read tars without a manifest from front to back. A `webdataset` pipeline does so; there are no exact epochs.

Each worker of each rank reads its own tars, again and again in a new order, through a shuffle buffer. A step takes as many
images as any other, so ranks stay together. But which images, and how often, depends on ranks and workers, and a resumed run
starts its tars anew.
"""

import io
import itertools
import os
import random
import secrets
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, get_worker_info

from simclr_dist.data.collection import PIPE, digest_of_tars, find_tars
from simclr_dist.data.order import Plan, Rows
from simclr_dist.data.pixels.decode import decode, decode_any, turn_upright
from simclr_dist.data.pixels.images import check_pixels, orientation_of
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.data.reader import Sample
from simclr_dist.data.remote.cache import CacheSettings, cache_settings
from simclr_dist.data.remote.fetch import fetch, is_url
from simclr_dist.data.tar_stream import MAX_FILE_BYTES, TAR_ERRORS, tar_files
from simclr_dist.system.errors import DataError, UnreachableError, printable, reason_of, redact, refusing

_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_DEEP_SUFFIXES = ("tif", "tiff")  # where another kind is asked for than 8-bit RGB, which decoders give at once
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_SPARES = 100
_BROKEN = "broken"


@dataclass(frozen=True)
class StreamPlan(Plan):
    """A plan without an order. A step's rows are running numbers of the epoch.

    `shard_sizes` is [samples], the number that the user states. A view is drawn for (seed, epoch, running number), so it
    does not depend on workers or ranks. The image that it shows does depend on them.
    """

    def __getitem__(self, step: int) -> tuple[int, Rows]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch, (position * self.global_batch_size + self.slots()).astype(np.int64)

    def shards_around(self, step: int) -> tuple[Rows, Rows]:
        """Return no shards: the order is not known."""
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def spares(self, step: int, slot: int) -> Iterator[int]:
        """Repeat the place's number. Each read of it gives the stream's next image."""
        return itertools.repeat(step % self.steps_per_epoch * self.global_batch_size + slot, _SPARES)


class StreamImages(Dataset[Sample]):
    """The images of `where`; each read gives the next one. `where`: tars in braces, local, remote or `pipe:` commands.

    Must be read in the processes that a DataLoader with `workers` workers starts on rank `rank` of `world_size`. `samples`
    is the number of images in all tars, `shuffle` how many a worker mixes at a time. `start` is the step that the run (again)
    begins with; with `seed` it decides the order. A tar's image is the member ending in jpg, jpeg, png, webp or
    gif; for a `kind` that is not 8-bit RGB also tif or tiff. Raises ConfigError when there are fewer tars than workers, and for
    `pipe:` without `allow_pipe`; DataError when a local tar is not there.
    """

    def __init__(
        self, where: str, samples: int,
        *, seed: int, rank: int = 0, world_size: int = 1, workers: int = 0,
        shuffle: int = 1000, allow_pipe: bool = False, cache: CacheSettings | None = None, kind: Kind = RGB8,
    ) -> None:  # fmt: skip
        self.samples, self.kind, self.start = samples, kind, 0
        self._shards = find_tars(where, allow_pipe=allow_pipe, ranks=world_size, workers=workers)
        self._seed, self._rank, self._shuffle, self._cache = seed, rank, shuffle, cache
        self._parts = world_size * max(1, workers)
        self.digest = digest_of_tars(self._shards, samples)
        self._process = -1
        self._running: Iterator[dict[str, Any]] = iter(())
        self._doubled: deque[str] = deque()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> Sample:
        """Read the stream's next image as number `row`. Raises DataError for a bad one; the next read passes over it."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._doubled = deque(maxlen=1000)
            self._running = self._pipeline()
        if self._doubled:
            raise DataError(self._doubled.popleft())
        return _decoded(next(self._running), row, self.kind)

    def expect(self, now: Iterable[int], ahead: Iterable[int]) -> None:
        """Do nothing: the order is not known ahead."""

    def bad_sample(self, _: int, reason: str) -> str:
        """Name an image that could not be read. Its name is the error line, the same in every epoch."""
        return reason

    def _pipeline(self) -> Iterator[dict[str, Any]]:
        from webdataset.filters import shuffle
        from webdataset.tariterators import group_by_keys

        info = get_worker_info()
        part = self._rank if info is None else self._rank * info.num_workers + info.id
        for number in itertools.count():
            order = random.Random(f"{self._seed}/{self.start}/{part}/{number}")
            # A buffer that held images of two passes would hold some of them twice, and so would a batch.
            mixed = shuffle(self._shuffle, initial=self._shuffle, rng=order)
            yield from mixed(group_by_keys(self._files(part, order), handler=self._double))

    def _files(self, part: int, order: random.Random) -> Iterator[dict[str, Any]]:
        """Read members of this part's tars, once. {} follows each tar, as in webdataset's expander.

        What cannot be read comes as a member too: it takes its turn, and its reader reports it.
        """
        from webdataset.tariterators import base_plus_ext

        tars, any_named = self._shards[part :: self._parts], False
        for shard in order.sample(tars, len(tars)):
            for member in self._members(shard):
                any_named = any_named or base_plus_ext(member["fname"])[0] is not None  # webdataset passes over others
                yield member
            yield {}
        if not any_named:
            raise UnreachableError(
                f"data.shards: {redact(tars[0])}: no file with an ending in it, nor in {len(tars) - 1} more tars"
            )

    def _members(self, shard: str) -> Iterator[dict[str, Any]]:
        shown = redact(shard)
        try:
            with self._opened(shard) as file:
                for name, content in tar_files(file):
                    if content is None:
                        yield _broken(shard, f"{shown}: {printable(name)}: larger than {MAX_FILE_BYTES >> 20} MiB")
                    else:
                        yield {"fname": name, "data": content, "__url__": shard}
                while file.read(1 << 16):  # a command that is not read to its end ends with an error
                    pass
        except TAR_ERRORS as error:
            yield _broken(shard, f"{shown}: cannot be read to its end: {printable(reason_of(error))}")

    @contextmanager
    def _opened(self, shard: str) -> Iterator[BinaryIO]:
        if shard.startswith(PIPE):
            from webdataset.gopen import gopen

            # That variable is for our own processes (cli/main): a command may be a script with modules beside it.
            with closing(gopen(shard.replace(PIPE, f"{PIPE}unset PYTHONSAFEPATH; ", 1), "rb")) as pipe:
                yield pipe
        elif is_url(shard):
            settings = self._cache or cache_settings()
            # Whole before it is read, so that a cut connection costs no image; without a name, so that a kill leaves nothing.
            with ExitStack() as at_end:
                with refusing(f"data.cache: {settings.folder}", UnreachableError, "; name another folder"):
                    settings.folder.mkdir(parents=True, exist_ok=True)
                    file = at_end.enter_context(tempfile.TemporaryFile(dir=settings.folder))
                    fetch(shard, file, most=settings.limit, patience=settings.patience)
                file.seek(0)
                yield file
        else:
            with Path(shard).open("rb") as local:
                yield local

    def _double(self, error: Exception) -> bool:
        """Keep the first of two members of one name. Note the second as an error."""
        self._doubled.append(printable((str(error.args[0]).splitlines() or [""])[0][:200]))
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": -1, "_running": iter(()), "_doubled": deque()}


def _broken(shard: str, reason: str) -> dict[str, Any]:
    return {"fname": f"{secrets.token_hex(8)}.{_BROKEN}", "data": reason, "__url__": shard}


def _decoded(sample: dict[str, Any], row: int, kind: Kind) -> Sample:
    if isinstance(reason := sample.get(_BROKEN), str):  # a member's content would be bytes
        raise DataError(reason)
    name = printable(f"{redact(str(sample['__url__']))}: image {sample['__key__']}")
    suffixes = _SUFFIXES if kind == RGB8 else _SUFFIXES + _DEEP_SUFFIXES
    images = [key for key in sample if key.rpartition(".")[2] in suffixes and not key.startswith("__")]
    suffix = min(images, key=lambda ending: "." in ending, default=None)  # KEY.jpg before KEY.mask.png
    if suffix is None:
        raise DataError(f"{name}: has no member that ends in {', '.join(suffixes)}")
    content = sample[suffix]
    if kind != RGB8:
        try:
            return Sample(decode_any(content, kind), _label(sample), row)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    try:
        width, height, orientation, plain = _header(content)
    except Exception as error:  # Pillow's readers fail on damaged bytes with nearly every exception there is
        # For unknown bytes, Pillow's text holds a memory address: another line in every epoch.
        why = "" if isinstance(error, UnidentifiedImageError) else f": {printable(reason_of(error)[:200])}"
        raise DataError(f"{name}: not an image{why}") from None
    try:
        check_pixels(width, height)
        # Nobody has checked these files. Decoders show damaged and 16-bit PNGs without a word, and others may have many frames.
        image = turn_upright(decode(content), orientation) if plain else decode_any(content)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return Sample(image, _label(sample), row)


def _label(sample: dict[str, Any]) -> int:
    label = bytes(sample.get("cls", b"")).strip()
    return int(label) if label.isdigit() and len(label) < 18 else -1


def _header(content: bytes) -> tuple[int, int, int, bool]:
    """Read width, height and EXIF orientation without decoding. The fourth: is it a JPEG, or a WebP of one frame?"""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # check_pixels reports the limit instead
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            plain = image.format not in ("PNG", "GIF") and not (image.format == "WEBP" and getattr(image, "is_animated", False))
            return *image.size, orientation_of(image) if plain else 1, plain
    finally:
        Image.MAX_IMAGE_PIXELS = limit
