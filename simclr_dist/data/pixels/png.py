"""Whether a PNG is sound to the last byte. Pillow shows some that are not; libpng refuses those, and torchvision's reader has
been seen to crash (0.29, segmentation fault) where libpng refuses in the middle of a gray image."""

import struct
import zlib

from simclr_dist.system.errors import DataError, printable

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PIECE = 1 << 20
_CHANNELS = {0: 1, 2: 3}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, and steps


def is_sound_png(content: bytes) -> bool:
    """Whether an 8-bit gray or RGB PNG that Pillow has decoded is complete and holds exactly the data of its pixels.

    Raises DataError where a chunk does not fit its checksum: its pixels are wrong.
    """
    at, packed = len(PNG_SIGNATURE), []
    while True:
        try:
            length, kind = struct.unpack_from(">I4s", content, at)
            (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
        except struct.error:
            return False
        body = content[at + 8 : at + 8 + length]
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(kind + body) != checksum:
            raise DataError(f"damaged: its {printable(kind.decode('latin-1'))} chunk does not fit its checksum")
        if kind == b"IDAT":
            packed.append(body)
        elif kind == b"IEND":
            break
        elif critical and kind not in (b"IHDR", b"PLTE"):
            return False
        at += 12 + length
    return _unpacked_size(b"".join(packed)) == _pixel_data_size(content)


def _unpacked_size(packed: bytes) -> int:
    """Bytes of a zlib stream, -1 for one that is damaged, cut off, or followed by more."""
    unpacker, size = zlib.decompressobj(), 0
    try:
        while not unpacker.eof:
            piece = unpacker.decompress(packed, _PIECE)
            packed = unpacker.unconsumed_tail
            if not piece and not packed and not unpacker.eof:
                return -1
            size += len(piece)
    except zlib.error:
        return -1
    return -1 if unpacker.unused_data else size


def _pixel_data_size(content: bytes) -> int:
    width, height, _, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    size = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            size += rows * (1 + columns * _CHANNELS.get(colour, 0))
    return size
