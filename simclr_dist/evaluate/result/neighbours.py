"""A sheet of images and their nearest neighbours by cosine, as one PNG."""

import io
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.system.errors import ConfigError

QUERIES, NEIGHBOURS = 8, 7

_TILE, _GAP, _HEAD, _CAPTION = 96, 6, 24, 18
_INK, _PAPER, _GRAY, _RIGHT, _WRONG = "#222222", "white", "#999999", "#2a8f3c", "#c43c35"


class Neighbours(NamedTuple):
    """Rows of the `query` images [q], and of the `nearest` [q, k] of each, the nearest first, with their `cosine` [q, k]."""

    query: Tensor
    nearest: Tensor
    cosine: Tensor


def choose_queries(label: Tensor, count: int = QUERIES, seed: int = 0) -> Tensor:
    """`count` rows (or all, if there are fewer) drawn by `seed` alone, before anything is known of their neighbours.

    `label` int64 [n], -1 for none. Without labels drawn evenly; with labels one of each class first, then a second of each,
    and so on, images without a label last. In the order of their labels, then of rows.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(label))
    labels = label.cpu().numpy()
    place = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class, in the order drawn
    for value in np.unique(labels):
        own = order[labels[order] == value]
        place[own] = np.arange(len(own)) if value >= 0 else len(labels) + np.arange(len(own))
    drawn = order[np.argsort(place[order], kind="stable")][:count]
    return torch.from_numpy(drawn[np.lexsort((drawn, labels[drawn]))])


def find_neighbours(h: Tensor, query: Tensor, count: int = NEIGHBOURS) -> Neighbours:
    """The `count` nearest (or all others) of each `query` row among features [n, d] by cosine, itself left out.

    Equally near ones come in the order of rows. One [q, n] matrix. Raises ConfigError for fewer than two images.
    """
    if len(h) < 2:
        raise ConfigError("neighbours: there is no other image to be one; give two images or more")
    z = F.normalize(h.float(), dim=1)
    query = query.to(h.device)
    cosine = (z[query] @ z.T).scatter_(1, query[:, None], -torch.inf)
    found = cosine.sort(dim=1, descending=True, stable=True)
    count = min(count, len(h) - 1)
    return Neighbours(query.cpu(), found.indices[:, :count].cpu(), found.values[:, :count].cpu())


def neighbour_sheet(
    images: Images, neighbours: Neighbours, label: Tensor, *, classes: Sequence[str] = (), title: str = "nearest neighbours"
) -> bytes:
    """A PNG: a query at the left of each row, its neighbours beside it, the cosine below each.

    `label` int64 [n], -1 for none. Where there are labels, class names (`classes` by label, else numbers) are below the images
    too, neighbours of the query's class have a green frame and others a red one, and the title counts the green ones. A name
    that the font cannot show is shown without accents, or by its number. The same input gives the same bytes. Raises what
    `images` raises for an image that cannot be read.
    """
    rows, columns = neighbours.nearest.shape
    labels = label.tolist()
    query, nearest = neighbours.query.tolist(), neighbours.nearest.tolist()
    sheet = Image.new("RGB", (_left(columns + 1) + _GAP, _top(rows) + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    drawn = [_drawable(name, number, font) for number, name in enumerate(classes)]
    beside = [(labels[q], labels[j]) for q, found in zip(query, nearest, strict=True) for j in found]
    frames = [own == other for own, other in beside if min(own, other) >= 0]
    if frames:
        title = f"{title}: {sum(frames)} of {len(frames)} of the query's class"
    pen.text((_GAP, 5), _fitting(title, sheet.width - 2 * _GAP, pen, font), fill=_INK, font=font)
    for row, (q, found) in enumerate(zip(query, nearest, strict=True)):
        for column, index in enumerate([q, *found]):
            x, y = _left(column), _top(row)
            sheet.paste(_thumbnail(images[index].image), (x, y))
            name = "" if labels[index] < 0 else drawn[labels[index]] if classes else str(labels[index])
            number = f"{neighbours.cosine[row, column - 1]:.2f}" if column else ""
            if column:
                same = labels[index] == labels[q]
                colour = _GRAY if min(labels[index], labels[q]) < 0 else _RIGHT if same else _WRONG
                pen.rectangle([x - 2, y - 2, x + _TILE + 1, y + _TILE + 1], outline=colour, width=2)
            room = _TILE - (pen.textlength(number, font) + 4 if number else 0)
            pen.text((x, y + _TILE + 2), _fitting(name, room, pen, font), fill=_INK, font=font)
            pen.text((x + _TILE, y + _TILE + 2), number, fill=_INK, font=font, anchor="ra")
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return target.getvalue()


def _left(column: int) -> int:
    """Of a column; the queries stand a little apart."""
    return _GAP + column * (_TILE + _GAP) + (2 * _GAP if column else 0)


def _top(row: int) -> int:
    return _HEAD + row * (_TILE + _CAPTION + _GAP)


def _thumbnail(image: Tensor) -> Image.Image:
    """The whole image, uint8 [3, h, w], in the middle of a square."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    scale = _TILE / max(picture.size)
    shape = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    square = Image.new("RGB", (_TILE, _TILE), "#eeeeee")
    square.paste(picture.resize(shape, Image.Resampling.BICUBIC), ((_TILE - shape[0]) // 2, (_TILE - shape[1]) // 2))
    return square


def _drawable(name: str, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The name; where the font has only its box for a character, without accents; else, as of Chinese ones, the number."""
    lacking = bytes(font.getmask("\U0010ffff"))
    plain = "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))
    for words in (name, plain):
        if all(one.isspace() or bytes(font.getmask(one)) != lacking for one in words):
            return words
    return str(number)


def _fitting(words: str, room: float, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the words as fits into so many pixels, with two dots where some are left out."""
    if pen.textlength(words, font) <= room:
        return words
    while words and pen.textlength(words + "..", font) > room:
        words = words[:-1]
    return words + ".."
