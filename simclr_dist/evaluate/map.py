"""Draw features as points of a plane. What is alike for the encoder lies near, but no plane keeps all distances."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.evaluate.result.neighbours import shrunk
from simclr_dist.evaluate.result.picture import map_png
from simclr_dist.evaluate.rows import ROWS_AT_ONCE
from simclr_dist.system.errors import refusing
from simclr_dist.system.files import write_atomically

_POINTS, _PICTURES, _THUMBNAIL = 5000, 200, 96


def write_map(
    path: Path, h: NDArray[np.float32], label: NDArray[np.int64], classes: Sequence[str], images: Images,
    rows: Sequence[int],
) -> None:  # fmt: skip
    """Write the map of features [n, d], as `feature_map` draws it.

    They are of `images[row]` for `rows`; few images are thumbnails. Raises DataError when the disk does not take it.
    """
    pictures = [shrunk(images[row].image, _THUMBNAIL) for row in rows] if len(rows) <= _PICTURES else []
    content = feature_map(torch.from_numpy(h), label.tolist(), classes, pictures)
    with refusing(f"{path}: cannot write the map"):
        write_atomically(path, content)


def feature_map(h: Tensor, label: Sequence[int], classes: Sequence[str], pictures: Sequence[Image.Image] = ()) -> bytes:
    """Draw features [n, d] by their two principal components, as a PNG. The same input gives the same bytes.

    The components are those with the largest variance. Of more than 5000 images an even choice is drawn.
    """
    rows = np.linspace(0, len(h) - 1, min(len(h), _POINTS)).round().astype(int).tolist()
    points, shares = principal(h, rows)
    named = zip(("first", "second"), shares, strict=True)
    axes = [f"{which} component: {100 * share:.0f} % of the variance" for which, share in named]
    title = f"{len(h)} images" if len(h) == len(rows) else f"{len(rows)} of {len(h)} images"
    return map_png(points.tolist(), [int(label[row]) for row in rows], classes, title, axes, pictures)


def principal(h: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[float]]:
    """Project rows of features [n, d] on their two principal components. Also return the components' shares of the variance.

    In float64 from the d x d Gram matrix. A component's largest number is positive, which leaves no choice of sign.
    """
    parts = h.split(ROWS_AT_ONCE)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(h)
    gram = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64, device=h.device)
    for part in parts:
        centred = part.double() - mean
        gram.addmm_(centred.T, centred)
    variance, vectors = torch.linalg.eigh(gram)
    axes = vectors[:, [-1, -2]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shares = variance[[-1, -2]] / variance.sum().clamp_min(1e-300)
    return ((h[rows].double() - mean) @ axes).cpu(), shares.tolist()
