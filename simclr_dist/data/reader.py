"""Images by manifest row, each read checked."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode  # registers torch.ops.image

from simclr_dist.data.manifest import Manifest, load_manifest
from simclr_dist.errors import DataError


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
