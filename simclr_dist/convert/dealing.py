"""Deal images to the sides of a split, and shuffle them. These are pure functions of the seed."""

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.order import Rows
from simclr_dist.system.errors import DataError

SPLIT_NAMES = {0: ("",), 2: ("train", "test"), 3: ("train", "val", "test")}  # by the number of shares


def find_copies(sha256: NDArray[np.bytes_]) -> tuple[Rows, Rows]:
    """Find images whose bytes came before. Returns their positions, and for each that of the first such image."""
    _, first, copy_of = np.unique(sha256, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[copy_of] != np.arange(len(sha256)))
    return copies, first[copy_of][copies]


def deal(
    index: Rows, label: Rows, sha256: NDArray[np.bytes_], *, total: int, seed: int, split: tuple[float, ...] | None
) -> dict[str, Rows]:
    """Shuffle and deal the images. Returns positions in the arrays for each destination ('' for one alone).

    The arrays run over the good images, `index` below `total` rising. A split is stratified by label, and images with equal
    bytes are on one side. Raises DataError when a side gets none.
    """
    # Raw draws are sorted, as Generator's methods may change between numpy versions. Every image of the source has a draw,
    # so that leaving one out does not reorder the others.
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    places, sides = generator.random_raw(total)[index], generator.random_raw(total)[index]
    shuffled = np.lexsort((index, places))
    if split is None:
        return {"": shuffled}
    _, once, copy_of = np.unique(sha256, return_index=True, return_inverse=True)
    by_label = np.lexsort((index[once], sides[once], label[once]))
    # Every 1/share-th image of the list sorted by label: each class and the whole set get the share to within one image. The
    # last side comes first, so that the test images are the same with and without a side for validation.
    side, left = np.zeros(len(once), dtype=np.int64), 1_000_000
    for number in range(len(split) - 1, 0, -1):
        share = round(split[number] * 1_000_000)
        chosen = np.diff(np.arange(len(by_label) + 1, dtype=np.int64) * share // left) > 0
        side[by_label[chosen]], by_label, left = number, by_label[~chosen], left - share
    dealt = side[copy_of][shuffled]
    every = {name: shuffled[dealt == number] for number, name in enumerate(SPLIT_NAMES[len(split)])}
    if not all(map(len, every.values())):
        shares = "/".join(f"{share:g}" for share in split)
        raise DataError(f"split {shares} of {len(once)} different images leaves one side empty; use another")
    return every
