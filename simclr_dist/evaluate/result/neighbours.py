"""Draw images and their nearest neighbours by cosine, as one PNG."""

import functools
import io
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simclr_dist.data.views.crops import picture
from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.evaluate.protocols.knn import nearest_of_parts
from simclr_dist.evaluate.rows import ROWS_AT_ONCE
from simclr_dist.method.loss.tiles import unit_rows
from simclr_dist.system.errors import ConfigError

QUERIES, NEIGHBOURS = 8, 7
_DRAWN, _A_SHEET = 200, 20

_TILE, _GAP, _HEAD, _CAPTION = 96, 6, 24, 31
_INK, _PAPER, _GRAY, _RIGHT, _WRONG = "#222222", "white", "#999999", "#2a8f3c", "#c43c35"


class Neighbours(NamedTuple):
    """Rows of `query` images [q] and of their `nearest` [q, k]. The nearest comes first. `cosine` is [q, k].

    Where a query has fewer than k, `nearest` ends with -1.
    """

    query: Tensor
    nearest: Tensor
    cosine: Tensor


def choose_queries(label: Tensor, count: int = QUERIES, seed: int = 0) -> Tensor:
    """Draw `count` rows by `seed` alone, before neighbours are looked at. All are drawn where there are fewer.

    `label` is int64 [n], -1 for none. Without labels, rows are drawn evenly. With labels, one of each class comes first, then
    a second of each, and so on; images without a label last. The rows are in the order of their labels, then of rows.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(label))
    labels = label.cpu().numpy()
    by_class = order[labels[order].argsort(kind="stable")]
    place = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class, in the order drawn
    place[by_class] = np.arange(len(labels)) - np.sort(labels).searchsorted(labels[by_class])
    place[labels < 0] += len(labels)
    drawn = order[np.argsort(place[order], kind="stable")][:count]
    return torch.from_numpy(drawn[np.lexsort((drawn, labels[drawn]))])


def find_neighbours(h: Tensor, query: Tensor, count: int = NEIGHBOURS) -> Neighbours:
    """Find the `count` nearest of each `query` row by cosine. Rows are of features [n, d]. All others if fewer, never itself.

    Equally near ones come in the order of rows. Raises ConfigError for fewer than two images.
    """
    if len(h) < 2:
        raise ConfigError("neighbours: there is no other image to be one; give two images or more")
    count = min(count, len(h) - 1)
    cosine, nearest = nearest_rows(h, h[query.to(h.device)], count + 1)
    others = nearest != query.to(h.device)[:, None]
    others[:, -1] &= others.sum(1) <= count  # of more than `count` equals it may not be among its own nearest
    shape = len(query), count
    return Neighbours(query.cpu(), nearest[others].view(shape).cpu(), cosine[others].view(shape).cpu())


def nearest_rows(h: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` rows of `h` nearest to each query. Features are [n, d] and [q, d].

    Returns cosines and rows, [q, count], the nearest first; equally near ones are in the order of rows. Some thousand rows are
    taken at a time.
    """
    parts = (unit_rows(rows.float()) for rows in h.split(ROWS_AT_ONCE))
    return nearest_of_parts(unit_rows(queries.float()), parts, count)


def neighbour_sheet(
    images: Images, neighbours: Neighbours, label: Tensor, *, classes: Sequence[str] = (), title: str = "nearest neighbours"
) -> bytes:
    """Draw a PNG with a query at the left of each row. Its neighbours are beside it, each with its cosine.

    `label` is int64 [n], -1 for none. With labels, class names (`classes` by label, else numbers) are below the images
    too; neighbours of the query's class have a green frame and others a red one, and the title counts the green ones. A name
    that the font cannot show is shown without accents, or by its number. The same input gives the same bytes. Raises what
    `images` raises for an image that cannot be read.
    """
    rows, columns = neighbours.nearest.shape
    labels = label.tolist()
    query, nearest = neighbours.query.tolist(), neighbours.nearest.tolist()
    sheet = Image.new("RGB", (_left(columns + 1) + _GAP, _top(rows) + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    drawable = functools.cache(lambda number: _drawable(classes[number], number, font))
    beside = [(labels[q], labels[j]) for q, row in zip(query, nearest, strict=True) for j in row if j >= 0]
    if frames := [a == b for a, b in beside if min(a, b) >= 0]:
        title = f"{title}: {sum(frames)} of {len(frames)} of the query's class"
    pen.text((_GAP, 5), _fitting(title, sheet.width - 2 * _GAP, pen, font), fill=_INK, font=font)
    for row, (q, others) in enumerate(zip(query, nearest, strict=True)):
        for column, index in enumerate(index for index in (q, *others) if index >= 0):
            x, y, of = _left(column), _top(row), labels[index]
            sheet.paste(_thumbnail(images[index].image), (x, y))
            if column:
                colour = _GRAY if min(of, labels[q]) < 0 else _RIGHT if of == labels[q] else _WRONG
                pen.rectangle([x - 2, y - 2, x + _TILE + 1, y + _TILE + 1], outline=colour, width=2)
                number = f"{neighbours.cosine[row, column - 1]:.3f}"
                pen.rectangle([x + _TILE - pen.textlength(number, font) - 4, y + _TILE - 14, x + _TILE, y + _TILE], fill=_PAPER)
                pen.text((x + _TILE - 2, y + _TILE - 13), number, fill=_INK, font=font, anchor="ra")
            name = "" if of < 0 else drawable(of) if classes else str(of)
            first = _first_line(name, pen, font)
            pen.text((x, y + _TILE + 2), first, fill=_INK, font=font)
            pen.text((x, y + _TILE + 15), _fitting(name[len(first) :].strip(), _TILE, pen, font), fill=_INK, font=font)
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return target.getvalue()


def neighbour_sheets(images: Images, neighbours: Neighbours, label: Tensor, classes: Sequence[str], title: str) -> list[bytes]:
    """Draw the first 200 rows, 20 to a sheet. `title` has two places, for the numbers of a sheet's first row and its last."""
    sheets = []
    for start in range(0, min(len(neighbours.query), _DRAWN), _A_SHEET):
        part = Neighbours(*(field[start : start + _A_SHEET] for field in neighbours))
        words = title.format(start + 1, start + len(part.query))
        sheets.append(neighbour_sheet(images, part, label, classes=classes, title=words))
    return sheets


def _left(column: int) -> int:
    """Return the left edge of a column. The queries stand a little apart."""
    return _GAP + column * (_TILE + _GAP) + (2 * _GAP if column else 0)


def _top(row: int) -> int:
    return _HEAD + row * (_TILE + _CAPTION + _GAP)


def _thumbnail(image: Tensor) -> Image.Image:
    """Draw the whole image in the middle of a square."""
    small = shrunk(image, _TILE)
    square = Image.new("RGB", (_TILE, _TILE), "#eeeeee")
    square.paste(small, ((_TILE - small.width) // 2, (_TILE - small.height) // 2))
    return square


def shrunk(image: Tensor, side: int) -> Image.Image:
    """Draw an image so that its longer side has `side` pixels. It is uint8 or uint16 [c, h, w]."""
    whole = Image.fromarray(picture(image).permute(1, 2, 0).cpu().numpy())
    shape = (max(1, round(length * side / max(whole.size))) for length in whole.size)
    return whole.resize((next(shape), next(shape)), Image.Resampling.BICUBIC)


def _drawable(name: str, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the name. Where the font lacks a character, return it without accents; else, as in Chinese, return the number."""
    lacking = bytes(font.getmask("\U0010ffff"))
    plain = "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))
    for words in (name, plain):
        if all(one.isspace() or bytes(font.getmask(one)) != lacking for one in words):
            return words
    return str(number)


def _first_line(words: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return what of the words fits below an image. It ends between two words where it can."""
    fits = next(end for end in range(len(words), -1, -1) if pen.textlength(words[:end], font) <= _TILE)
    between = max(words.rfind(mark, 0, fits) + 1 for mark in (" ", "_", "-")) if fits < len(words) else fits
    return words[: between or fits]


def _fitting(words: str, room: float, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return as much of the words as fits into `room` pixels. Two dots stand for what is left out."""
    shortened = (words[:end] + ".." for end in range(len(words) - 1, -1, -1))
    return next((text for text in (words, *shortened) if pen.textlength(text, font) <= room), "..")
