"""Draw line charts as SVG text. A page with them needs nothing beside itself."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[tuple[float, float]]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 250, 56, 24, 46, 34
_MOST = 1e300  # of a damaged log: differences of such, and parts of smaller ones, are numbers still
_COLOURS = ("#1f5fa8", "#c7572b", "#2a8f3c", "#7a4fa3", "#b8860b", "#4a8f9c")


def line_chart(
    title: str, series: Series, *, axis: str = "step", unit: str = "", places: Mapping[float, str] | None = None
) -> str:
    """Draw an <svg> with a line for each of `series`. Those are points of x and y. Points out of all measure are left out.

    `axis` names x; `places` are the names of x that are shown, else round numbers.
    """
    if not (lines := drawable(series)):
        return ""
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = places or {x: f"{x:g}" for x in ticks(min(xs), max(xs))}, ticks(min(ys), max(ys))
    left, right, low, high = min(xs), max(xs), y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return _LEFT + (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    columns = max(1, min(4, 400 // (30 + 6 * max(map(len, lines)))))  # of names; those beyond the first row go above it
    above = 14 * (-(-len(lines) // columns) - 1)
    parts = [
        f'<svg viewBox="0 {-above} {_WIDTH} {_HEIGHT + above}" role="img" aria-label="{escape(title, quote=True)}">',
        f'<text class="title" x="{_LEFT}" y="{16 - above}">{escape(title)}</text>',
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 1}" text-anchor="end">{escape(axis)}</text>',
    ]
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}{escape(unit)}</text>')
    parts += [
        f'<text class="tick" x="{across(x):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(name)}</text>'
        for x, name in x_ticks.items()
        if left <= x <= right
    ]
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        if len(points) < 40:
            parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in points]
        x, y = _LEFT + 400 // columns * (number % columns), 34 - 14 * (-(-len(lines) // columns) - 1 - number // columns)
        if len(lines) > 1:
            parts.append(f'<text class="tick" x="{x + 14}" y="{y}">{escape(name)}</text>')
            parts.append(f'<line x1="{x}" x2="{x + 10}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2.5"/>')
    return "\n".join([*parts, "</svg>"])


def drawable(series: Series) -> dict[str, list[tuple[float, float]]]:
    """Return the lines that have points. Points out of all measure are left out."""
    lines = {name: [(x, y) for x, y in points if abs(x) < _MOST > abs(y)] for name, points in series.items()}
    return {name: points for name, points in lines.items() if points}


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Choose two to `most` + 1 round numbers. They go from at or below `low` to at or above `high`."""
    if high - low < 1 / _MOST:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    size *= next(times for times in (1, 2, 5, 10) if (high - low) / (size * times) <= most)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(number * size, 12) for number in range(first, last + 1)]
