"""Define the settings of a conversion, with their ranges. Quick to import."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from simclr_dist.config.ranges import Channels, Count, Range, check_ranges
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.system.errors import ConfigError


@dataclass(frozen=True)
class ShardSettings:
    """The settings that, beside the source, decide a conversion's bytes. Raises ConfigError for the first one out of range."""

    shard_size: Count = 1000
    """Images a shard."""
    seed: Annotated[int, Range(least=0, below=2**64)] = 0
    """Decides the shuffle and the split."""
    short_side: Annotated[int | None, Range(least=8)] = None
    """Shrink images to this short side, in pixels."""
    quality: Annotated[int, Range(least=1, most=100)] = 95
    """JPEG quality of re-encoded images."""
    channels: Channels = 3
    """Channels of every image: 1 is gray, 3 RGB (gray fits), 4 RGB with alpha, others as TIFFs have them."""
    bit_depth: Literal[8, 16] = 8
    """Bits of a channel; with 8, images of 16 bits lose half of them."""
    split: tuple[float, ...] | None = None
    """Shares like 0.8/0.2: write DST/train and DST/test; like 0.8/0.1/0.1: DST/val, too. Stratified by label."""
    image_column: str | None = None
    """Column of a table: image bytes (default: image, img, or the only one); of a list: path."""
    label_column: str | None = None
    """Column of a table or list (default: label); 'none': take no labels."""

    def __post_init__(self) -> None:
        if self.split is not None:
            sums_up = len(self.split) in (2, 3) and abs(sum(self.split) - 1) <= 1e-6  # typed shares are rounded
            if not sums_up or min(self.split) <= 0:
                shares = "/".join(f"{share:.9g}" for share in self.split)
                sides = "shares above 0 of train and test, or of train, val and test"
                raise ConfigError(f"split: {shares} must be {sides}, that add up to 1, like 0.8/0.2 or 0.8/0.1/0.1")
        check_ranges(self)
        if self.kind != RGB8 and self.quality != ShardSettings.quality:
            raise ConfigError(f"quality: {self.quality} has no effect on {self.kind}, stored without loss; leave it out")

    @property
    def kind(self) -> Kind:
        return Kind(self.channels, self.bit_depth)

    def described(self) -> dict[str, Any]:
        """Return the values that name a conversion. That of 8-bit RGB has the name that it had before there were others."""
        return {name: value for name, value in asdict(self).items() if name not in Kind._fields or self.kind != RGB8}
