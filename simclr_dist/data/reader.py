"""Read images by manifest row, and check each."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from simclr_dist.data.collection import check_content, load_collection
from simclr_dist.data.index import INDEX_NAME
from simclr_dist.data.manifest import Manifest
from simclr_dist.data.pixels.decode import decode
from simclr_dist.data.pixels.kinds import Kind
from simclr_dist.data.remote.ahead import Ahead
from simclr_dist.data.remote.cache import CacheSettings, ShardCache, cache_settings
from simclr_dist.system.errors import DataError, printable
from simclr_dist.system.files import fitting
from simclr_dist.system.machine import most_open_files

_BLOCK = 512  # of a tar
_LONGEST_JSON = 1 << 15


class Sample(NamedTuple):
    """One image, uint8 or uint16 [c, h, w]. It has a label (-1: none) and manifest row."""

    image: Tensor
    label: int
    row: int


class Images(Protocol):
    """The images that steps are made of: ShardDataset, or those of `data.stream`."""

    def __getitem__(self, row: int, /) -> Sample: ...

    def expect(self, now: Iterable[int], ahead: Iterable[int], /) -> None:
        """Prepare for the shards that will be read, where they are known."""


class ShardDataset(Dataset[Sample]):
    """Shards as a map from manifest row to image, read by offset.

    `where` is a folder, its URL, or tars in brace notation (`data.collection`). Remote shards go through a `cache` on the local
    disk. The next ones are fetched ahead where the order is known (`expect`) or is that of the manifest. No more than
    `open_shards` files, or a quarter of `ulimit -n`, are open at a time. Raises DataError, naming key and shard, when the bytes
    are not those of the manifest. Raises UnreachableError when the server fails, ConfigError when the cache is too small.
    `checked`: all labels and keys are compared with the manifest's digest first, for those who use them. `kind`: raises
    ConfigError where the images are of another.
    """

    _cache: ShardCache | None = None

    def __init__(
        self, where: str | Path, *, open_shards: int = 32, cache: CacheSettings | None = None,
        checked: bool = False, kind: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        if open_shards < 1:
            raise ValueError(f"ShardDataset: open_shards: {open_shards} must be at least 1")
        self.manifest: Manifest = load_collection(where, cache=cache, kind=kind)
        if checked:
            check_content(self.manifest)
        self._open_shards = max(1, min(open_shards, most_open_files() // 4))  # a process has others open
        self._files: OrderedDict[int, int] = OrderedDict()
        self._expected: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._newest = -1
        if isinstance(self.manifest.folder, str):
            self._cache = ShardCache(self.manifest, cache or cache_settings())
            self._ahead: Ahead = Ahead(self._cache)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def kind(self) -> Kind:
        return self.manifest.kind

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> Sample:
        row = range(len(self))[row]  # from the end, too
        content = self.read(row)
        try:
            image = decode(content, self.kind)
        except DataError as error:
            raise DataError(f"{self._name(row)}: {error}") from None
        return Sample(image, int(self.manifest.label[row]), int(row))

    def read(self, row: int) -> bytes:
        """Read the image's bytes as they were converted. Raises DataError when sha256 says otherwise."""
        m, shard = self.manifest, self.manifest.shard_of(row)
        place = size, offset = int(m.size[row]), int(m.offset[row])
        if not (size > 0 and 0 <= offset <= int(m.shard_bytes[shard]) - size):  # checked when the index was made
            cure = f"`simclr-dist shard --verify {m.folder}` finds and removes it"
            raise DataError(f"{self._name(row)}: its place is impossible, so {INDEX_NAME} is damaged; {cure}")
        right = self._right(row, content := self._bytes(row, *place))
        if not right and self._cache is not None:
            self._cache.again(shard)
            self._close(shard)
            right = self._right(row, content := self._bytes(row, *place))
        if not right:
            raise DataError(f"{self._name(row)}: its bytes are not those of the manifest (sha256); shard the images again")
        return content

    def source(self, row: int) -> str | None:
        """Look up the name that the image had before it was sharded. Returns None where its tar has no JSON with one."""
        m = self.manifest
        header, start, size = f"{m.key[row]}.json\0".encode(), int(m.offset[row]) - _BLOCK, int(m.size[row])
        begin, end = max(0, start - _LONGEST_JSON), start + _BLOCK + size + -size % _BLOCK
        # A sample's members are in the order of their extensions: the JSON comes after jpg, and before png and webp.
        around = self._bytes(row, start - begin, begin), self._bytes(row, _LONGEST_JSON, end)
        for part, place in zip(around, (around[0].rfind(header), around[1].find(header, 0, len(header))), strict=True):
            with suppress(ValueError, RecursionError):  # it is other people's, or damaged
                if place >= 0 and place % _BLOCK == 0:
                    length = int(part[place + 124 : place + 135], 8)
                    about = json.loads(part[place + _BLOCK : place + _BLOCK + length])
                    return printable(fitting(about, {"source": str})["source"])
        return None

    def bad_sample(self, row: int, _: str) -> str:
        """Name an image that could not be read: by its key."""
        return str(self.manifest.key[row])

    def expect(self, now: Iterable[int], ahead: Iterable[int]) -> None:
        """Prepare for remote shards. `now` are all that are read until the next call; `ahead` come after, soonest first.

        Files of other shards are closed, those of `now` are kept from eviction, and missing ones are fetched in the background.
        """
        if self._cache is None:
            return
        expected = tuple(map(int, now)), tuple(map(int, ahead))
        if expected != self._expected:
            self._expected = expected
            for shard in set(self._files) - set(expected[0]):
                self._close(shard)
            self._ahead.want([*expected[0], *expected[1]])
        for shard in expected[0][: self._open_shards]:
            if shard not in self._files and (descriptor := self._cache.open_if_here(shard)) is not None:
                self._files[shard] = descriptor

    def check_room(self, shards: int, why: str) -> None:
        """Refuse a cache too small for the largest `shards` shards. `why` says what they are for. Raises ConfigError."""
        if self._cache is not None:
            largest = np.sort(self.manifest.shard_bytes)[-shards:].sum()
            self._cache.check_room(int(largest), f"{why} take up to {largest / 2**30:.3g}")

    def _right(self, row: int, content: bytes) -> bool:
        return bool(hashlib.sha256(content).digest() == self.manifest.sha256[row].tobytes())

    def _bytes(self, row: int, size: int, offset: int) -> bytes:
        """Read bytes of the image's tar."""
        try:
            return os.pread(self._descriptor(self.manifest.shard_of(row)), size, offset)
        except OSError as error:
            raise DataError(f"{self._name(row)}: cannot be read: {error.strerror}") from None

    def _name(self, row: int) -> str:
        m = self.manifest
        return f"{m.folder}/{m.shards[m.shard_of(row)]}: image {m.key[row]}"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            while len(self._files) >= self._open_shards:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._open(shard)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        if self._cache is None:
            return os.open(Path(self.manifest.folder, self.manifest.shards[shard]), os.O_RDONLY | os.O_CLOEXEC)
        if self._expected is None:
            # A file that is open keeps its place in the cache. A reader that follows the manifest's order needs one.
            for other in tuple(self._files):
                self._close(other)
            if shard == self._newest + 1:
                self._ahead.want(range(shard + 1, min(shard + 3, len(self.manifest.shards))))
            self._newest = shard
        return self._cache.open(shard, self._expected[0] if self._expected else ())

    def _close(self, shard: int) -> None:
        if (descriptor := self._files.pop(shard, None)) is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        if self._cache is not None and hasattr(self, "_ahead"):
            self._ahead.close()
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
