"""Name the kinds of images: how many channels, of how many bits. Quick to import."""

from typing import NamedTuple


class Kind(NamedTuple):
    """What all images of a set are when they have been read. `bit_depth` is that of a channel, 8 or 16."""

    channels: int = 3
    bit_depth: int = 8

    @property
    def most(self) -> int:
        """Return the value of a full channel."""
        return int(2**self.bit_depth - 1)

    @property
    def pixel_bytes(self) -> int:
        return self.channels * self.bit_depth // 8

    def takes(self, channels: int) -> bool:
        """Tell whether an image of so many channels fits. Gray fits into RGB."""
        return channels == self.channels or (channels, self.channels) == (1, 3)

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels != 1)} of {self.bit_depth} bits"


MOST_CHANNELS = 64
RGB8 = Kind()
"""The kind that everything has where nothing else is asked for."""


def kind_of(images: object) -> Kind:
    """Return the kind of images. Those that do not say it, as a user's own may not, are 8-bit RGB."""
    kind: Kind = getattr(images, "kind", RGB8)
    return kind
