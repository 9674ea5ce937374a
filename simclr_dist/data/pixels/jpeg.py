"""Whether a JPEG is complete. Pillow shows one whose rows are all there; torchvision's reader wants its end mark, too."""

import re

_START, _END = 0xD8, 0xD9
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # in a scan, 0xFF 0x00 is data and D0 to D7 are restarts


def is_sound_jpeg(content: bytes) -> bool:
    """Whether a JPEG's segments, one after another, lead to its end mark."""
    at = 2
    while True:
        marker = _NEXT_MARKER.search(content, at)
        if marker is None:
            return False
        kind, at = content[marker.end() - 1], marker.end()
        if kind == _END:
            return True
        if kind not in (_START, 0x01):  # those two have no length
            at += int.from_bytes(content[at : at + 2], "big")
