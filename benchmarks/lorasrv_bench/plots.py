"""Line charts and stacked bands as SVG, to stand in a page or a file of their own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 30, 40
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y) in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """From values to places on the page; both begin at 0 or below, but for a logarithmic one across."""

    low_x: float
    high_x: float
    high_y: float
    log_x: bool = False

    def share(self, x: float) -> float:
        """How far across, from 0 to 1."""
        if self.log_x:
            return math.log(x / self.low_x) / math.log(self.high_x / self.low_x)
        return (x - self.low_x) / (self.high_x - self.low_x)

    def value(self, share: float) -> float:
        """What is so far across."""
        if self.log_x:
            return self.low_x * (self.high_x / self.low_x) ** share
        return self.low_x + (self.high_x - self.low_x) * share

    def place(self, x: float, y: float) -> str:
        across = self.share(x)
        from_left = LEFT + across * (WIDTH - LEFT - RIGHT)
        from_top = HEIGHT - BOTTOM - y / self.high_y * (HEIGHT - TOP - BOTTOM)
        return f"{from_left:.1f},{from_top:.1f}"


def chart(title: str, curves: Sequence[Curve], *, x: str, y: str, log_x: bool = False) -> str:
    """Curves over one pair of axes; with `log_x` equal ratios are equally far across, if all are above 0."""
    points = [point for curve in curves for point in curve.points]
    axes = _axes([across for across, _ in points], max(up for _, up in points), log_x)
    drawn = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
        + " ".join(axes.place(*point) for point in curve.points)
        + '"/>'
        for curve, colour in zip(curves, _colours(len(curves)), strict=True)
    ]
    return _svg(title, axes, drawn, [curve.name for curve in curves], x, y)


def bands(title: str, across: Sequence[float], layers: Mapping[str, Sequence[float]], *, x: str, y: str) -> str:
    """Layers one upon the other, the first at the bottom; each has a value for each place across."""
    below = [0.0] * len(across)
    total = [math.fsum(values) for values in zip(*layers.values(), strict=True)]
    axes = _axes(across, max(total))
    drawn: list[str] = []
    for values, colour in zip(layers.values(), _colours(len(layers)), strict=True):
        above = [low + value for low, value in zip(below, values, strict=True)]
        edge = [axes.place(*point) for point in zip(across, above, strict=True)]
        back = [axes.place(*point) for point in reversed(list(zip(across, below, strict=True)))]
        drawn.append(f'<polygon fill="{colour}" points="{" ".join((*edge, *back))}"/>')
        below = above
    return _svg(title, axes, drawn, list(layers), x, y)


def _axes(across: Sequence[float], high_y: float, log_x: bool = False) -> Axes:
    log_x = log_x and min(across) > 0
    low, high = (min(across) if log_x else min(0.0, *across)), max(across)
    return Axes(low_x=low, high_x=high if high > low else low + 1, high_y=high_y if high_y > 0 else 1, log_x=log_x)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _svg(title: str, axes: Axes, drawn: Sequence[str], names: Sequence[str], x: str, y: str) -> str:
    page = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="11" font-family="sans-serif"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {page}>']
    parts.append(f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>')
    for tick in range(TICKS + 1):
        across = axes.value(tick / TICKS)
        up = axes.high_y * tick / TICKS
        left, bottom = axes.place(across, 0).split(",")
        _, height = axes.place(across, up).split(",")
        parts.append(f'<text x="{left}" y="{float(bottom) + 15:.1f}" text-anchor="middle">{across:.4g}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{height}" text-anchor="end">{up:.4g}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="#ddd"/>')
    parts += drawn
    for row, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{TOP + 18 * row}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{TOP + 9 + 18 * row}">{escape(name)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="12" y="{TOP - 2}">{escape(y)}</text></svg>')
    return "\n".join(parts)
