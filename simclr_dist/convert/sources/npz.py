"""Read MedMNIST's .npz files. They have arrays `train_images`, `train_labels` and so on."""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from simclr_dist.convert.sources.originals import IMAGES_A_CHUNK, NO_LABEL, Files, OfOneFile, Original, ReadError, Source
from simclr_dist.data.pixels.channels import write_png
from simclr_dist.data.pixels.images import check_pixels
from simclr_dist.system.errors import DataError, reason_of

SUFFIX = ".npz"

_IMAGES, _LABELS = "_images.npy", "_labels.npy"
_MOST_CHUNKS = 16  # an array is packed as a whole: to reach a chunk, all before it is unpacked again
_MOST_TIMES = 1100  # zlib packs into 1/1032 at most
_PIECE = 1 << 20
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError),
    *(NotImplementedError, RuntimeError),  # zipfile: packed in another way; encrypted
    *(LookupError, SyntaxError, tokenize.TokenError),  # numpy reads a header as Python
)
_PIXELS = (np.dtype(np.uint8), np.dtype(np.uint16))


class _Array(NamedTuple):
    """An array in a .npz. `start` bytes come before its first number."""

    shape: tuple[int, ...]
    type: str
    start: int


@dataclass(frozen=True)
class ArrayChunk(OfOneFile):
    """Images from `row` of an array, `member` of the .npz at `path`.

    Messages call it `name`. `labels` int64 [n].
    """

    name: str
    member: str
    array: _Array
    row: int
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> bytes:
        return json.dumps([self.name, self.member, self.array, self.row]).encode() + self.labels.tobytes()

    def read(self) -> Iterator[Original]:
        shape, type_ = self.array.shape[1:], np.dtype(self.array.type)
        size = type_.itemsize * int(np.prod(shape))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                before = self.array.start + self.row * size
                while before:
                    before -= len(_exactly(file, min(before, _PIECE)))
                for row, label in enumerate(self.labels.tolist(), self.row):
                    pixels = np.frombuffer(_exactly(file, size), type_).reshape(shape)
                    yield Original(row, f"{self.name}#{row}", label, write_png(pixels))
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be read: {error.strerror}") from None
        except _DAMAGED as error:
            raise DataError(f"{self.path}: {self.member}: is damaged ({reason_of(error)})") from None


def _exactly(file: IO[bytes], size: int) -> bytes:
    if len(content := file.read(size)) != size:
        raise EOFError("cut off")
    return content


def npz_source(files: Files) -> Source:
    """Make a source of one split of a .npz. Nothing in it is unpickled.

    It is named `x.npz/train`, or is the only one. Images are uint8 or uint16, [n, h, w] (gray) or [n, h, w, 3]; labels one
    integer each. Raises DataError for other arrays: volumes, several labels an image (`label_column` 'none' takes none).
    """
    files.refuse_columns(NO_LABEL)
    if len(files.names) > 1:
        raise DataError(f"{files.source}: holds {len(files.names)} {SUFFIX} files; name one, like {files.paths[0]}")
    base, _, split = files.names[0].partition(f"{SUFFIX}/")
    path = files.root / (base if base.endswith(SUFFIX) else base + SUFFIX)
    try:
        with zipfile.ZipFile(path) as archive:
            splits = [name.removesuffix(_IMAGES) for name in archive.namelist() if name.endswith(_IMAGES)]
            if not split and len(splits) == 1:
                split = splits[0]
            if split not in splits:
                cure = f"name one, like {path}/{splits[0]}" if splits else "it takes MedMNIST's train_images, train_labels ..."
                raise DataError(f"{path}: has images of {', '.join(splits) or 'no split'}; {cure}")
            images = _pixels(path, archive, split + _IMAGES)
            labels = _labels(path, archive, split + _LABELS, images.shape[0]) if files.label_column is None else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except _DAMAGED as error:
        raise DataError(f"{path}: not a readable {SUFFIX} file ({reason_of(error)})") from None
    count = images.shape[0]
    numbers = np.full(count, -1) if labels is None else labels
    step = max(IMAGES_A_CHUNK, -(-count // _MOST_CHUNKS))
    name = f"{path.name}/{split}"
    chunks = [
        ArrayChunk(str(path), name, split + _IMAGES, images, row, numbers[row : row + step]) for row in range(0, count, step)
    ]
    return Source((), chunks)


def _header(archive: zipfile.ZipFile, member: str) -> _Array:
    """Read an array's header. Raises ValueError for one that does not fit its member's size."""
    about = archive.getinfo(member)
    if about.compress_size > Path(str(archive.filename)).stat().st_size or about.file_size > _MOST_TIMES * about.compress_size:
        raise ValueError(f"{member} says that it is larger than it can be")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, type_ = read(file)
        start = file.tell()
    if type_.hasobject:
        raise ValueError(f"{member} holds pickled objects, which are never unpickled")
    if by_columns and len(shape) > 1:
        raise ValueError(f"{member} is kept by columns; save it anew with numpy.ascontiguousarray")
    if min(shape, default=0) < 0 or start + type_.itemsize * int(np.prod(shape, dtype=object)) != about.file_size:
        raise ValueError(f"{member} has another size than its header says")
    return _Array(shape, type_.str, start)


def _pixels(path: Path, archive: zipfile.ZipFile, member: str) -> _Array:
    array = _header(archive, member)
    shape, type_ = array.shape, np.dtype(array.type).newbyteorder("=")
    if type_ not in _PIXELS or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        what = "volumes" if len(shape) == 4 else f"an array {list(shape)}"
        cure = "it takes uint8 or uint16, [n, h, w] or [n, h, w, 3]"
        raise DataError(f"{path}: {member}: {what} of {type_}, and no images; {cure}")
    if not all(shape):
        raise DataError(f"{path}: {member}: no image in it")
    try:
        check_pixels(*shape[1:3])
    except DataError as error:
        raise DataError(f"{path}: {member}: {error}") from None
    return array


def _labels(path: Path, archive: zipfile.ZipFile, member: str, count: int) -> NDArray[np.int64]:
    cure = f"take none with --label-column {NO_LABEL}"
    if member not in archive.namelist():
        raise DataError(f"{path}: has no {member}; {cure}")
    array = _header(archive, member)
    if array.shape not in ((count,), (count, 1)):
        raise DataError(f"{path}: {member}: {list(array.shape)} is not one label for each of {count} images; {cure}")
    if np.dtype(array.type).kind not in "iu":
        raise DataError(f"{path}: {member}: labels are {np.dtype(array.type)}, not integers; {cure}")
    with archive.open(member) as file:
        labels = npy.read_array(file, allow_pickle=False).reshape(-1)
    if (wrong := labels[(labels < 0) & (labels != -1) | (labels >= 2**31)]).size:
        raise DataError(f"{path}: {member}: {wrong[0]} is no label; it takes an integer from 0, or -1")
    return labels.astype(np.int64)
