"""Line charts as inline SVG: no file, no script, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 38
_POINTS = 600  # of a line: more than a chart has pixels


@dataclass(frozen=True)
class Line:
    """name: in the legend, "" for none; faint: drawn behind the others; dots: with its points."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False
    dots: bool = False


def chart(title: str, x_label: str, lines: Sequence[Line], *, zero: bool = False) -> str:
    """A `<figure>` of lines over one axis, ticks at round numbers; `zero`: y starts there. Values
    that are not finite are gaps."""
    drawn = [_thinned(line) for line in lines]
    xs = np.concatenate([np.asarray(line.xs, float) for line in drawn])
    ys = np.concatenate([np.asarray(line.ys, float) for line in drawn])
    ys = ys[np.isfinite(ys)]
    if not len(ys):
        return ""
    low_x, high_x = _range(xs.min(), xs.max())
    low, high = _range(min(ys.min(), 0) if zero else ys.min(), ys.max())
    across = _WIDTH - _LEFT - _RIGHT
    down = _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        at = _LEFT + across * (x - low_x) / (high_x - low_x)
        return f"{at:.1f},{_TOP + down * (high - y) / (high - low):.1f}"

    parts = []
    for y in _ticks(low, high):
        at = _TOP + down * (high - y) / (high - low)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" class="end">{number(y)}</text>')
    for x in _ticks(low_x, high_x, 4):
        at = _LEFT + across * (x - low_x) / (high_x - low_x)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 20}" class="mid">{number(x)}</text>')
    middle = _LEFT + across / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" class="mid">{escape(x_label)}</text>')
    named = [line.name for line in drawn if line.name]
    for line in sorted(drawn, key=lambda each: not each.faint):
        colour = f"c{named.index(line.name) % 6}" if line.name else "c0"
        parts += _path(line, colour, place)
    last = ", ".join(
        f"{line.name or title}: from {number(line.ys[0])} to {number(line.ys[-1])}"
        for line in drawn
        if not line.faint and len(line.ys)
    )
    legend = "".join(
        f'<span class="key c{index % 6}">{escape(name)}</span>' for index, name in enumerate(named)
    )
    legend = f'<p class="legend">{legend}</p>' if len(named) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(last)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def number(value: float) -> str:
    """A short number for a reader: 1.2k, 350M, 0.004."""
    if not math.isfinite(value):
        return "none"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if value else "0"


def _path(line: Line, colour: str, place) -> list[str]:
    """The pieces between gaps; a piece of one point is a dot."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isfinite(y):
            pieces[-1].append(place(x, y))
        elif pieces[-1]:
            pieces.append([])
    faint, found = " faint" * line.faint, []
    for points in filter(None, pieces):
        if len(points) > 1:
            found.append(f'<polyline class="line {colour}{faint}" points="{" ".join(points)}"/>')
        for point in points if line.dots or len(points) == 1 else ():
            x, y = point.split(",")
            found.append(f'<circle class="{colour}" cx="{x}" cy="{y}" r="3"/>')
    return found


def _thinned(line: Line) -> Line:
    """At most _POINTS points, each the mean of as many neighbours."""
    size = -(-len(line.xs) // _POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.xs), size)
    ys = np.asarray(line.ys, float)
    means = [float(ys[start : start + size].mean()) for start in starts]
    xs = [line.xs[min(start + size, len(ys)) - 1] for start in starts]
    return Line(line.name, xs, means, line.faint, line.dots)


def _range(low: float, high: float) -> tuple[float, float]:
    """With room for a flat line."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = abs(high) / 2 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(each for each in (1, 2, 5, 10) if (high - low) / (each * step) <= count)
    first = math.ceil(low / step - 1e-9)
    return [step * (first + i) for i in range(int((high - step * first) / step + 1e-9) + 1)]
