"""Charts as SVG: drawn here, coloured by the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, WIDTH - 8.0, 12.0, HEIGHT - 38.0
"""The edges of the part that is drawn into."""
_TICKS = 5
_DOT = 3.5


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    style: str
    """The line's class in the style sheet."""
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar, and a dot beside it."""

    name: str
    value: float
    mark: float
    colour: str


@dataclass(frozen=True)
class Axes:
    """A rectangle of values, and what they are."""

    title: str
    """What the chart shows, for those who cannot see it."""
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    percent: bool = False
    """Whether y is a share."""

    def across(self, value: float) -> float:
        """Where a value of x is drawn."""
        start, end = self.x
        return round(_LEFT + (value - start) / (end - start) * (_RIGHT - _LEFT), 1)

    def down(self, value: float) -> float:
        """Where a value of y is drawn."""
        start, end = self.y
        return round(_BOTTOM - (value - start) / (end - start) * (_BOTTOM - _TOP), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The points as SVG joins them."""
        return "M" + "L".join(f"{self.across(x)} {self.down(y)}" for x, y in points)

    def draw(self, *parts: Markup, x_ticks: bool = True) -> Markup:
        """The chart with its axes."""
        scale, unit = (100, " %") if self.percent else (1, "")
        behind = [
            _rule("grid", _LEFT, self.down(tick), _RIGHT, self.down(tick))
            + _text("end", _LEFT - 6, self.down(tick) + 4, _short(tick * scale) + unit)
            for tick in ticks(*self.y)
        ]
        below = [
            _text("middle", self.across(tick), _BOTTOM + 16, _short(tick))
            for tick in (ticks(*self.x) if x_ticks else ())
        ]
        label = _text("middle", (_LEFT + _RIGHT) / 2, HEIGHT - 5.0, self.x_label)
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        ).format(WIDTH, HEIGHT, self.title, Markup().join([*behind, *below, label, *parts]))


def ticks(start: float, end: float) -> list[float]:
    """Round numbers from start to end, at most six of them."""
    rough = (end - start) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def span(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """From the least to the largest value, or from zero, with some room."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    room = (high - low) * 0.05
    if room < largest * 1e-6:  # all are one, up to rounding
        room = largest * 0.1
    room = max(room, 1e-9) if largest else 1.0
    return 0.0 if zero else low - room, high + room


def curves(axes: Axes, lines: Sequence[Line]) -> Markup:
    """Several curves."""
    return axes.draw(*(_curve(axes, line) for line in lines))


def densities(axes: Axes, lines: Sequence[Line], marks: Sequence[tuple[str, float]]) -> Markup:
    """Curves over an area, and up to two named upright lines, from left to right."""
    parts = []
    for line in lines:
        closed = [(line.points[0][0], 0.0), *line.points, (line.points[-1][0], 0.0)]
        area = Markup('<path class="area {}" d="{}"/>').format(line.style, axes.path(closed))
        parts.append(area + _curve(axes, line))
    for place, (name, value) in enumerate(marks, start=1):
        x, last = axes.across(value), place == len(marks)
        parts.append(_rule("mark", x, _TOP, x, _BOTTOM))
        # Away from the other line, so that the two names do not meet.
        parts.append(_text("start" if last else "end", x + (5 if last else -5), _TOP + 8, name))
    return axes.draw(*parts)


def ranked(axes: Axes, bars: Sequence[Bar], level: float) -> Markup:
    """Bars side by side, each with its dot, and a level across."""
    slot = (_RIGHT - _LEFT) / len(bars)
    parts = [_rule("mark", _LEFT, axes.down(level), _RIGHT, axes.down(level))]
    for place, bar in enumerate(bars):
        left, top = _LEFT + (place + 0.1) * slot, axes.down(bar.value)
        parts.append(
            Markup(
                '<g><title>{}</title><rect x="{:.1f}" y="{}" width="{:.2f}" height="{:.1f}"'
                ' fill="{}"/><circle class="dot" cx="{:.1f}" cy="{}" r="{:.2f}"/></g>'
            ).format(
                *(bar.name, left, top, slot * 0.8, axes.down(0.0) - top, bar.colour),
                *(left + slot * 0.4, axes.down(bar.mark), min(_DOT, slot * 0.4)),
            )
        )
    return axes.draw(*parts, x_ticks=False)


def _curve(axes: Axes, line: Line) -> Markup:
    return Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(
        line.style, axes.path(line.points), line.name
    )


def _rule(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        style, x1, y1, x2, y2
    )


def _text(anchor: str, x: float, y: float, words: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(anchor, x, y, words)


def _short(value: float) -> str:
    """A number of an axis, without noise behind its point."""
    return f"{value:.6g}".replace("-", "−")
