"""Draw line charts, or points of a plane, into a PNG file. It needs Pillow alone."""

import colorsys
import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from simclr_dist.evaluate.result.charts import Series, drawable, ticks

_SCALE = 2  # drawn larger, then made smaller: Pillow's lines have no smooth edges
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 420, 64, 20, 34, 44
_LEGEND_WIDTH, _ROW, _MOST_NAMES, _LONGEST = 310, 18, 60, 44
_SIDE = 900
_INK, _GRAY, _PAPER, _NO_CLASS = "#222222", "#dddddd", "white", "#7a7a7a"


def charts_png(charts: Mapping[str, Series], axis: str) -> bytes:
    """Draw charts, by title, with one legend below. A line has its colour in all of them. `axis` names what goes across."""
    names = list(dict.fromkeys(name for series in charts.values() for name in series))
    colours = {name: _colour(number, len(names)) for number, name in enumerate(names)}
    width = len(charts) * _WIDTH
    sheet, pen = _sheet(width, _HEIGHT, colours)
    right = max((x for series in charts.values() for line in drawable(series).values() for x, _ in line), default=1.0)
    for place, (title, series) in enumerate(charts.items()):
        _chart(pen, place * _WIDTH, title, axis, series, colours, right)
    return _png(sheet)


def map_png(
    points: Sequence[Sequence[float]], label: Sequence[int], classes: Sequence[str], title: str, axes: Sequence[str],
    pictures: Sequence[Image.Image] = (),
) -> bytes:  # fmt: skip
    """Draw points of a plane [n, 2], coloured by class.

    They are dots, or `pictures` in frames; later ones lie above earlier ones. `label` [n] is -1 for none.
    """
    numbers = sorted({*label} - {-1})
    names = {number: classes[number] if classes else str(number) for number in numbers}
    colours = {number: _colour(place, len(names)) for place, number in enumerate(numbers)}
    sheet, pen = _sheet(_SIDE, _SIDE, {names[number]: colour for number, colour in colours.items()})
    low, high = ([end(values) for values in zip(*points, strict=True)] for end in (min, max))
    scale = (_SIDE - 2 * _LEFT) / (max(b - a for a, b in zip(low, high, strict=True)) or 1)
    for row, (across, up) in enumerate(points):
        x, y = _LEFT + (across - low[0]) * scale, _SIDE - _LEFT - (up - low[1]) * scale
        colour = colours.get(label[row], _NO_CLASS)
        if pictures:
            framed = ImageOps.expand(pictures[row], 2 * _SCALE, colour)
            sheet.paste(framed, (round(x * _SCALE - framed.width / 2), round(y * _SCALE - framed.height / 2)))
        else:
            pen.ellipse(_scaled((x - 2, y - 2), (x + 2, y + 2)), fill=colour)
    _text(pen, (_LEFT, 10), title)
    _text(pen, (_SIDE - _LEFT, _SIDE - 26), axes[0], anchor="ra")
    _text(pen, (_LEFT, 30), axes[1])
    return _png(sheet)


def _sheet(width: int, height: int, colours: Mapping[str, str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Make a sheet with a legend below `height`."""
    columns = max(1, width // _LEGEND_WIDTH)
    legend = [*colours][:_MOST_NAMES] + [f"and {len(colours) - _MOST_NAMES} more"] * (len(colours) > _MOST_NAMES)
    size = width, height + 12 + _ROW * -(-len(legend) // columns)
    sheet = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(legend):
        x, y = _LEFT + number % columns * _LEGEND_WIDTH, height + _ROW * (number // columns)
        if name in colours:
            pen.line(_scaled((x, y + 8), (x + 16, y + 8)), fill=colours[name], width=3 * _SCALE)
        _text(pen, (x + 22, y), name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}")
    return sheet, pen


def _png(sheet: Image.Image) -> bytes:
    file = io.BytesIO()
    sheet.resize((sheet.width // _SCALE, sheet.height // _SCALE), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def _chart(
    pen: ImageDraw.ImageDraw, offset: int, title: str, axis: str, series: Series, colours: Mapping[str, str], right: float
) -> None:
    """Draw one chart from 0 to `right`."""
    _text(pen, (offset + _LEFT, 10), title)
    if not (lines := drawable(series)):
        _text(pen, (offset + _LEFT, _HEIGHT // 2), "nothing is logged yet")
        return
    ys = [y for points in lines.values() for _, y in points]
    y_ticks = ticks(min(ys), max(ys))
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = offset + _LEFT + x / (right or 1) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    for y in y_ticks:
        pen.line(_scaled(place(0, y), (offset + _WIDTH - _RIGHT, place(0, y)[1])), fill=_GRAY, width=_SCALE)
        _text(pen, (offset + _LEFT - 8, place(0, y)[1] - 7), f"{y:g}", anchor="ra")
    for x in ticks(0, right):
        if x <= right:
            _text(pen, (place(x, low)[0], _HEIGHT - _BOTTOM + 6), f"{x:g}", anchor="ma")
    _text(pen, (offset + _WIDTH - _RIGHT, _HEIGHT - _BOTTOM + 22), axis, anchor="ra")
    for name, points in lines.items():
        at = [place(x, y) for x, y in points]
        pen.line(_scaled(*at), fill=colours[name], width=round(1.6 * _SCALE), joint="curve")
        for x, y in at if len(at) < 40 else ():
            pen.ellipse(_scaled((x - 2.6, y - 2.6), (x + 2.6, y + 2.6)), fill=colours[name])


def _colour(number: int, count: int) -> str:
    red, green, blue = colorsys.hsv_to_rgb(number / max(count, 1), 0.75, (0.85, 0.55)[number % 2])
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _scaled(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * _SCALE, y * _SCALE) for x, y in points]


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], words: str, *, anchor: str = "la") -> None:
    font = ImageFont.load_default(12 * _SCALE)
    pen.text((at[0] * _SCALE, at[1] * _SCALE), words, fill=_INK, font=font, anchor=anchor)
