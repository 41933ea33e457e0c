"""Line plots as SVG, for a page that needs nothing beside it."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 14, 46


class Line(NamedTuple):
    """A named line through (x, y); `colour` is CSS's."""

    name: str
    colour: str
    points: Sequence[tuple[float | int, float]]


def colour(index: int, count: int) -> str:
    """One of `count` colours that differ as much as they can."""
    hue = 360 * ((index * 0.61803398875) % 1) if count > 12 else 360 * index / max(1, count)
    return f"hsl({hue:.0f} 68% {(46, 58, 38)[index % 3] if count > 6 else 48}%)"


def plot(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    ticks: Sequence[float | int],
    marks: Mapping[str, float] | None = None,
    share: bool = False,
) -> str:
    """An SVG with both axes logarithmic; `ticks` are x's, `marks` named horizontal lines.

    Values that are not positive and finite are left out. With `share` the y axis is linear instead,
    from 0 to 1.
    """
    least = -1.0 if share else 0.0
    kept = [
        line._replace(
            points=[(x, y) for x, y in line.points if 0 < x < math.inf and least < y < math.inf]
        )
        for line in lines
    ]
    kept = [line for line in kept if line.points]
    marks = marks or {}
    xs = [float(x) for x in (*ticks, *(x for line in kept for x, _ in line.points))]
    ys = [float(y) for y in (*(y for line in kept for _, y in line.points), *marks.values())]
    if not kept:
        return ""
    across = _scale(min(xs), max(xs), (_LEFT, WIDTH - _RIGHT), 0.06)
    down = _shares if share else _scale(min(ys), max(ys), (HEIGHT - _BOTTOM, _TOP), 0.05)
    parts = [f"<title>{html.escape(y_label)} by {html.escape(x_label)}</title>"]
    for y in (0.0, 0.25, 0.5, 0.75, 1.0) if share else _decades(min(ys), max(ys)):
        parts.append(_level("grid", down(y)))
        parts.append(_text("tick", _LEFT - 8, down(y) + 4, _power(y) if y else "0", "end"))
    for x in ticks:
        ends = f'y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
        parts.append(f'<line class="grid" x1="{across(x)}" x2="{across(x)}" {ends}/>')
        parts.append(_text("tick", across(x), HEIGHT - _BOTTOM + 18, f"{x:g}"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(_text("label", middle[0], HEIGHT - 8, html.escape(x_label)))
    upright = f'<g transform="translate(14 {middle[1]}) rotate(-90)">'
    parts.append(f"{upright}{_text('label', 0, 0, html.escape(y_label))}</g>")
    for name, y in marks.items():
        parts.append(_level("mark", down(y)))
        parts.append(_text("tick", _LEFT + 4, down(y) - 5, html.escape(name), "start"))
    for line in kept:
        name = html.escape(line.name)
        path = " ".join(f"{across(x)},{down(y)}" for x, y in line.points)
        parts.append(f'<g class="series" data-name="{name}" style="--ink: {line.colour}">')
        parts.append(f'<polyline points="{path}"/>')
        for x, y in line.points:
            said = f"<title>{name}: {y:.3g} at {x:g}</title>"
            parts.append(f'<circle cx="{across(x)}" cy="{down(y)}" r="3.4">{said}</circle>')
        parts.append("</g>")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _level(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'


def _text(kind: str, x: float | int, y: float | int, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _scale(
    low: float, high: float, span: tuple[int, int], margin: float
) -> Callable[[float | int], float]:
    a, b = math.log(low), math.log(high)
    if b - a < 1e-9:
        a, b = a - 0.5, b + 0.5
    a, b = a - margin * (b - a), b + margin * (b - a)
    return lambda value: round(span[0] + (math.log(value) - a) / (b - a) * (span[1] - span[0]), 1)


def _shares(value: float | int) -> float:
    bottom, top = HEIGHT - _BOTTOM - 8, _TOP + 8
    return round(bottom + value * (top - bottom), 1)


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 8)
    inside = [10.0**n for n in range(first, last + 1) if low <= 10.0**n <= high]
    if len(inside) >= 2:
        return inside[::every]
    return [
        v for n in range(first, last + 1) for m in (1, 2, 5) if low <= (v := m * 10.0**n) <= high
    ]


def _power(value: float) -> str:
    exponent = math.log10(value)
    if abs(exponent) <= 2 or exponent != round(exponent):
        return f"{value:g}"
    return f'10<tspan dy="-5" font-size="9">{round(exponent)}</tspan>'
